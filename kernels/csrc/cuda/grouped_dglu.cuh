// The backward of the experts' second product with that of SwiGLU and the gate in its epilogue, for Hopper.
//
// A block's tile is 128 rows x 256 hidden columns of da = dy w2. The product's depth is D, along the rows of w2 [D, F]:
// wgmma takes such an operand as it lies (upright), so no transposed copy of the weights is made. da stays in
// registers.
#pragma once
#include "activation.cuh"
#include "grouped_tiles.cuh"

namespace dsmoe {

constexpr int kDgluColumns = 256, kBoxColumns = 64;
static_assert(kDgluColumns * kTileDepth * 2 == kWeightBytes);

struct DgluMaps {
  TensorMap rows, w2;
};
struct DgluPart {
  const bf16 *h, *up;
  const float* gate;    // may be null
  bf16 *dh, *dup, *a;   // a may be null
  float* gate_partial;  // may be null; [column tiles, rows]
  int64_t rows;
  int hidden;
};

// Half of a row's columns in this thread; adds <da, act> to dot.
__device__ __forceinline__ void write_dglu_half(const DgluPart& part, int r, int column, float gate, int half,
                                                const float (&da)[64], float& dot) {
  const int64_t at = static_cast<int64_t>(r) * part.hidden + column;
#pragma unroll
  for (int j = 0; j < 16; j++) {
    if (column + 8 * j >= part.hidden) continue;
    const float2 h = unpack2<bf16>(*reinterpret_cast<const unsigned*>(part.h + at + 8 * j));
    const float2 up = unpack2<bf16>(*reinterpret_cast<const unsigned*>(part.up + at + 8 * j));
    const Activated act0 = activate<bf16, DSMOE_SWIGLU>(h.x, up.x), act1 = activate<bf16, DSMOE_SWIGLU>(h.y, up.y);
    const float da0 = da[4 * j + 2 * half], da1 = da[4 * j + 2 * half + 1];
    dot = fmaf(da1, act1.value, fmaf(da0, act0.value, dot));
    const float d0 = gate * da0, d1 = gate * da1;
    *reinterpret_cast<unsigned*>(part.dh + at + 8 * j) = pack2<bf16>(d0 * act0.d_first, d1 * act1.d_first);
    *reinterpret_cast<unsigned*>(part.dup + at + 8 * j) = pack2<bf16>(d0 * act0.d_second, d1 * act1.d_second);
    if (part.a) *reinterpret_cast<unsigned*>(part.a + at + 8 * j) = pack2<bf16>(gate * act0.value, gate * act1.value);
  }
}

// The four lanes of a row add their dots; the sum over column tiles is another kernel's, for a fixed order.
__device__ __forceinline__ void write_dglu(const DgluPart& part, int row, int end, int column, int column_tile,
                                           const float (&left)[64], const float (&right)[64]) {
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int r = row + 8 * half;
    float dot = 0.f;
    if (r < end) {
      const float gate = part.gate ? part.gate[r] : 1.f;
      write_dglu_half(part, r, column, gate, half, left, dot);
      write_dglu_half(part, r, column + kDgluColumns / 2, gate, half, right, dot);
    }
    dot += __shfl_xor_sync(kAllLanes, dot, 1);
    dot += __shfl_xor_sync(kAllLanes, dot, 2);
    if (part.gate_partial && r < end && threadIdx.x % 4 == 0) part.gate_partial[column_tile * part.rows + r] = dot;
  }
}

__global__ void __launch_bounds__(kRingThreads, 1)
    grouped_dglu(const __grid_constant__ DgluMaps routed_maps, const __grid_constant__ DgluMaps shared_maps,
                 TileList list, RowOrder from, int dim, const __grid_constant__ DgluPart routed,
                 const __grid_constant__ DgluPart shared) {
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  DSMOE_DYNAMIC_SHARED(unsigned char, tiles);
  DSMOE_SHARED(uint64_t, full, [kRingStages]);
  DSMOE_SHARED(uint64_t, empty, [kRingStages]);
  const Tile tile(blockIdx.x, list);
  if (tile.none) return;
  const Ring ring{tiles, full, empty};
  const bool gathers = from.order && !tile.shared;
  const int column = tile.column_tile * kDgluColumns;
  make_ring(ring, gathers);
  if (threadIdx.x < kProducers) {
    registers_fewer<56>();
    const DgluMaps* maps = tile.shared ? &shared_maps : &routed_maps;
    const auto copy_weights = [&](int depth, unsigned char* target, uint64_t* barrier) {
      for (int box = 0; box < kDgluColumns / kBoxColumns; box++)
        tensor_copy(target + box * kTileDepth * kRowBytes, &maps->w2, barrier, column + box * kBoxColumns, depth,
                    tile.expert);
    };
    if (gathers) fill_gathered(ring, from, tile.first, tile.end, dim, copy_weights);
    else if (threadIdx.x == 0) fill_in_order(ring, &maps->rows, tile.first, dim, copy_weights);
  } else {
    registers_more<224>();
    float left[64] = {}, right[64] = {};
    multiply_ring<true>(ring, threadIdx.x / 128 - 1, dim, gathers, left, right);
    const Fragment place;
    write_dglu(tile.shared ? shared : routed, tile.first + place.row, tile.end, column + place.column,
               tile.column_tile, left, right);
  }
#endif
}

constexpr int kGateThreads = 256;

// partial [tiles, rows] -> dgate [rows], a thread for each row up to the last expert's end.
__global__ void __launch_bounds__(kGateThreads)
    add_gate_partials(const float* __restrict__ partial, const int32_t* __restrict__ ends, int experts, int64_t rows,
                      int tiles, float* __restrict__ dgate) {
  const int64_t r = static_cast<int64_t>(blockIdx.x) * kGateThreads + threadIdx.x;
  if (r >= ends[experts - 1]) return;
  float sum = 0.f;
  for (int t = 0; t < tiles; t++) sum += partial[t * rows + r];
  dgate[r] = sum;
}

}  // namespace dsmoe
