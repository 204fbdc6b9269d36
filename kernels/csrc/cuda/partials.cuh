// The second half of sums over rows: adding the per-block partial sums, in order, and rounding once.
#pragma once
#include "numbers.cuh"

namespace dsmoe {

constexpr int kPartialThreads = 256;

inline __host__ __device__ unsigned partial_blocks(int sums, int dim) {  // for each group
  return static_cast<unsigned>((static_cast<int64_t>(sums) * dim + kPartialThreads - 1) / kPartialThreads);
}

// partial [groups, parts, sums * dim] float -> out_s [groups, dim] T for each of the sums; a thread for each column.
template <class T>
__global__ void __launch_bounds__(kPartialThreads)
    add_partials(const float* __restrict__ partial, int parts, int sums, int dim, T* __restrict__ out0,
                 T* __restrict__ out1) {
  const unsigned blocks = partial_blocks(sums, dim);
  const int64_t group = blockIdx.x / blocks, width = static_cast<int64_t>(sums) * dim;
  const int column = static_cast<int>(blockIdx.x % blocks * kPartialThreads + threadIdx.x);
  if (column >= width) return;
  const float* from = partial + group * parts * width + column;
  float sum = 0.f;
#pragma unroll 4
  for (int p = 0; p < parts; p++) sum += from[p * width];
  T* out = column < dim ? out0 : out1;
  out[group * dim + (column < dim ? column : column - dim)] = from_float<T>(sum);
}

}  // namespace dsmoe
