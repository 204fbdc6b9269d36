// The second half of sums over rows: adding the per-block partial sums, in order, and rounding once.
#pragma once
#include "numbers.cuh"

namespace dsmoe {

constexpr int kPartialThreads = 256;

// partial [groups, parts, sums * dim] float -> out_s [groups, dim] T for each of the sums; a thread for each column.
template <class T>
__global__ void __launch_bounds__(kPartialThreads)
    add_partials(const float* __restrict__ partial, int64_t groups, int parts, int sums, int dim, T* __restrict__ out0,
                 T* __restrict__ out1) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kPartialThreads + threadIdx.x;
  const int64_t width = static_cast<int64_t>(sums) * dim;
  if (i >= groups * width) return;
  const int64_t group = i / width, column = i % width;
  const float* from = partial + group * parts * width + column;
  float sum = 0.f;
#pragma unroll 4
  for (int p = 0; p < parts; p++) sum += from[p * width];
  T* out = column < dim ? out0 : out1;
  out[group * dim + column % dim] = from_float<T>(sum);
}

}  // namespace dsmoe
