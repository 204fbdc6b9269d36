// The router's product x[N,D] weight[E,D]^T in float32, followed in the same kernel by route_choose.cuh.
//
// Two forms. Resident: up to 16 experts; all weights lie in shared memory and the lanes of a warp split a row of x, so
// x is read once at memory speed. Tiled: more experts, or weights that do not fit; a 64 x E matrix product over slices
// of 32 columns, because with E accumulators for each token the resident form would be bound by shared-memory reads.
#pragma once
#include "numbers.cuh"
#include "route_choose.cuh"

namespace dsmoe {

constexpr int kRouteThreads = kRouteWarps * kWarp;
constexpr int kTurnColumns = kWarp * 8;  // columns of a row that a warp covers in one turn

inline __host__ __device__ int resident_row_floats(int dim) {
  return (dim + kTurnColumns - 1) / kTurnColumns * kTurnColumns;
}

// Weights to shared memory [kPadded, turns, 2, 32 lanes, 4]: each lane finds its 8 columns of a turn as two float4
// that lie 16 bytes apart from its neighbour's, without bank conflicts. Columns and experts that do not exist are 0.
template <class T, int kPadded, bool kVector>
__device__ __forceinline__ void load_resident_weights(const T* weight, const RouteShape& shape, int turns,
                                                      float* shared) {
  for (int i = threadIdx.x; i < kPadded * turns * kWarp; i += kRouteThreads) {
    const int lane = i % kWarp, turn = i / kWarp % turns, e = i / kWarp / turns;
    float w[8] = {};
    const Columns<kVector> columns(lane, kWarp, turn);
    if (e < shape.experts) load8<T, kVector>(weight + static_cast<int64_t>(e) * shape.dim, columns, shape.dim, w);
    float4* into = reinterpret_cast<float4*>(shared + (e * turns + turn) * kTurnColumns) + lane;
    into[0] = make_float4(w[0], w[1], w[2], w[3]);
    into[kWarp] = make_float4(w[4], w[5], w[6], w[7]);
  }
}

__device__ __forceinline__ float multiply_add(const float (&x)[8], float4 a, float4 b, float sum) {
  sum = fmaf(x[0], a.x, sum), sum = fmaf(x[1], a.y, sum), sum = fmaf(x[2], a.z, sum), sum = fmaf(x[3], a.w, sum);
  sum = fmaf(x[4], b.x, sum), sum = fmaf(x[5], b.y, sum), sum = fmaf(x[6], b.z, sum), sum = fmaf(x[7], b.w, sum);
  return sum;
}

template <class T, int kPadded, bool kVector>
__global__ void __launch_bounds__(kRouteThreads, 2)
    route_resident(const T* __restrict__ x, const T* __restrict__ weight, const float* __restrict__ bias,
                   RouteShape shape, RouteOutputs out) {
  // Tokens that a warp works on at once: each weight read from shared memory serves all of them.
  constexpr int kAtOnce = kPadded <= 4 ? 8 : 4;
  using Sum = WarpScatterSum<kAtOnce * kPadded>;
  DSMOE_DYNAMIC_SHARED(float, weights);
  DSMOE_SHARED(float, logits, [kRouteTokens * kPadded]);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int turns = resident_row_floats(shape.dim) / kTurnColumns;
  load_resident_weights<T, kPadded, kVector>(weight, shape, turns, weights);
  __syncthreads();
  for (int first = 0; first < kRouteWarpTokens; first += kAtOnce) {
    const int in_block = warp * kRouteWarpTokens + first;
    const T* row[kAtOnce];
#pragma unroll
    for (int t = 0; t < kAtOnce; t++) {  // past the end: the last token again, whose result nobody reads
      const int64_t token = static_cast<int64_t>(blockIdx.x) * kRouteTokens + in_block + t;
      row[t] = x + (token < shape.tokens ? token : shape.tokens - 1) * shape.dim;
    }
    float sums[kAtOnce * kPadded] = {};
    for (int turn = 0; turn < turns; turn++) {
      const Columns<kVector> columns(lane, kWarp, turn);
      float values[kAtOnce][8];
#pragma unroll
      for (int t = 0; t < kAtOnce; t++) load8<T, kVector>(row[t], columns, shape.dim, values[t]);
#pragma unroll
      for (int e = 0; e < kPadded; e++) {
        const float4* w = reinterpret_cast<const float4*>(weights + (e * turns + turn) * kTurnColumns) + lane;
        const float4 low = w[0], high = w[kWarp];
#pragma unroll
        for (int t = 0; t < kAtOnce; t++)
          sums[t * kPadded + e] = multiply_add(values[t], low, high, sums[t * kPadded + e]);
      }
    }
    Sum::run(sums, lane);
    if (Sum::leads(lane)) {
#pragma unroll
      for (int i = 0; i < Sum::kept; i++) logits[in_block * kPadded + Sum::first_value(lane) + i] = sums[i];
    }
  }
  __syncwarp();
  choose_experts<kPadded>(logits, shape, bias, out);
}

constexpr int kSlice = 32;  // columns of a slice of the tiled product

// Rows first..first + 63 of a [rows, dim] matrix, columns of one slice, to shared [kSlice, kRows] transposed. Row r of
// column c lies at r ^ (c / 8 * 8), so that neither this write (8 rows x 4 column groups in a warp) nor the reads by
// float4 meet in a bank.
template <class T, int kRows, bool kVector>
struct SliceLoader {
  static constexpr int groups = kSlice / 8;
  Raw8<T, kVector> staged;
  int row, group;
  bool active;
  __device__ __forceinline__ SliceLoader() : row(threadIdx.x / groups), group(threadIdx.x % groups) {
    active = row < kRows;
  }
  __device__ __forceinline__ void fetch(const T* matrix, int64_t first, int64_t rows, int slice, int dim) {
    if (!active) return;
    const bool inside = first + row < rows;
    const int column = slice * kSlice + group * 8;  // 8 neighbours in both modes: a group of one thread
    staged.load(matrix + (inside ? first + row : 0) * dim, Columns<kVector>(kVector ? column / 8 : column, 1, 0),
                inside ? dim : 0);
  }
  __device__ __forceinline__ void put(float (&shared)[kSlice][kRows]) const {
    if (!active) return;
    float values[8];
    staged.get(values);
#pragma unroll
    for (int i = 0; i < 8; i++) shared[group * 8 + i][row ^ (group * 8)] = values[i];
  }
};

// 256 threads as 16 x 16; a thread has 4 tokens x kPadded / 16 experts.
template <class T, int kPadded, bool kVector>
__global__ void __launch_bounds__(kRouteThreads)
    route_tiled(const T* __restrict__ x, const T* __restrict__ weight, const float* __restrict__ bias,
                RouteShape shape, RouteOutputs out) {
  static_assert(kPadded == 32 || kPadded == 64);
  constexpr int kTokens = 4, kExperts = kPadded / 16;
  DSMOE_SHARED(float, x_slice, [kSlice][kRouteTokens]);
  DSMOE_SHARED(float, w_slice, [kSlice][kPadded]);
  DSMOE_SHARED(float, logits, [kRouteTokens * kPadded]);
  const int token0 = threadIdx.x / 16 * kTokens, expert0 = threadIdx.x % 16 * kExperts;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kRouteTokens;
  SliceLoader<T, kRouteTokens, kVector> x_loader;
  SliceLoader<T, kPadded, kVector> w_loader;
  float total[kTokens][kExperts] = {};
  const int slices = (shape.dim + kSlice - 1) / kSlice;
  x_loader.fetch(x, first, shape.tokens, 0, shape.dim);
  w_loader.fetch(weight, 0, shape.experts, 0, shape.dim);
  for (int slice = 0; slice < slices; slice++) {
    x_loader.put(x_slice);
    w_loader.put(w_slice);
    __syncthreads();
    if (slice + 1 < slices) {  // the next slice is under way while this one is multiplied
      x_loader.fetch(x, first, shape.tokens, slice + 1, shape.dim);
      w_loader.fetch(weight, 0, shape.experts, slice + 1, shape.dim);
    }
    float sum[kTokens][kExperts] = {};  // of the slice alone: shorter chains of additions, a smaller rounding error
#pragma unroll
    for (int c = 0; c < kSlice; c++) {
      const int place = c / 8 * 8;
      const float4 a = *reinterpret_cast<const float4*>(&x_slice[c][token0 ^ place]);
      const float tokens[kTokens] = {a.x, a.y, a.z, a.w};
      float experts[kExperts];
#pragma unroll
      for (int e = 0; e < kExperts; e++) experts[e] = w_slice[c][(expert0 ^ place) + e];
#pragma unroll
      for (int t = 0; t < kTokens; t++)
#pragma unroll
        for (int e = 0; e < kExperts; e++) sum[t][e] = fmaf(tokens[t], experts[e], sum[t][e]);
    }
#pragma unroll
    for (int t = 0; t < kTokens; t++)
#pragma unroll
      for (int e = 0; e < kExperts; e++) total[t][e] += sum[t][e];
    __syncthreads();
  }
#pragma unroll
  for (int t = 0; t < kTokens; t++)
#pragma unroll
    for (int e = 0; e < kExperts; e++) logits[(token0 + t) * kPadded + expert0 + e] = total[t][e];
  __syncthreads();
  choose_experts<kPadded>(logits, shape, bias, out);
}

}  // namespace dsmoe
