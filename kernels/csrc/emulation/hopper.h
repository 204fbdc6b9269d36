// Hopper's asynchronous machinery on the CPU: mbarriers, bulk tensor copies (TMA), a thread's 16-byte copies and wgmma.
//
// Asynchronous work lands as late as it may: a copy when somebody waits for its barrier, a wgmma when its thread waits
// for the group. Until then the target of a copy is poison. So a wait that is missing, or a buffer that is released too
// early, gives wrong numbers. A product that reads 16-byte copies without the fence between them stops the program.
// Layouts (128-byte swizzle, descriptors, fragments) follow the PTX manual.
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
  int64_t matrices, rows, columns;
  int box_rows, box_columns;
};
struct Copy16 {
  char* target;
  const void* source;  // null: zeros
};
// What is under way to one barrier: a box of a mapped matrix, or a thread's 16-byte copies and its arrival.
struct Transfer {
  uint64_t* barrier;
  char* target;
  TensorMap map;
  int column, row, matrix;
  std::vector<Copy16> copies;
  bool is_box;
};
struct MatrixProduct {
  float* sums;
  uint64_t a, b;
  int group;
  bool upright;
};
inline thread_local std::vector<Transfer> under_way;
// What a thread has issued, and the last landing of copies that its fence has seen.
struct ThreadQueues {
  std::vector<MatrixProduct> products;
  int group = 0;
  std::vector<Copy16> copies;
  uint32_t fenced = 0;
};
inline ThreadQueues& mine() {
  static thread_local std::vector<ThreadQueues> queues(kMaxThreads);
  return queues[thread->linear];
}
// The landing that wrote each 16 bytes of dynamic shared memory, 0 where a box or nothing did.
struct Landings {
  uint32_t last = 0;
  std::vector<uint32_t> at = std::vector<uint32_t>(kMaxDynamicShared / 16);
};
inline thread_local Landings landings;

// The 128-byte swizzle: 16-byte units of a row are permuted by the row number modulo 8.
inline uint32_t swizzle(uint32_t offset) { return offset ^ ((offset >> 7 & 7) << 4); }

inline void complete_phase_if_due(MBarrier* m) {
  if (m->arrivals_due != 0 || m->bytes_due != 0) return;
  m->phase ^= 1;
  m->arrivals_due = m->arrivals;
  moved();
}

inline void land_box(const Transfer& t, MBarrier* m) {
  const uint32_t start = static_cast<uint32_t>(t.target - dynamic_shared());
  for (int r = 0; r < t.map.box_rows; r++) {
    for (int i = 0; i < t.map.box_columns; i++) {
      const int64_t row = t.row + r, column = t.column + i;
      const bool inside = t.matrix < t.map.matrices && row < t.map.rows && column < t.map.columns;
      const int64_t at = (t.matrix * t.map.rows + row) * t.map.columns + column;
      const __nv_bfloat16 v = inside ? t.map.base[at] : __nv_bfloat16{0};
      const uint32_t place = swizzle(start + r * 128 + i * 2);
      memcpy(dynamic_shared() + place, &v, 2);
      landings.at[place / 16] = 0;
    }
  }
  m->bytes_due -= t.map.box_rows * t.map.box_columns * 2;
}

inline void land_copies(const Transfer& t, MBarrier* m) {
  landings.last++;
  for (const Copy16& c : t.copies) {
    if (c.source) memcpy(c.target, c.source, 16);
    else memset(c.target, 0, 16);
    landings.at[(c.target - dynamic_shared()) / 16] = landings.last;
  }
  if (--m->arrivals_due < 0) stop("more arrivals at an mbarrier than it expects");
}

inline void land(const Transfer& t) {
  MBarrier* m = reinterpret_cast<MBarrier*>(t.barrier);
  if (t.is_box) land_box(t, m);
  else land_copies(t, m);
  complete_phase_if_due(m);
}

// Where the element (row, k) of the tile that a descriptor names lies: rows of the product along the tile's rows, or
// (upright) along its columns.
inline uint32_t tile_offset(uint64_t descriptor, int row, int k, bool upright) {
  const uint32_t start = static_cast<uint32_t>(descriptor & 0x3fff) << 4;
  const uint32_t leading = static_cast<uint32_t>(descriptor >> 16 & 0x3fff) << 4;
  const uint32_t stride = static_cast<uint32_t>(descriptor >> 32 & 0x3fff) << 4;
  return swizzle(upright ? start + row / 64 * leading + k / 8 * stride + k % 8 * 128 + row % 64 * 2
                         : start + row / 8 * stride + row % 8 * 128 + k * 2);
}

// This thread's part of a 64 x 128 x 16 product.
inline void multiply(const MatrixProduct& p) {
  const int in_group = thread->linear % 128, row = in_group / 32 * 16 + in_group % 32 / 4, pair = in_group % 4;
  const uint32_t *landed = landings.at.data(), fenced = mine().fenced;
  const char* shared = dynamic_shared();
  const auto element = [&](uint32_t offset) {
    if (landed[offset / 16] > fenced) stop("a product reads 16-byte copies without a fence after they landed");
    __nv_bfloat16 v;
    memcpy(&v, shared + offset, 2);
    return __bfloat162float(v);
  };
  float a[2][16];
  for (int half = 0; half < 2; half++)
    for (int k = 0; k < 16; k++) a[half][k] = element(tile_offset(p.a, row + 8 * half, k, false));
  for (int j = 0; j < 16; j++) {
    for (int c = 0; c < 2; c++) {
      for (int k = 0; k < 16; k++) {
        const float b = element(tile_offset(p.b, j * 8 + 2 * pair + c, k, p.upright));
        p.sums[4 * j + c] += a[0][k] * b;
        p.sums[4 * j + 2 + c] += a[1][k] * b;
      }
    }
  }
}

}  // namespace emu

namespace dsmoe {

using TensorMap = emu::TensorMap;

inline bool make_tensor_map(TensorMap* map, const void* base, int64_t matrices, int64_t rows, int64_t columns,
                            int box_rows, int box_columns) {
  *map = {static_cast<const __nv_bfloat16*>(base), matrices, rows, columns, box_rows, box_columns};
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
  auto& transfers = emu::under_way;
  while (m->phase == (parity & 1)) {  // one at a time: a phase that completes too early leaves the rest under way
    size_t i = 0;
    while (i < transfers.size() && transfers[i].barrier != b) i++;
    if (i == transfers.size()) {
      emu::wait_a_turn("mbarrier_wait");
      continue;
    }
    const emu::Transfer next = std::move(transfers[i]);
    transfers.erase(transfers.begin() + static_cast<long>(i));
    emu::land(next);
  }
}
inline void tensor_copy(void* target, const TensorMap* map, uint64_t* barrier, int column, int row, int matrix) {
  memset(target, emu::kPoison, static_cast<size_t>(map->box_rows) * map->box_columns * 2);
  emu::under_way.push_back({barrier, static_cast<char*>(target), *map, column, row, matrix, {}, true});
}
inline void copy16(void* target, const void* source, bool valid) {
  if (reinterpret_cast<uintptr_t>(target) % 16 || reinterpret_cast<uintptr_t>(source) % 16)
    emu::stop("a 128-bit copy between unaligned addresses");
  memset(target, emu::kPoison, 16);
  emu::mine().copies.push_back({static_cast<char*>(target), valid ? source : nullptr});
}
inline void mbarrier_arrive_after_copies(uint64_t* b) {
  emu::under_way.push_back({b, nullptr, {}, 0, 0, 0, std::move(emu::mine().copies), false});
  emu::mine().copies.clear();
  emu::moved();
}
inline void fence_copies_before_wgmma() { emu::mine().fenced = emu::landings.last; }
inline uint64_t tile_descriptor(const void* tile) {
  const auto offset = static_cast<uint32_t>(static_cast<const char*>(tile) - emu::dynamic_shared());
  return (offset & 0x3ffff) >> 4 | uint64_t{1} << 16 | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
}
inline uint64_t upright_descriptor(const void* tile, int apart) {
  const auto offset = static_cast<uint32_t>(static_cast<const char*>(tile) - emu::dynamic_shared());
  return (offset & 0x3ffff) >> 4 | static_cast<uint64_t>(apart >> 4) << 16 | uint64_t{1024 >> 4} << 32 |
         uint64_t{1} << 62;
}
inline void wgmma_fence() {}
inline void wgmma_commit() { emu::mine().group++; }
template <int kLeft>
void wgmma_wait() {
  emu::moved();
  emu::give_way();  // whoever may overwrite the tiles does so before the products read them
  emu::ThreadQueues& q = emu::mine();
  size_t kept = 0;
  for (const emu::MatrixProduct& p : q.products) {
    if (p.group < q.group - kLeft) emu::multiply(p);
    else q.products[kept++] = p;
  }
  q.products.resize(kept);
  __syncwarp();  // .sync.aligned: the whole warp, and no more than that
}
template <bool kUpright>
void wgmma_64x128x16(float (&sums)[64], uint64_t a, uint64_t b) {
  emu::mine().products.push_back({sums, a, b, emu::mine().group, kUpright});
  emu::moved();
  emu::give_way();  // the others go on meanwhile
}
template <int kCount>
void registers_more() {}
template <int kCount>
void registers_fewer() {}

}  // namespace dsmoe
