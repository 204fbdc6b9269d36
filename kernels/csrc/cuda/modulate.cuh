// Adaptive layer norm: LayerNorm without affine parameters, then scale and shift of the image, in one pass each way.
//
// A block has kModulateChunk tokens of one image, a thread 8 columns of all of them, so shift and scale are read once
// and their gradients are summed in registers. Tokens go in groups, whose sums over columns share a barrier.
#pragma once
#include "numbers.cuh"
#include "reduce.cuh"

namespace dsmoe {

constexpr float kLayerNormEps = 1e-6f;
constexpr int kModulateChunk = 32;
constexpr int kModulateMaxThreads = 512;  // a group of tokens wants more than the 64 registers of 1024 threads
constexpr int kModulateMaxWarps = kModulateMaxThreads / kWarp;

template <class T>
constexpr int kTokenGroup = sizeof(T) == 4 ? 2 : 4;  // the same bytes under way for each format

// Sums kCount values over the threads of the block; all get the totals. The caller alternates between two buffers: a
// thread that writes the next sums may be ahead of one that still reads these.
template <int kCount>
__device__ __forceinline__ void block_sum(float (&v)[kCount], float (&shared)[kModulateMaxWarps][kCount]) {
  using Sum = WarpScatterSum<kCount>;
  const int lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
  Sum::run(v, lane);
  if (Sum::leads(lane)) shared[threadIdx.x / kWarp][Sum::first_value(lane)] = v[0];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kCount; i++) v[i] = 0.f;
  for (int w = 0; w < warps; w++) {
#pragma unroll
    for (int i = 0; i < kCount; i++) v[i] += shared[w][i];
  }
}

// Tokens of this block: [first, first + count) of image `image`.
struct TokenChunk {
  int64_t image, first;
  int count;
  __device__ __forceinline__ TokenChunk(int64_t tokens, int chunks) {
    image = blockIdx.x / chunks;
    const int64_t in_image = static_cast<int64_t>(blockIdx.x % chunks) * kModulateChunk, left = tokens - in_image;
    first = image * tokens + in_image;
    count = left < kModulateChunk ? static_cast<int>(left) : kModulateChunk;
  }
  // Token t of the chunk, or its last one: the surplus of a group repeats it and writes nothing.
  __device__ __forceinline__ int64_t token(int t) const { return first + (t < count ? t : count - 1); }
};

template <class T, bool kVector>
__global__ void __launch_bounds__(kModulateMaxThreads)
    modulate(const T* __restrict__ x, const T* __restrict__ shift, const T* __restrict__ scale, int64_t mod_stride,
             int64_t tokens, int chunks, int dim, T* __restrict__ y, float* __restrict__ mean_out,
             float* __restrict__ rstd_out) {
  constexpr int kGroup = kTokenGroup<T>;
  DSMOE_SHARED(float, sums, [2][kModulateMaxWarps][kGroup]);
  const TokenChunk chunk(tokens, chunks);
  const Columns<kVector> columns(threadIdx.x, blockDim.x, 0);
  float a[8], b[8];
  load8<T, kVector>(scale + chunk.image * mod_stride, columns, dim, a);
  load8<T, kVector>(shift + chunk.image * mod_stride, columns, dim, b);
  for (int t0 = 0; t0 < chunk.count; t0 += kGroup) {
    Raw8<T, kVector> raw[kGroup];
    float v[8], mean[kGroup], variance[kGroup] = {};
#pragma unroll
    for (int t = 0; t < kGroup; t++) raw[t].load(x + chunk.token(t0 + t) * dim, columns, dim);
#pragma unroll
    for (int t = 0; t < kGroup; t++) {
      raw[t].get(v);
      mean[t] = ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7]));
    }
    block_sum<kGroup>(mean, sums[0]);
#pragma unroll
    for (int t = 0; t < kGroup; t++) {  // from the deviations: x^2 - mean^2 would cancel
      mean[t] /= dim;
      raw[t].get(v);
#pragma unroll
      for (int i = 0; i < 8; i++) {
        const float deviation = columns[i] < dim ? v[i] - mean[t] : 0.f;
        variance[t] = fmaf(deviation, deviation, variance[t]);
      }
    }
    block_sum<kGroup>(variance, sums[1]);
#pragma unroll
    for (int t = 0; t < kGroup; t++) {
      if (t0 + t >= chunk.count) continue;
      const float rstd = 1.f / sqrtf(variance[t] / dim + kLayerNormEps);
      const int64_t n = chunk.token(t0 + t);
      raw[t].get(v);
#pragma unroll
      for (int i = 0; i < 8; i++) v[i] = fmaf((v[i] - mean[t]) * rstd, 1.f + a[i], b[i]);
      store8<T, kVector>(y + n * dim, columns, dim, v);
      if (threadIdx.x == 0) {
        if (mean_out) mean_out[n] = mean[t];
        if (rstd_out) rstd_out[n] = rstd;
      }
    }
  }
}

// With z the normalised token and g = dy (1 + scale): dx = rstd (g - mean(g) - z mean(g z)); dshift = sum dy,
// dscale = sum dy z over the tokens of the image, as partial [images, chunks, 2, dim].
template <class T, bool kVector>
__global__ void __launch_bounds__(kModulateMaxThreads)
    modulate_backward(const T* __restrict__ dy, const T* __restrict__ x, const T* __restrict__ scale,
                      int64_t mod_stride, const float* __restrict__ mean, const float* __restrict__ rstd,
                      int64_t tokens, int chunks, int dim, T* __restrict__ dx, float* __restrict__ partial) {
  constexpr int kGroup = kTokenGroup<T> / 2;  // two rows for each token
  DSMOE_SHARED(float, sums, [2][kModulateMaxWarps][2 * kGroup]);
  const TokenChunk chunk(tokens, chunks);
  const Columns<kVector> columns(threadIdx.x, blockDim.x, 0);
  float a[8], dshift[8] = {}, dscale[8] = {};
  load8<T, kVector>(scale + chunk.image * mod_stride, columns, dim, a);
  for (int t0 = 0; t0 < chunk.count; t0 += kGroup) {
    Raw8<T, kVector> raw_x[kGroup], raw_dy[kGroup];
    float v[8], d[8], products[2 * kGroup] = {};  // sum of g, then of g z, of each token
#pragma unroll
    for (int t = 0; t < kGroup; t++) {
      raw_x[t].load(x + chunk.token(t0 + t) * dim, columns, dim);
      raw_dy[t].load(dy + chunk.token(t0 + t) * dim, columns, dim);
    }
#pragma unroll
    for (int t = 0; t < kGroup; t++) {
      const int64_t n = chunk.token(t0 + t);
      const float mean_n = mean[n], rstd_n = rstd[n];
      raw_x[t].get(v);
      raw_dy[t].get(d);
#pragma unroll
      for (int i = 0; i < 8; i++) {
        const float z = (v[i] - mean_n) * rstd_n, g = d[i] * (1.f + a[i]);
        products[2 * t] += g;
        products[2 * t + 1] = fmaf(g, z, products[2 * t + 1]);
        if (t0 + t < chunk.count) {
          dshift[i] += d[i];
          dscale[i] = fmaf(d[i], z, dscale[i]);
        }
      }
    }
    block_sum<2 * kGroup>(products, sums[t0 / kGroup % 2]);
#pragma unroll
    for (int t = 0; t < kGroup; t++) {
      if (t0 + t >= chunk.count) continue;
      const int64_t n = chunk.token(t0 + t);
      const float mean_n = mean[n], rstd_n = rstd[n];
      const float mean_g = products[2 * t] / dim, mean_gz = products[2 * t + 1] / dim;
      raw_x[t].get(v);
      raw_dy[t].get(d);
#pragma unroll
      for (int i = 0; i < 8; i++) {
        const float z = (v[i] - mean_n) * rstd_n;
        v[i] = rstd_n * (d[i] * (1.f + a[i]) - mean_g - z * mean_gz);
      }
      store8<T, kVector>(dx + n * dim, columns, dim, v);
    }
  }
  float* own = partial + static_cast<int64_t>(blockIdx.x) * 2 * dim;
  store8<float, kVector>(own, columns, dim, dshift);
  store8<float, kVector>(own + dim, columns, dim, dscale);
}

}  // namespace dsmoe
