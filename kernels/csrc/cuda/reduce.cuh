// Sums over the lanes of a warp, in a fixed order.
#pragma once
#include "platform.cuh"

namespace dsmoe {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kWarp = 32;

__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int distance = 16; distance > 0; distance >>= 1) v += __shfl_xor_sync(kAllLanes, v, distance);
  return v;
}

// Sums kCount values (a power of two, at most 64) over the 32 lanes at once by recursive halving: in each step a lane
// keeps half of its values and adds its partner's. kCount - 1 + log2(32 / kCount) shuffles instead of 5 * kCount.
// Afterwards v[i], i < values_kept, is the total of value first_value(lane) + i.
template <int kCount>
struct WarpScatterSum {
  static_assert(kCount >= 2 && kCount <= 64 && (kCount & (kCount - 1)) == 0);
  static constexpr int kept = kCount > kWarp ? kCount / kWarp : 1;
  static constexpr int lanes_per_value = kCount < kWarp ? kWarp / kCount : 1;

  __device__ static __forceinline__ int first_value(int lane) { return lane / lanes_per_value * kept; }
  __device__ static __forceinline__ bool leads(int lane) { return lane % lanes_per_value == 0; }

  __device__ static __forceinline__ void run(float (&v)[kCount], int lane) {
    int distance = 16;
#pragma unroll
    for (int n = kCount; n > kept; n >>= 1, distance >>= 1) {
      const bool upper = lane & distance;
#pragma unroll
      for (int i = 0; i < kCount / 2; i++) {
        if (i < n / 2) {
          const float sent = upper ? v[i] : v[i + n / 2], own = upper ? v[i + n / 2] : v[i];
          v[i] = own + __shfl_xor_sync(kAllLanes, sent, distance);
        }
      }
    }
#pragma unroll
    for (int d = lanes_per_value / 2; d > 0; d >>= 1) v[0] += __shfl_xor_sync(kAllLanes, v[0], d);
  }
};

}  // namespace dsmoe
