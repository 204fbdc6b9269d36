// Host-side help for the launchers: choice of template instance by dtype and alignment, sizes, error codes.
#pragma once
#include "numbers.cuh"

namespace dsmoe {

template <bool kValue>
using Flag = std::integral_constant<bool, kValue>;
template <int kValue>
using Number = std::integral_constant<int, kValue>;
template <class T>
struct Type {
  using type = T;
};

// f(Type<T>) for the dtype code.
template <class F>
int by_dtype(int dtype, F&& f) {
  switch (dtype) {
    case DSMOE_FLOAT32: return f(Type<float>{});
    case DSMOE_BFLOAT16: return f(Type<bf16>{});
    case DSMOE_FLOAT16: return f(Type<f16>{});
    default: return DSMOE_NOT_COVERED;
  }
}

template <class F>
int by_flag(bool flag, F&& f) {
  return flag ? f(Flag<true>{}) : f(Flag<false>{});
}

// Whether rows of `width` elements (and of `stride` elements apart) can be read 128 bits at a time at all addresses.
// width % 8 == 0 makes rows of every dtype start 16-byte aligned; null pointers do not count.
template <class... Pointers>
bool vector_access(int64_t width, int64_t stride, Pointers... pointers) {
  const uintptr_t bits = (reinterpret_cast<uintptr_t>(pointers) | ...);
  return width % 8 == 0 && stride % 8 == 0 && bits % 16 == 0;
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Row numbers and counts are 32-bit on the device (ends is, by torch's grouped_mm); element offsets are 64-bit.
constexpr int64_t kMaxRows = (int64_t{1} << 31) - 1024;
inline bool is_count(int64_t n) { return n >= 0 && n <= kMaxRows; }

inline int launch_status() { return static_cast<int>(cudaGetLastError()); }

// Widest row of the kernels in which one block owns whole rows, 8 columns a thread.
constexpr int64_t kMaxBlockWidth = 1024 * 8;
inline unsigned threads_for_width(int64_t width) { return static_cast<unsigned>(ceil_div(width, 8 * 32) * 32); }

}  // namespace dsmoe
