// What the two grouped products share: which tile a block computes, and the ring through which its operands come.
//
// A block computes 128 rows of one expert. Warpgroup 0 is the producer: it keeps a ring of stages filled, each 64 deep:
// 128 rows of the left operand (16 KB) and the weights they meet (32 KB). Warpgroups 1 and 2 multiply 64 rows each by
// wgmma. Weights come by TMA, issued by one thread. Rows that lie in order come by TMA too; rows that must be gathered
// are copied by the 128 threads of the producer, 16 bytes at a time, because TMA on Hopper cannot gather.
#pragma once
#include "hopper.cuh"
#include "launch.cuh"
#include "reduce.cuh"

namespace dsmoe {

constexpr int kTileRows = 128, kTileDepth = 64, kRingStages = 4, kRingThreads = 384, kProducers = 128;
constexpr int kConsumerWarps = (kRingThreads - kProducers) / kWarp;
constexpr int kRowBytes = kTileDepth * 2;               // of a tile; what the swizzle works on
constexpr int kRowTileBytes = kTileRows * kRowBytes;    // rows of the left operand
constexpr int kWeightBytes = 2 * kRowTileBytes;         // weights of a stage, as two halves
constexpr int kStageBytes = kRowTileBytes + kWeightBytes;
constexpr int kRingBytes = kRingStages * kStageBytes;

// ---- which tile ----

// All tiles of a launch in one row: the shared expert's first, then the routed experts', row tile by row tile within a
// column tile. Of the routed row tiles the host knows only a bound, so blocks without work are the last ones.
struct TileList {
  const int32_t* ends;
  int experts, row_tiles;               // of the routed experts: full tiles and one more for each expert
  int tokens, shared_row_tiles, shared_tiles;
};

struct Tile {
  bool shared, none;
  int expert, first, end, column_tile;  // rows [first, end), of which the tile holds 128

  __device__ __forceinline__ Tile(unsigned index, const TileList& list)
      : shared(static_cast<int>(index) < list.shared_tiles), none(false), expert(0), first(0), end(0) {
    const int own = static_cast<int>(index) - (shared ? 0 : list.shared_tiles);
    const int row_tiles = shared ? list.shared_row_tiles : list.row_tiles;
    int tile = own % row_tiles;
    column_tile = own / row_tiles;
    if (shared) {
      end = list.tokens;
    } else {
      for (; expert < list.experts; expert++) {
        end = list.ends[expert];
        const int tiles = (end - first + kTileRows - 1) / kTileRows;
        if (tile < tiles) break;
        tile -= tiles;
        first = end;
      }
      none = expert == list.experts;
    }
    first += tile * kTileRows;
  }
};

inline bool grouped_covered(int dtype, int64_t tokens, int64_t dim, int64_t hidden, int experts, int k,
                            const int64_t* order, int64_t shared_hidden) {
  return dtype == DSMOE_BFLOAT16 && is_count(tokens) && k >= 1 && is_count(tokens * k) && experts >= 1 && dim > 0 &&
         is_count(experts * dim) && hidden > 0 && is_count(experts * hidden) && is_count(shared_hidden) &&
         (order || (k == 1 && shared_hidden == 0)) && has_wgmma();
}

// The list and its number of tiles, 0 when a grid cannot hold them. columns: of a tile; shared_hidden 0: no shared one.
inline unsigned make_tile_list(TileList* list, const int32_t* ends, int experts, int64_t rows, int64_t hidden,
                               int64_t tokens, int64_t shared_hidden, int columns) {
  const int64_t row_tiles = rows / kTileRows + experts, shared_row_tiles = ceil_div(tokens, kTileRows);
  const int64_t shared_tiles = shared_row_tiles * ceil_div(shared_hidden, columns);
  const int64_t tiles = shared_tiles + row_tiles * ceil_div(hidden, columns);
  if (tiles > kMaxRows) return 0;
  *list = {ends, experts, static_cast<int>(row_tiles), static_cast<int>(tokens), static_cast<int>(shared_row_tiles),
           static_cast<int>(shared_tiles)};
  return static_cast<unsigned>(tiles);
}

// ---- producer ----

// Where the left operand's rows are when they must be gathered: row r is row order[r] / k. order is null when they lie
// in order.
struct RowOrder {
  const bf16* rows;
  const int64_t* order;
  int k;
};

// A producer thread's part of the gathered tile: 16 bytes of every 16th row, 8 neighbouring threads a row.
struct GatheredRows {
  const bf16* source[8];
  unsigned valid = 0;  // by bit: rows past the end are zeros
  int column, target;

  __device__ __forceinline__ GatheredRows(const RowOrder& from, int first, int end, int dim)
      : column(threadIdx.x % 8 * 8) {
    const int top = threadIdx.x / 8;
    target = top * kRowBytes + (threadIdx.x % 8 ^ top % 8) * 16;  // the swizzle that TMA applies
#pragma unroll
    for (int i = 0; i < 8; i++) {
      const int r = first + top + 16 * i;
      if (r < end) valid |= 1u << i;
      const int row = r < end ? static_cast<int>(from.order[r]) / from.k : 0;
      source[i] = from.rows + static_cast<int64_t>(row) * dim + column;
    }
  }
  __device__ __forceinline__ void copy(unsigned char* tile, int depth, int dim) const {
    const bool inside = depth + column < dim;
#pragma unroll
    for (int i = 0; i < 8; i++)
      copy16(tile + target + i * 16 * kRowBytes, source[i] + depth, inside && (valid >> i & 1));
  }
};

struct Ring {
  unsigned char* tiles;
  uint64_t *full, *empty;

  __device__ __forceinline__ unsigned char* stage(int step) const { return tiles + step % kRingStages * kStageBytes; }
  __device__ __forceinline__ uint64_t* filled(int step) const { return full + step % kRingStages; }
  __device__ __forceinline__ uint64_t* released(int step) const { return empty + step % kRingStages; }
  __device__ __forceinline__ static int parity(int step) { return step / kRingStages & 1; }
};

__device__ __forceinline__ void make_ring(const Ring& ring, bool gathers) {
  if (threadIdx.x == 0) {
    for (int s = 0; s < kRingStages; s++) {
      mbarrier_init(&ring.full[s], gathers ? 1 + kProducers : 1);
      mbarrier_init(&ring.empty[s], kConsumerWarps);
    }
    mbarrier_init_done();
  }
  __syncthreads();
}

// By one thread. A stage is filled once every consumer warp has released it. copy_weights(depth, target, barrier).
template <class CopyWeights>
__device__ __forceinline__ void fill_in_order(const Ring& ring, const TensorMap* rows, int first, int dim,
                                              const CopyWeights& copy_weights) {
  for (int step = 0; step * kTileDepth < dim; step++) {
    mbarrier_wait(ring.released(step), Ring::parity(step) ^ 1);
    mbarrier_arrive_expect(ring.filled(step), kStageBytes);
    tensor_copy(ring.stage(step), rows, ring.filled(step), step * kTileDepth, first, 0);
    copy_weights(step * kTileDepth, ring.stage(step) + kRowTileBytes, ring.filled(step));
  }
}

// By all producers. A stage is full when the weights' bytes have come and every producer's copies have landed.
template <class CopyWeights>
__device__ __forceinline__ void fill_gathered(const Ring& ring, const RowOrder& from, int first, int end, int dim,
                                              const CopyWeights& copy_weights) {
  const GatheredRows rows(from, first, end, dim);
  int step = 0;
  for (; step * kTileDepth < dim; step++) {
    mbarrier_wait(ring.released(step), Ring::parity(step) ^ 1);
    if (threadIdx.x == 0) {
      mbarrier_arrive_expect(ring.filled(step), kWeightBytes);
      copy_weights(step * kTileDepth, ring.stage(step) + kRowTileBytes, ring.filled(step));
    }
    rows.copy(ring.stage(step), step * kTileDepth, dim);
    mbarrier_arrive_after_copies(ring.filled(step));
  }
  mbarrier_wait(ring.filled(step - 1), Ring::parity(step - 1));  // no thread leaves before its copies have landed
}

// ---- consumers ----

// 64 x 128 sums with each half of the weights. kUpright: the halves hold 64 depths x 128 columns, as two boxes of 64
// columns; else 128 columns x 64 depths. A warp releases a stage when its products are done
// (wgmma_wait speaks for the calling warp alone).
template <bool kUpright>
__device__ __forceinline__ void multiply_ring(const Ring& ring, int consumer, int dim, bool gathers, float (&left)[64],
                                              float (&right)[64]) {
  constexpr int kDepthStep = kUpright ? 16 * kRowBytes / 16 : 16 * 2 / 16;  // 16 depths, in the descriptor's 16 bytes
  for (int step = 0; step * kTileDepth < dim; step++) {
    unsigned char* tiles = ring.stage(step);
    mbarrier_wait(ring.filled(step), Ring::parity(step));
    if (gathers) fence_copies_before_wgmma();
    wgmma_fence();
    const uint64_t rows = tile_descriptor(tiles + consumer * 64 * kRowBytes);
    unsigned char *w_left = tiles + kRowTileBytes, *w_right = w_left + kWeightBytes / 2;
    const uint64_t l = kUpright ? upright_descriptor(w_left, kWeightBytes / 4) : tile_descriptor(w_left);
    const uint64_t r = kUpright ? upright_descriptor(w_right, kWeightBytes / 4) : tile_descriptor(w_right);
#pragma unroll
    for (int q = 0; q < kTileDepth / 16; q++) {
      wgmma_64x128x16<kUpright>(left, rows + 2 * q, l + kDepthStep * q);
      wgmma_64x128x16<kUpright>(right, rows + 2 * q, r + kDepthStep * q);
    }
    wgmma_commit();
    wgmma_wait<0>();
    if (threadIdx.x % kWarp == 0) mbarrier_arrive(ring.released(step));
  }
}

// The place of a thread's sums in its block's tile: rows `row` and `row + 8`, of every 8 columns the pair at `column`.
struct Fragment {
  int row, column;
  __device__ __forceinline__ Fragment() {
    const int lane = threadIdx.x % kWarp, consumer = threadIdx.x / 128 - 1, warp = threadIdx.x / kWarp % 4;
    row = consumer * 64 + warp * 16 + lane / 4;
    column = lane % 4 * 2;
  }
};

}  // namespace dsmoe
