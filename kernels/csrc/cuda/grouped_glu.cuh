// The experts' first product with SwiGLU and the gate in its epilogue, for Hopper.
//
// A block computes 128 rows x 128 hidden columns of one expert: gate and up halves side by side, so that SwiGLU needs
// nothing from another block. Warpgroup 0 is the producer: one thread keeps a ring of tiles filled by TMA. Warpgroups 1
// and 2 multiply 64 rows each by wgmma and write a, and h and up where the backward needs them.
#pragma once
#include "activation.cuh"
#include "hopper.cuh"

namespace dsmoe {

constexpr int kGluRows = 128, kGluColumns = 128, kGluDepth = 64, kGluStages = 4, kGluThreads = 384;
constexpr int kGluTileBytes = 128 * kGluDepth * 2;       // 128 rows of 128 bytes: x, w_gate or w_up
constexpr int kGluStageBytes = 3 * kGluTileBytes;
constexpr int kGluSharedBytes = kGluStages * kGluStageBytes;
static_assert(kGluRows == 128 && kGluColumns == 128, "all three tiles have the same shape");

struct GluShape {
  int dim, hidden, experts;
};
struct GluOutputs {
  const float* gate;  // may be null
  bf16 *a, *h, *up;   // h and up may be null
};

// Tile `tile` of all experts' row tiles, counted on: its expert and rows [first, end).
struct RowTile {
  int expert, first, end;
  __device__ __forceinline__ RowTile(int tile, const int32_t* ends, int experts) : expert(0), first(0), end(0) {
    int start = 0;
    for (; expert < experts; expert++) {
      end = ends[expert];
      const int tiles = (end - start + kGluRows - 1) / kGluRows;
      if (tile < tiles) break;
      tile -= tiles;
      start = end;
    }
    first = start + tile * kGluRows;
  }
};

// The producer's loop: a stage is filled once both consumers have released it.
__device__ __forceinline__ void fill_ring(unsigned char* ring, uint64_t* full, uint64_t* empty, const TensorMap* x,
                                          const TensorMap* w_gate, const TensorMap* w_up, int row, int weight_row,
                                          int steps) {
  for (int k = 0; k < steps; k++) {
    const int stage = k % kGluStages, round = k / kGluStages;
    unsigned char* tiles = ring + stage * kGluStageBytes;
    mbarrier_wait(&empty[stage], (round & 1) ^ 1);
    mbarrier_arrive_expect(&full[stage], kGluStageBytes);
    tensor_copy(tiles, x, &full[stage], k * kGluDepth, row);
    tensor_copy(tiles + kGluTileBytes, w_gate, &full[stage], k * kGluDepth, weight_row);
    tensor_copy(tiles + 2 * kGluTileBytes, w_up, &full[stage], k * kGluDepth, weight_row);
  }
}

// A consumer's loop: 64 x 128 sums of both halves. The release of a stage waits until its products are done.
__device__ __forceinline__ void multiply_ring(unsigned char* ring, uint64_t* full, uint64_t* empty, int consumer,
                                              int steps, float (&h)[64], float (&up)[64]) {
  for (int k = 0; k < steps; k++) {
    const int stage = k % kGluStages, round = k / kGluStages;
    unsigned char* tiles = ring + stage * kGluStageBytes;
    mbarrier_wait(&full[stage], round & 1);
    wgmma_fence();
    const uint64_t x = tile_descriptor(tiles + consumer * 64 * 128);
    const uint64_t w_gate = tile_descriptor(tiles + kGluTileBytes);
    const uint64_t w_up = tile_descriptor(tiles + 2 * kGluTileBytes);
#pragma unroll
    for (int q = 0; q < kGluDepth / 16; q++) {  // 16 columns are 32 bytes, 2 in units of the descriptor
      wgmma_64x128x16(h, x + 2 * q, w_gate + 2 * q);
      wgmma_64x128x16(up, x + 2 * q, w_up + 2 * q);
    }
    wgmma_commit();
    wgmma_wait<0>();
    if (threadIdx.x % 128 == 0) mbarrier_arrive(&empty[stage]);
  }
}

// The fragment of a thread: rows `row` and `row + 8`, of every 8 columns the pair at 2 * (lane % 4).
__device__ __forceinline__ void write_glu(const GluOutputs& out, int row, int end, int column, int hidden,
                                          const float (&h)[64], const float (&up)[64]) {
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int r = row + 8 * half;
    if (r >= end) continue;
    const float gate = out.gate ? out.gate[r] : 1.f;
    const int64_t at = static_cast<int64_t>(r) * hidden + column;
#pragma unroll
    for (int j = 0; j < 16; j++) {
      if (column + 8 * j >= hidden) continue;
      const float h0 = h[4 * j + 2 * half], h1 = h[4 * j + 2 * half + 1];
      const float up0 = up[4 * j + 2 * half], up1 = up[4 * j + 2 * half + 1];
      const float a0 = gate * activate<bf16, DSMOE_SWIGLU>(h0, up0).value;
      const float a1 = gate * activate<bf16, DSMOE_SWIGLU>(h1, up1).value;
      *reinterpret_cast<unsigned*>(out.a + at + 8 * j) = pack2<bf16>(a0, a1);
      if (out.h) *reinterpret_cast<unsigned*>(out.h + at + 8 * j) = pack2<bf16>(h0, h1);
      if (out.up) *reinterpret_cast<unsigned*>(out.up + at + 8 * j) = pack2<bf16>(up0, up1);
    }
  }
}

// Grid (row tiles, column tiles); surplus row tiles, of which the host knows only a bound, leave at once.
__global__ void __launch_bounds__(kGluThreads, 1)
    grouped_glu(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap w_gate,
                const __grid_constant__ TensorMap w_up, const int32_t* __restrict__ ends, GluShape shape,
                GluOutputs out) {
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  DSMOE_DYNAMIC_SHARED(unsigned char, ring);
  DSMOE_SHARED(uint64_t, full, [kGluStages]);
  DSMOE_SHARED(uint64_t, empty, [kGluStages]);
  const RowTile tile(blockIdx.x, ends, shape.experts);
  if (tile.expert == shape.experts) return;
  const int column = blockIdx.y * kGluColumns, group = threadIdx.x / 128;
  const int steps = (shape.dim + kGluDepth - 1) / kGluDepth;
  if (threadIdx.x == 0) {
    for (int s = 0; s < kGluStages; s++) {
      mbarrier_init(&full[s], 1);
      mbarrier_init(&empty[s], 2);
    }
    mbarrier_init_done();
  }
  __syncthreads();
  if (group == 0) {
    registers_fewer<40>();
    if (threadIdx.x == 0)
      fill_ring(ring, full, empty, &x, &w_gate, &w_up, tile.first, tile.expert * shape.hidden + column, steps);
  } else {
    registers_more<232>();
    float h[64] = {}, up[64] = {};
    multiply_ring(ring, full, empty, group - 1, steps, h, up);
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp % 4;
    const int row = tile.first + (group - 1) * 64 + warp * 16 + lane / 4;
    write_glu(out, row, tile.end, column + lane % 4 * 2, shape.hidden, h, up);
  }
#endif
}

}  // namespace dsmoe
