// Launcher of grouped_glu.
#include "grouped_glu.cuh"

using namespace dsmoe;

extern "C" int DSMOE_SYM(dsmoe_has_wgmma)() { return has_wgmma(); }

extern "C" int DSMOE_SYM(dsmoe_grouped_glu)(int dtype, int64_t N, int64_t D, int64_t F, int E, int k, const void* x,
                                            const int64_t* order, const void* w_gate, const void* w_up,
                                            const int32_t* ends, const float* gate, void* a, void* h, void* up,
                                            int64_t shared_F, const void* shared_gate, const void* shared_up,
                                            void* shared_a, void* shared_h, void* shared_up_out, void* stream) {
  if (!grouped_covered(dtype, N, D, F, E, k, order, shared_F)) return DSMOE_NOT_COVERED;
  if (!vector_access(D, D, x, w_gate, w_up, shared_gate, shared_up) || !vector_access(F, F, a, h, up) ||
      !vector_access(shared_F, shared_F, shared_a, shared_h, shared_up_out))
    return DSMOE_NOT_COVERED;
  if (N == 0) return 0;
  TileList list;
  const unsigned tiles = make_tile_list(&list, ends, E, N * k, F, N, shared_F, kGluColumns);
  if (tiles == 0) return DSMOE_NOT_COVERED;
  GluMaps routed, shared;
  const bool made = make_tensor_map(&routed.rows, x, 1, N, D, kTileRows, kTileDepth) &&
                    make_tensor_map(&routed.w_gate, w_gate, E, F, D, kGluColumns, kTileDepth) &&
                    make_tensor_map(&routed.w_up, w_up, E, F, D, kGluColumns, kTileDepth);
  shared = routed;
  if (!made || (shared_F && (!make_tensor_map(&shared.w_gate, shared_gate, 1, shared_F, D, kGluColumns, kTileDepth) ||
                             !make_tensor_map(&shared.w_up, shared_up, 1, shared_F, D, kGluColumns, kTileDepth))))
    return DSMOE_NOT_COVERED;
  cudaFuncSetAttribute(grouped_glu, cudaFuncAttributeMaxDynamicSharedMemorySize, kRingBytes);
  const RowOrder from{static_cast<const bf16*>(x), order, k};
  const GluOutputs out{gate, static_cast<bf16*>(a), static_cast<bf16*>(h), static_cast<bf16*>(up),
                       static_cast<int>(F)};
  const GluOutputs shared_out{nullptr, static_cast<bf16*>(shared_a), static_cast<bf16*>(shared_h),
                              static_cast<bf16*>(shared_up_out), static_cast<int>(shared_F)};
  DSMOE_LAUNCH(grouped_glu, dim3(tiles), dim3(kRingThreads), kRingBytes, stream, routed, shared, list, from,
               static_cast<int>(D), out, shared_out);
  return launch_status();
}
