// Launcher of grouped_dglu.
#include "grouped_dglu.cuh"

using namespace dsmoe;

extern "C" int64_t DSMOE_SYM(dsmoe_grouped_dglu_scratch_bytes)(int64_t R, int64_t F) {
  return ceil_div(F, kDgluColumns) * R * 4;
}

extern "C" int DSMOE_SYM(dsmoe_grouped_dglu)(int dtype, int64_t N, int64_t D, int64_t F, int E, int k, const void* dy,
                                             const int64_t* order, const void* w2, const int32_t* ends, const void* h,
                                             const void* up, const float* gate, void* dh, void* dup, void* a,
                                             float* dgate, int64_t shared_F, const void* shared_w2,
                                             const void* shared_h, const void* shared_up, void* shared_dh,
                                             void* shared_dup, void* shared_a, void* scratch, void* stream) {
  if (!grouped_covered(dtype, N, D, F, E, k, order, shared_F)) return DSMOE_NOT_COVERED;
  if (!vector_access(D, D, dy) || !vector_access(F, F, w2, h, up, dh, dup, a) ||
      !vector_access(shared_F, shared_F, shared_w2, shared_h, shared_up, shared_dh, shared_dup, shared_a))
    return DSMOE_NOT_COVERED;
  if (N == 0) return 0;
  TileList list;
  const int64_t rows = N * k;
  const unsigned tiles = make_tile_list(&list, ends, E, rows, F, N, shared_F, kDgluColumns);
  if (tiles == 0) return DSMOE_NOT_COVERED;
  DgluMaps routed, shared;
  const bool made = make_tensor_map(&routed.rows, dy, 1, N, D, kTileRows, kTileDepth) &&
                    make_tensor_map(&routed.w2, w2, E, D, F, kTileDepth, kBoxColumns);
  shared = routed;
  if (!made || (shared_F && !make_tensor_map(&shared.w2, shared_w2, 1, D, shared_F, kTileDepth, kBoxColumns)))
    return DSMOE_NOT_COVERED;
  cudaFuncSetAttribute(grouped_dglu, cudaFuncAttributeMaxDynamicSharedMemorySize, kRingBytes);
  const RowOrder from{static_cast<const bf16*>(dy), order, k};
  float* partial = dgate ? static_cast<float*>(scratch) : nullptr;
  const DgluPart part{static_cast<const bf16*>(h), static_cast<const bf16*>(up), gate, static_cast<bf16*>(dh),
                      static_cast<bf16*>(dup), static_cast<bf16*>(a), partial, rows, static_cast<int>(F)};
  const DgluPart shared_part{static_cast<const bf16*>(shared_h), static_cast<const bf16*>(shared_up), nullptr,
                             static_cast<bf16*>(shared_dh), static_cast<bf16*>(shared_dup),
                             static_cast<bf16*>(shared_a), nullptr, N, static_cast<int>(shared_F)};
  DSMOE_LAUNCH(grouped_dglu, dim3(tiles), dim3(kRingThreads), kRingBytes, stream, routed, shared, list, from,
               static_cast<int>(D), part, shared_part);
  if (dgate) {
    DSMOE_LAUNCH(add_gate_partials, dim3(static_cast<unsigned>(ceil_div(rows, kGateThreads))), dim3(kGateThreads), 0,
                 stream, partial, ends, E, rows, static_cast<int>(ceil_div(F, kDgluColumns)), dgate);
  }
  return launch_status();
}
