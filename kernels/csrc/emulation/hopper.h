// Hopper's asynchronous machinery on the CPU: mbarriers, bulk tensor copies (TMA) and wgmma.
//
// Asynchronous work lands as late as it may: a copy when somebody waits for its barrier, a wgmma when its thread waits
// for the group. Until then the target of a copy is poison. So a wait that is missing, or a buffer that is released too
// early, gives wrong numbers. Layouts (128-byte swizzle, descriptors, fragments) follow the PTX manual.
#pragma once
#include <vector>

#include "cuda_emulation.h"

namespace emu {

struct MBarrier {  // in the 64 bits that the kernel reserves
  int32_t bytes_due;
  int16_t arrivals_due;
  uint16_t arrivals : 15, phase : 1;
};
static_assert(sizeof(MBarrier) == 8);

struct TensorMap {
  const __nv_bfloat16* base;
  int64_t rows, columns;
  int box_rows, box_columns;
};
struct TensorCopy {
  char* target;
  TensorMap map;
  uint64_t* barrier;
  int column, row;
};
struct MatrixProduct {
  float* sums;
  uint64_t a, b;
  int group;
};
inline thread_local std::vector<TensorCopy> copies_under_way;
struct ProductQueue {
  std::vector<MatrixProduct> products;
  int group = 0;
};
inline ProductQueue& my_products() {
  static thread_local std::vector<ProductQueue> queues(kMaxThreads);
  return queues[thread->linear];
}

// The 128-byte swizzle: 16-byte units of a row are permuted by the row number modulo 8.
inline uint32_t swizzle(uint32_t offset) { return offset ^ ((offset >> 7 & 7) << 4); }

inline void complete_phase_if_due(MBarrier* m) {
  if (m->arrivals_due != 0 || m->bytes_due != 0) return;
  m->phase ^= 1;
  m->arrivals_due = m->arrivals;
  moved();
}

inline void land(const TensorCopy& c) {
  const uint32_t start = static_cast<uint32_t>(c.target - dynamic_shared());
  for (int r = 0; r < c.map.box_rows; r++) {
    for (int i = 0; i < c.map.box_columns; i++) {
      const int64_t row = c.row + r, column = c.column + i;
      const bool inside = row < c.map.rows && column < c.map.columns;
      const __nv_bfloat16 v = inside ? c.map.base[row * c.map.columns + column] : __nv_bfloat16{0};
      memcpy(dynamic_shared() + swizzle(start + r * 128 + i * 2), &v, 2);
    }
  }
  MBarrier* m = reinterpret_cast<MBarrier*>(c.barrier);
  m->bytes_due -= c.map.box_rows * c.map.box_columns * 2;
  complete_phase_if_due(m);
}

// Element (row, k) of the K-major tile that a descriptor names.
inline float tile_element(uint64_t descriptor, int row, int k) {
  const uint32_t start = static_cast<uint32_t>(descriptor & 0x3fff) << 4;
  const uint32_t stride = static_cast<uint32_t>(descriptor >> 32 & 0x3fff) << 4;
  __nv_bfloat16 v;
  memcpy(&v, dynamic_shared() + swizzle(start + row / 8 * stride + row % 8 * 128 + k * 2), 2);
  return __bfloat162float(v);
}

// This thread's part of a 64 x 128 x 16 product.
inline void multiply(const MatrixProduct& p) {
  const int in_group = thread->linear % 128, row = in_group / 32 * 16 + in_group % 32 / 4, pair = in_group % 4;
  float a[2][16];
  for (int half = 0; half < 2; half++)
    for (int k = 0; k < 16; k++) a[half][k] = tile_element(p.a, row + 8 * half, k);
  for (int j = 0; j < 16; j++) {
    for (int c = 0; c < 2; c++) {
      for (int k = 0; k < 16; k++) {
        const float b = tile_element(p.b, j * 8 + 2 * pair + c, k);
        p.sums[4 * j + c] += a[0][k] * b;
        p.sums[4 * j + 2 + c] += a[1][k] * b;
      }
    }
  }
}

}  // namespace emu

namespace dsmoe {

using TensorMap = emu::TensorMap;

inline bool make_tensor_map(TensorMap* map, const void* base, int64_t rows, int64_t columns, int box_rows,
                            int box_columns) {
  *map = {static_cast<const __nv_bfloat16*>(base), rows, columns, box_rows, box_columns};
  return true;
}
inline bool has_wgmma() { return true; }

inline void mbarrier_init(uint64_t* b, int arrivals) {
  *reinterpret_cast<emu::MBarrier*>(b) = {0, static_cast<int16_t>(arrivals), static_cast<uint16_t>(arrivals), 0};
}
inline void mbarrier_init_done() {}
inline void mbarrier_arrive(uint64_t* b) {
  emu::MBarrier* m = reinterpret_cast<emu::MBarrier*>(b);
  if (--m->arrivals_due < 0) emu::stop("more arrivals at an mbarrier than it expects");
  emu::complete_phase_if_due(m);
}
inline void mbarrier_arrive_expect(uint64_t* b, int bytes) {
  reinterpret_cast<emu::MBarrier*>(b)->bytes_due += bytes;
  mbarrier_arrive(b);
}
inline void mbarrier_wait(uint64_t* b, int parity) {
  emu::MBarrier* m = reinterpret_cast<emu::MBarrier*>(b);
  auto& copies = emu::copies_under_way;
  while (m->phase == (parity & 1)) {  // one copy at a time: a phase that completes too early leaves the rest under way
    size_t i = 0;
    while (i < copies.size() && copies[i].barrier != b) i++;
    if (i == copies.size()) {
      emu::wait_a_turn("mbarrier_wait");
      continue;
    }
    const emu::TensorCopy copy = copies[i];
    copies.erase(copies.begin() + static_cast<long>(i));
    emu::land(copy);
  }
}
inline void tensor_copy(void* target, const TensorMap* map, uint64_t* barrier, int column, int row) {
  memset(target, emu::kPoison, static_cast<size_t>(map->box_rows) * map->box_columns * 2);
  emu::copies_under_way.push_back({static_cast<char*>(target), *map, barrier, column, row});
}
inline uint64_t tile_descriptor(const void* tile) {
  const auto offset = static_cast<uint32_t>(static_cast<const char*>(tile) - emu::dynamic_shared());
  return (offset & 0x3ffff) >> 4 | uint64_t{1} << 16 | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
}
inline void wgmma_fence() {}
inline void wgmma_commit() { emu::my_products().group++; }
template <int kLeft>
void wgmma_wait() {
  emu::moved();
  emu::give_way();  // whoever may overwrite the tiles does so before the products read them
  emu::ProductQueue& q = emu::my_products();
  size_t kept = 0;
  for (const emu::MatrixProduct& p : q.products) {
    if (p.group < q.group - kLeft) emu::multiply(p);
    else q.products[kept++] = p;
  }
  q.products.resize(kept);
}
inline void wgmma_64x128x16(float (&sums)[64], uint64_t a, uint64_t b) {
  emu::my_products().products.push_back({sums, a, b, emu::my_products().group});
  emu::moved();
  emu::give_way();  // the others go on meanwhile
}
template <int kCount>
void registers_more() {}
template <int kCount>
void registers_fewer() {}

}  // namespace dsmoe
