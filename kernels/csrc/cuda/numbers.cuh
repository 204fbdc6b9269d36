// Number formats of tensors, and 8 columns of a row at a time: the unit in which every kernel reads and writes.
#pragma once
#include "platform.cuh"

namespace dsmoe {

using bf16 = __nv_bfloat16;
using f16 = __half;

// ---- two 16-bit numbers in a word ----
template <class T>
__device__ __forceinline__ float2 unpack2(unsigned word);
template <>
__device__ __forceinline__ float2 unpack2<bf16>(unsigned word) {
  return make_float2(__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u));
}
template <>
__device__ __forceinline__ float2 unpack2<f16>(unsigned word) {
  __half2 pair;
  memcpy(&pair, &word, 4);
  return __half22float2(pair);
}
template <class T>
__device__ __forceinline__ unsigned pack2(float x, float y);
template <>
__device__ __forceinline__ unsigned pack2<bf16>(float x, float y) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(x, y);
  unsigned word;
  memcpy(&word, &pair, 4);
  return word;
}
template <>
__device__ __forceinline__ unsigned pack2<f16>(float x, float y) {
  const __half2 pair = __floats2half2_rn(x, y);
  unsigned word;
  memcpy(&word, &pair, 4);
  return word;
}

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(bf16 v) { return __bfloat162float(v); }
__device__ __forceinline__ float to_float(f16 v) { return __half2float(v); }
template <class T>
__device__ __forceinline__ T from_float(float v) {
  if constexpr (std::is_same_v<T, bf16>) return __float2bfloat16_rn(v);
  else if constexpr (std::is_same_v<T, f16>) return __float2half_rn(v);
  else return v;
}
// What a value becomes when it is stored as T: sums over stored values must see the stored ones.
template <class T>
__device__ __forceinline__ float rounded(float v) {
  return to_float(from_float<T>(v));
}

// ---- 128-bit memory access ----
#if defined(__CUDACC__)
__device__ __forceinline__ uint4 load16(const void* p) { return *static_cast<const uint4*>(p); }
__device__ __forceinline__ void store16(void* p, uint4 v) { *static_cast<uint4*>(p) = v; }
#else
inline uint4 load16(const void* p) {
  if (reinterpret_cast<uintptr_t>(p) % 16) emu::stop("a 128-bit load from an unaligned address");
  return *static_cast<const uint4*>(p);
}
inline void store16(void* p, uint4 v) {
  if (reinterpret_cast<uintptr_t>(p) % 16) emu::stop("a 128-bit store to an unaligned address");
  *static_cast<uint4*>(p) = v;
}
#endif

// Which 8 columns thread `lane` of a group of `group` threads owns in turn `turn` (of 8 * group columns each).
// kVector: neighbours, for 128-bit access (width a multiple of 8). Else `group` apart, so that the group's access to
// single elements is coalesced; columns at or past the width do not exist.
template <bool kVector>
struct Columns {
  int first;
  int step;
  __device__ __forceinline__ Columns(int lane, int group, int turn)
      : first(kVector ? (turn * group + lane) * 8 : turn * group * 8 + lane), step(kVector ? 1 : group) {}
  __device__ __forceinline__ int operator[](int i) const { return first + i * step; }
  __device__ __forceinline__ bool none(int width) const { return first >= width; }
};

// 8 elements as loaded; converted when needed, to keep many loads in flight in few registers.
template <class T, bool kVector>
struct Raw8 {
  uint4 words[sizeof(T) / 2];
  __device__ __forceinline__ void load(const T* row, Columns<kVector> c, int width) {
    const bool none = c.none(width);
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(T) / 2); i++)
      words[i] = none ? make_uint4(0, 0, 0, 0) : load16(row + c.first + i * (16 / sizeof(T)));
  }
  __device__ __forceinline__ void store(T* row, Columns<kVector> c, int width) const {
    if (c.none(width)) return;
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(T) / 2); i++) store16(row + c.first + i * (16 / sizeof(T)), words[i]);
  }
  __device__ __forceinline__ void get(float (&v)[8]) const {
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(T) / 2); i++) {
      const unsigned w[4] = {words[i].x, words[i].y, words[i].z, words[i].w};
#pragma unroll
      for (int j = 0; j < 4; j++) {
        if constexpr (sizeof(T) == 4) {
          v[i * 4 + j] = __uint_as_float(w[j]);
        } else {
          const float2 pair = unpack2<T>(w[j]);
          v[2 * j] = pair.x, v[2 * j + 1] = pair.y;
        }
      }
    }
  }
};
template <class T>
struct Raw8<T, false> {
  T values[8];
  __device__ __forceinline__ void load(const T* row, Columns<false> c, int width) {
#pragma unroll
    for (int i = 0; i < 8; i++) values[i] = c[i] < width ? row[c[i]] : from_float<T>(0.f);
  }
  __device__ __forceinline__ void store(T* row, Columns<false> c, int width) const {
#pragma unroll
    for (int i = 0; i < 8; i++)
      if (c[i] < width) row[c[i]] = values[i];
  }
  __device__ __forceinline__ void get(float (&v)[8]) const {
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] = to_float(values[i]);
  }
};

// Columns past the width read as 0.
template <class T, bool kVector>
__device__ __forceinline__ void load8(const T* row, Columns<kVector> c, int width, float (&v)[8]) {
  Raw8<T, kVector> raw;
  raw.load(row, c, width);
  raw.get(v);
}

// Columns past the width are not written.
template <class T, bool kVector>
__device__ __forceinline__ void store8(T* row, Columns<kVector> c, int width, const float (&v)[8]) {
  if constexpr (kVector) {
    if (c.none(width)) return;
    if constexpr (sizeof(T) == 4) {
#pragma unroll
      for (int i = 0; i < 8; i += 4)
        store16(row + c.first + i, make_uint4(__float_as_uint(v[i]), __float_as_uint(v[i + 1]),
                                              __float_as_uint(v[i + 2]), __float_as_uint(v[i + 3])));
    } else {
      store16(row + c.first, make_uint4(pack2<T>(v[0], v[1]), pack2<T>(v[2], v[3]), pack2<T>(v[4], v[5]),
                                        pack2<T>(v[6], v[7])));
    }
  } else {
#pragma unroll
    for (int i = 0; i < 8; i++)
      if (c[i] < width) row[c[i]] = from_float<T>(v[i]);
  }
}

}  // namespace dsmoe
