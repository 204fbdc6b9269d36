// Softmax, top-k and statistics of a block of tokens whose logits lie in shared memory.
#pragma once
#include "reduce.cuh"

namespace dsmoe {

constexpr int kRouteTokens = 64;                               // tokens of a block
constexpr int kRouteWarps = 8;
constexpr int kRouteWarpTokens = kRouteTokens / kRouteWarps;   // consecutive tokens of a warp

struct RouteShape {
  int64_t tokens;
  int dim, experts, k, blocks;
  bool renormalize;
};
struct RouteOutputs {
  float *probs, *gates;
  int64_t* indices;
  float* logsumexp;
  int* block_counts;   // [E, blocks]: slots of the block's tokens that go to expert e
  float* block_sums;   // [E, blocks]: sum of the block's probabilities of expert e
};

// How kPadded experts (the count rounded up to a power of two) lie over the lanes of a warp: a segment of `lanes` lanes
// for each token, so that no lane idles with few experts; with 64, two experts for each lane.
template <int kPadded>
struct Segments {
  static constexpr int lanes = kPadded < kWarp ? kPadded : kWarp;
  static constexpr int values = kPadded / lanes;     // experts of a lane: value v is expert v * lanes + place
  static constexpr int tokens = kWarp / lanes;       // tokens that a warp works on at once
  int place, segment;
  __device__ __forceinline__ explicit Segments(int lane) : place(lane % lanes), segment(lane / lanes) {}
  __device__ __forceinline__ int expert(int v) const { return v * lanes + place; }
  __device__ __forceinline__ int owner_lane(int expert) const { return segment * lanes + expert % lanes; }

  static __device__ __forceinline__ float sum(float v) {
#pragma unroll
    for (int d = lanes / 2; d > 0; d >>= 1) v += __shfl_xor_sync(kAllLanes, v, d);
    return v;
  }
  static __device__ __forceinline__ unsigned largest(unsigned v) {
    if constexpr (lanes == kWarp) {
      return __reduce_max_sync(kAllLanes, v);  // one instruction from sm_80 on
    } else {
#pragma unroll
      for (int d = lanes / 2; d > 0; d >>= 1) {
        const unsigned other = __shfl_xor_sync(kAllLanes, v, d);
        v = other > v ? other : v;
      }
      return v;
    }
  }
  // The lowest expert of this lane's token whose value fulfils the predicate; one must.
  __device__ __forceinline__ int lowest_expert(const bool (&predicate)[values]) const {
    int found = -1;
#pragma unroll
    for (int v = 0; v < values; v++) {
      const unsigned all = __ballot_sync(kAllLanes, predicate[v]);
      const unsigned mine = lanes == kWarp ? all : (all >> (segment * lanes)) & ((1u << (lanes % kWarp)) - 1u);
      if (found < 0 && mine) found = v * lanes + __ffs(static_cast<int>(mine)) - 1;
    }
    return found;
  }
  // The value that the owner of `expert` (of this lane's token) holds for it.
  __device__ __forceinline__ float value_of(const float (&value)[values], int expert) const {
    float taken = __shfl_sync(kAllLanes, value[0], owner_lane(expert));
    if constexpr (values == 2) {
      const float second = __shfl_sync(kAllLanes, value[1], owner_lane(expert));
      if (expert >= lanes) taken = second;
    }
    return taken;
  }
};

// Unsigned keys in the order of floats. NaN is the largest, whatever its sign; no number gives 0.
__device__ __forceinline__ unsigned order_key(float f) {
  if (f != f) return 0xffffffffu;
  const unsigned u = __float_as_uint(f);
  return u & 0x80000000u ? ~u : u | 0x80000000u;
}
__device__ __forceinline__ float from_order_key(unsigned key) {
  return __uint_as_float(key & 0x80000000u ? key ^ 0x80000000u : ~key);
}

// Softmax of the token's logits in place; returns their logsumexp. As in torch, one NaN or +Inf makes all of them NaN.
template <int kPadded>
__device__ __forceinline__ float softmax(float (&p)[Segments<kPadded>::values], const Segments<kPadded>& at,
                                         int experts) {
  using S = Segments<kPadded>;
  unsigned key = 0;
#pragma unroll
  for (int v = 0; v < S::values; v++) {
    const unsigned own = at.expert(v) < experts ? order_key(p[v]) : 0u;
    key = own > key ? own : key;
  }
  const float largest = from_order_key(S::largest(key));
  float total = 0.f;
#pragma unroll
  for (int v = 0; v < S::values; v++) {
    p[v] = at.expert(v) < experts ? expf(p[v] - largest) : 0.f;
    total += p[v];
  }
  total = S::sum(total);
#pragma unroll
  for (int v = 0; v < S::values; v++) p[v] = p[v] / total;
  const bool infinite = fabsf(largest) == __uint_as_float(0x7f800000u);
  return infinite ? largest : largest + logf(total);
}

constexpr int kMaxChoices = 4;

// The k experts of the largest p + bias, in that order, equal ones by number. Returns their p in `gate`.
template <int kPadded>
__device__ __forceinline__ void top_k(const float (&p)[Segments<kPadded>::values], const Segments<kPadded>& at,
                                      const RouteShape& shape, const float* bias, int (&chosen)[kMaxChoices],
                                      float (&gate)[kMaxChoices]) {
  using S = Segments<kPadded>;
  unsigned key[S::values];
#pragma unroll
  for (int v = 0; v < S::values; v++) {
    const int e = at.expert(v);
    key[v] = e < shape.experts ? order_key(bias ? p[v] + bias[e] : p[v]) : 0u;
  }
#pragma unroll
  for (int j = 0; j < kMaxChoices; j++) {
    if (j >= shape.k) break;
    unsigned own = key[0];
    if constexpr (S::values == 2) own = key[1] > own ? key[1] : own;
    const unsigned best = S::largest(own);
    bool is_best[S::values];
#pragma unroll
    for (int v = 0; v < S::values; v++) is_best[v] = key[v] == best;
    chosen[j] = at.lowest_expert(is_best);
    gate[j] = at.value_of(p, chosen[j]);
#pragma unroll
    for (int v = 0; v < S::values; v++)
      if (at.expert(v) == chosen[j]) key[v] = 0u;
  }
}

// Adds the warps' counts and probability sums in a fixed order and writes the block's.
template <int kPadded>
__device__ __forceinline__ void write_block_statistics(int (&count)[Segments<kPadded>::values],
                                                       float (&sum)[Segments<kPadded>::values],
                                                       const Segments<kPadded>& at, const RouteShape& shape,
                                                       const RouteOutputs& out) {
  using S = Segments<kPadded>;
  DSMOE_SHARED(int, warp_count, [kRouteWarps][kPadded]);
  DSMOE_SHARED(float, warp_total, [kRouteWarps][kPadded]);
  const int warp = threadIdx.x / kWarp;
#pragma unroll
  for (int v = 0; v < S::values; v++) {
#pragma unroll
    for (int d = S::lanes; d < kWarp; d <<= 1) {
      count[v] += __shfl_xor_sync(kAllLanes, count[v], d);
      sum[v] += __shfl_xor_sync(kAllLanes, sum[v], d);
    }
    if (at.segment == 0) {
      warp_count[warp][at.expert(v)] = count[v];
      warp_total[warp][at.expert(v)] = sum[v];
    }
  }
  __syncthreads();
  const int e = threadIdx.x;
  if (e >= shape.experts) return;
  int block_count = 0;
  float block_sum = 0.f;
  for (int w = 0; w < kRouteWarps; w++) {
    block_count += warp_count[w][e];
    block_sum += warp_total[w][e];
  }
  out.block_counts[static_cast<int64_t>(e) * shape.blocks + blockIdx.x] = block_count;
  out.block_sums[static_cast<int64_t>(e) * shape.blocks + blockIdx.x] = block_sum;
}

// logits: shared [kRouteTokens, kPadded]; a warp reads only the rows of its own tokens. Called by all threads.
template <int kPadded>
__device__ __forceinline__ void choose_experts(const float* logits, const RouteShape& shape, const float* bias,
                                               const RouteOutputs& out) {
  using S = Segments<kPadded>;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const S at(lane);
  int count[S::values] = {};
  float sum[S::values] = {};
  for (int turn = 0; turn < kRouteWarpTokens; turn += S::tokens) {
    const int own = turn + at.segment, in_block = warp * kRouteWarpTokens + own;
    const int64_t token = static_cast<int64_t>(blockIdx.x) * kRouteTokens + in_block;
    const bool active = own < kRouteWarpTokens && token < shape.tokens;
    float p[S::values], gate[kMaxChoices] = {};
    int chosen[kMaxChoices] = {};
#pragma unroll
    for (int v = 0; v < S::values; v++) p[v] = active ? logits[in_block * kPadded + at.expert(v)] : 0.f;
    const float logsumexp = softmax<kPadded>(p, at, shape.experts);
    top_k<kPadded>(p, at, shape, bias, chosen, gate);
    if (!active) continue;  // no warp operation from here on
    float divisor = 1.f;
    if (shape.renormalize) {
      divisor = 0.f;
#pragma unroll
      for (int j = 0; j < kMaxChoices; j++) divisor += j < shape.k ? gate[j] : 0.f;
    }
#pragma unroll
    for (int v = 0; v < S::values; v++) {
      const int e = at.expert(v);
      if (e < shape.experts) out.probs[token * shape.experts + e] = p[v];
      sum[v] += p[v];
#pragma unroll
      for (int j = 0; j < kMaxChoices; j++) count[v] += j < shape.k && chosen[j] == e;
    }
#pragma unroll
    for (int j = 0; j < kMaxChoices; j++) {
      if (j < shape.k && at.place == j) {
        out.indices[token * shape.k + j] = chosen[j];
        out.gates[token * shape.k + j] = shape.renormalize ? gate[j] / divisor : gate[j];
      }
    }
    if (at.place == 0) out.logsumexp[token] = logsumexp;
  }
  write_block_statistics<kPadded>(count, sum, at, shape, out);
}

}  // namespace dsmoe
