// Launcher of grouped_glu.
#include "grouped_glu.cuh"
#include "launch.cuh"

using namespace dsmoe;

extern "C" int DSMOE_SYM(dsmoe_grouped_glu)(int dtype, int64_t R, int64_t D, int64_t F, int E, const void* rows,
                                            const void* w_gate, const void* w_up, const int32_t* ends,
                                            const float* gate, void* a, void* h, void* up, void* stream) {
  if (dtype != DSMOE_BFLOAT16 || !is_count(R) || !is_count(D) || D == 0 || !is_count(F) || E < 1 ||
      !is_count(E * F) || ceil_div(F, kGluColumns) > 65535)
    return DSMOE_NOT_COVERED;
  if (!vector_access(D, D, rows, w_gate, w_up) || !vector_access(F, F, a, h, up) || !has_wgmma())
    return DSMOE_NOT_COVERED;
  if (R == 0 || F == 0) return 0;
  TensorMap x_map, gate_map, up_map;
  if (!make_tensor_map(&x_map, rows, R, D, kGluRows, kGluDepth) ||
      !make_tensor_map(&gate_map, w_gate, E * F, D, kGluColumns, kGluDepth) ||
      !make_tensor_map(&up_map, w_up, E * F, D, kGluColumns, kGluDepth))
    return DSMOE_NOT_COVERED;
  cudaFuncSetAttribute(grouped_glu, cudaFuncAttributeMaxDynamicSharedMemorySize, kGluSharedBytes);
  const GluShape shape{static_cast<int>(D), static_cast<int>(F), E};
  const GluOutputs out{gate, static_cast<bf16*>(a), static_cast<bf16*>(h), static_cast<bf16*>(up)};
  // Every expert may end within a tile: at most one tile more than full ones for each.
  const dim3 grid(static_cast<unsigned>(R / kGluRows + E), static_cast<unsigned>(ceil_div(F, kGluColumns)));
  DSMOE_LAUNCH(grouped_glu, grid, dim3(kGluThreads), kGluSharedBytes, stream, x_map, gate_map, up_map, ends, shape,
               out);
  return launch_status();
}
