// Warp collectives: each is a rendezvous of the lanes named in the mask. What the hardware leaves undefined (a lane
// that has left, a caller outside its mask, a value taken from a lane outside it) stops the program here.
#pragma once
#include "block.h"

namespace emu {

template <class T>
uint64_t to_bits(T value) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(T));
  return bits;
}
template <class T>
T from_bits(uint64_t bits) {
  T value;
  memcpy(&value, &bits, sizeof(T));
  return value;
}

// Every lane of the mask contributes `value`; then each gets pick(slots), slots[l] being what lane l contributed.
template <class T, class Pick>
auto exchange(unsigned mask, T value, const char* operation, Pick pick) {
  Warp& warp = block->warps[thread->warp];
  const int lane = thread->lane;
  if (!(mask >> lane & 1)) stop("a lane calls a warp operation whose mask leaves it out");
  if (mask & ~warp.live) stop("the mask of a warp operation names a lane that has left");
  if (mask == 0xffffffffu) {
    uint64_t* slots = warp.full_slot[warp.full.generation & 1];
    slots[lane] = to_bits(value);
    rendezvous(warp.full, kWarpSize, operation);
    return pick(static_cast<const uint64_t*>(slots));
  }
  Barrier* bar = warp.partial[__builtin_ctz(mask)];
  const unsigned needed = __builtin_popcount(mask);
  warp.partial_slot[lane] = to_bits(value);
  rendezvous(bar[0], needed, operation);
  auto result = pick(static_cast<const uint64_t*>(warp.partial_slot));
  rendezvous(bar[1], needed, operation);
  return result;
}

template <class T>
T take_from(unsigned mask, T value, int source, const char* operation) {
  if (!(mask >> source & 1)) stop("a shuffle reads a lane outside its mask");
  return exchange(mask, value, operation, [=](const uint64_t* slots) { return from_bits<T>(slots[source]); });
}

template <class Bit>
unsigned gather_bits(unsigned mask, const uint64_t* slots, Bit bit) {
  unsigned result = 0;
  for (int i = 0; i < kWarpSize; i++)
    if ((mask >> i & 1) && bit(slots[i])) result |= 1u << i;
  return result;
}

}  // namespace emu

inline void __syncthreads() { emu::rendezvous(emu::block->barrier, emu::block->live, "__syncthreads"); }
inline void __syncwarp(unsigned mask = 0xffffffffu) {
  emu::exchange(mask, 0, "__syncwarp", [](const uint64_t*) { return 0; });
}
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const int lane = emu::thread->lane;
  return emu::take_from(mask, value, (lane & ~(width - 1)) | (source & (width - 1)), "__shfl_sync");
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
  const int lane = emu::thread->lane, other = lane ^ bits;
  const bool inside = (other & ~(width - 1)) <= (lane & ~(width - 1));
  return emu::take_from(mask, value, inside ? other : lane, "__shfl_xor_sync");
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int lane = emu::thread->lane;
  const bool inside = (lane & (width - 1)) >= static_cast<int>(delta);
  return emu::take_from(mask, value, inside ? lane - static_cast<int>(delta) : lane, "__shfl_up_sync");
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int lane = emu::thread->lane;
  const bool inside = (lane & (width - 1)) + static_cast<int>(delta) < width;
  return emu::take_from(mask, value, inside ? lane + static_cast<int>(delta) : lane, "__shfl_down_sync");
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return emu::exchange(mask, predicate != 0, "__ballot_sync", [=](const uint64_t* slots) {
    return emu::gather_bits(mask, slots, [](uint64_t v) { return v != 0; });
  });
}
template <class T>
unsigned __match_any_sync(unsigned mask, T value) {
  const uint64_t mine = emu::to_bits(value);
  return emu::exchange(mask, value, "__match_any_sync", [=](const uint64_t* slots) {
    return emu::gather_bits(mask, slots, [=](uint64_t v) { return v == mine; });
  });
}
inline unsigned __reduce_max_sync(unsigned mask, unsigned value) {
  return emu::exchange(mask, value, "__reduce_max_sync", [=](const uint64_t* slots) {
    unsigned best = 0;
    for (int i = 0; i < emu::kWarpSize; i++)
      if ((mask >> i & 1) && slots[i] > best) best = static_cast<unsigned>(slots[i]);
    return best;
  });
}
