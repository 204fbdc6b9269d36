// The experts' first product with SwiGLU and the gate in its epilogue, for Hopper.
//
// A block's tile is 128 rows x 128 hidden columns, gate and up side by side, so that SwiGLU needs nothing from another
// block. The consumers write a, and h and up where the backward needs them.
#pragma once
#include "activation.cuh"
#include "grouped_tiles.cuh"

namespace dsmoe {

constexpr int kGluColumns = 128;

struct GluMaps {
  TensorMap rows, w_gate, w_up;
};
struct GluOutputs {
  const float* gate;  // may be null
  bf16 *a, *h, *up;   // h and up may be null
  int hidden;
};

__device__ __forceinline__ void write_glu(const GluOutputs& out, int row, int end, int column, const float (&h)[64],
                                          const float (&up)[64]) {
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int r = row + 8 * half;
    if (r >= end) continue;
    const float gate = out.gate ? out.gate[r] : 1.f;
    const int64_t at = static_cast<int64_t>(r) * out.hidden + column;
#pragma unroll
    for (int j = 0; j < 16; j++) {
      if (column + 8 * j >= out.hidden) continue;
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

__global__ void __launch_bounds__(kRingThreads, 1)
    grouped_glu(const __grid_constant__ GluMaps routed_maps, const __grid_constant__ GluMaps shared_maps,
                TileList list, RowOrder from, int dim, const __grid_constant__ GluOutputs routed,
                const __grid_constant__ GluOutputs shared) {
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  DSMOE_DYNAMIC_SHARED(unsigned char, tiles);
  DSMOE_SHARED(uint64_t, full, [kRingStages]);
  DSMOE_SHARED(uint64_t, empty, [kRingStages]);
  const Tile tile(blockIdx.x, list);
  if (tile.none) return;
  const Ring ring{tiles, full, empty};
  const bool gathers = from.order && !tile.shared;
  const int column = tile.column_tile * kGluColumns;
  make_ring(ring, gathers);
  if (threadIdx.x < kProducers) {
    registers_fewer<56>();
    const GluMaps* maps = tile.shared ? &shared_maps : &routed_maps;
    const auto copy_weights = [&](int depth, unsigned char* target, uint64_t* barrier) {
      tensor_copy(target, &maps->w_gate, barrier, depth, column, tile.expert);
      tensor_copy(target + kWeightBytes / 2, &maps->w_up, barrier, depth, column, tile.expert);
    };
    if (gathers) fill_gathered(ring, from, tile.first, tile.end, dim, copy_weights);
    else if (threadIdx.x == 0) fill_in_order(ring, &maps->rows, tile.first, dim, copy_weights);
  } else {
    registers_more<224>();
    float h[64] = {}, up[64] = {};
    multiply_ring<false>(ring, threadIdx.x / 128 - 1, dim, gathers, h, up);
    const Fragment place;
    write_glu(tile.shared ? shared : routed, tile.first + place.row, tile.end, column + place.column, h, up);
  }
#endif
}

}  // namespace dsmoe
