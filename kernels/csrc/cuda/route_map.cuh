// From the chosen experts to the expert-contiguous order: a stable counting sort without atomics. The routing kernel
// has counted each block of 64 tokens; a scan over blocks and a ranking within each give every slot its row.
#pragma once
#include "reduce.cuh"
#include "route_choose.cuh"

namespace dsmoe {

constexpr int kScanThreads = 256;
constexpr int kMaxExperts = 64;

__device__ __forceinline__ int warp_running_sum(int v, int lane) {
#pragma unroll
  for (int d = 1; d < kWarp; d <<= 1) {
    const int below = __shfl_up_sync(kAllLanes, v, d);
    if (lane >= d) v += below;
  }
  return v;
}

// One block for each expert. block_counts [E, blocks] -> block_base [E, blocks]: how many of the expert's slots lie in
// earlier blocks; counts [E]; prob_sum [E] from block_sums [E, blocks], added in a fixed order.
__global__ void __launch_bounds__(kScanThreads)
    route_scan(const int* __restrict__ block_counts, const float* __restrict__ block_sums, int blocks,
               int* __restrict__ block_base, int64_t* __restrict__ counts, float* __restrict__ prob_sum) {
  constexpr int kWarps = kScanThreads / kWarp;
  DSMOE_SHARED(int, warp_end, [kWarps]);
  DSMOE_SHARED(float, warp_total, [kWarps]);
  const int e = blockIdx.x, lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t row = static_cast<int64_t>(e) * blocks;
  int before = 0;  // slots in all blocks of earlier rounds
  float sum = 0.f;
  for (int round = 0; round < blocks; round += kScanThreads) {
    const int b = round + threadIdx.x;
    const int own = b < blocks ? block_counts[row + b] : 0;
    if (b < blocks) sum += block_sums[row + b];
    const int running = warp_running_sum(own, lane);
    if (lane == kWarp - 1) warp_end[warp] = running;
    __syncthreads();
    int earlier_warps = 0, all_warps = 0;
#pragma unroll
    for (int w = 0; w < kWarps; w++) {
      earlier_warps += w < warp ? warp_end[w] : 0;
      all_warps += warp_end[w];
    }
    if (b < blocks) block_base[row + b] = before + earlier_warps + running - own;
    before += all_warps;
    __syncthreads();
  }
  sum = warp_sum(sum);
  if (lane == 0) warp_total[warp] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  float total = 0.f;
  for (int w = 0; w < kWarps; w++) total += warp_total[w];
  prob_sum[e] = total;
  counts[e] = before;
}

// A warp for each block of kRouteTokens tokens. indices [N*k] and block_base -> position [N*k], order [N*k], ends [E].
__global__ void __launch_bounds__(kRouteWarps* kWarp)
    route_rank(const int64_t* __restrict__ indices, const int* __restrict__ block_base,
               const int64_t* __restrict__ counts, int64_t slots, int experts, int k, int blocks,
               int64_t* __restrict__ position, int64_t* __restrict__ order, int32_t* __restrict__ ends) {
  DSMOE_SHARED(int, next_row, [kRouteWarps][kMaxExperts]);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int b = blockIdx.x * kRouteWarps + warp;
  int start = 0;  // of the experts seen so far
#pragma unroll
  for (int e = lane; e < kMaxExperts; e += kWarp) {
    const int count = e < experts ? static_cast<int>(counts[e]) : 0;
    const int running = warp_running_sum(count, lane);
    if (e < experts) {
      if (b == 0) ends[e] = start + running;
      next_row[warp][e] = start + running - count + (b < blocks ? block_base[static_cast<int64_t>(e) * blocks + b] : 0);
    }
    start += __shfl_sync(kAllLanes, running, kWarp - 1);
  }
  __syncwarp();
  const int64_t first = static_cast<int64_t>(b) * kRouteTokens * k;
  for (int turn = 0; turn < kRouteTokens * k; turn += kWarp) {
    if (first + turn >= slots) break;  // the whole warp
    const int64_t slot = first + turn + lane;
    const int e = slot < slots ? static_cast<int>(indices[slot]) : -1;
    const unsigned same = __match_any_sync(kAllLanes, e);
    const int rank = __popc(same & ((1u << lane) - 1u));
    if (e >= 0) {
      const int row = next_row[warp][e] + rank;
      position[slot] = row;
      order[row] = slot;
    }
    __syncwarp();
    if (e >= 0 && rank == 0) next_row[warp][e] += __popc(same);
    __syncwarp();
  }
}

}  // namespace dsmoe
