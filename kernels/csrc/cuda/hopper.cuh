// Hopper's asynchronous machinery as functions: mbarriers, bulk tensor copies (TMA), wgmma. The host emulation has the
// same functions in ../emulation/hopper.h. Layouts are read from the PTX manual and have not run on a device.
#pragma once
#include "platform.cuh"

#if !defined(__CUDACC__)
#include "../emulation/hopper.h"
#else
#include <cuda.h>

namespace dsmoe {

using TensorMap = CUtensorMap;

// The driver's encoder is looked up through the runtime, so that nothing links against the driver. What a box holds
// beyond the matrix [rows, columns] of a stack of `matrices` reads as zero.
inline bool make_tensor_map(TensorMap* map, const void* base, int64_t matrices, int64_t rows, int64_t columns,
                            int box_rows, int box_columns) {
  using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                              const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                              CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
  void* found = nullptr;
  cudaDriverEntryPointQueryResult query;
  if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &query) !=
          cudaSuccess ||
      query != cudaDriverEntryPointSuccess)
    return false;
  const cuuint64_t sizes[3] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows),
                               static_cast<cuuint64_t>(matrices)};
  const cuuint64_t strides[2] = {sizes[0] * 2, sizes[0] * sizes[1] * 2};
  const cuuint32_t box[3] = {static_cast<cuuint32_t>(box_columns), static_cast<cuuint32_t>(box_rows), 1};
  const cuuint32_t steps[3] = {1, 1, 1};
  return reinterpret_cast<Encode>(found)(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3, const_cast<void*>(base), sizes,
                                         strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                                         CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                                         CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

// wgmma exists on compute capability 9.0 alone.
inline bool has_wgmma() {
  int device = 0, major = 0, minor = 0;
  return cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
         cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess && major == 9 &&
         minor == 0;
}

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
__device__ __forceinline__ void mbarrier_init(uint64_t* b, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(b)), "r"(arrivals) : "memory");
}
// After all mbarrier_init: makes them visible to the asynchronous unit.
__device__ __forceinline__ void mbarrier_init_done() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async;" ::: "memory");
}
__device__ __forceinline__ void mbarrier_arrive(uint64_t* b) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(b)) : "memory");
}
__device__ __forceinline__ void mbarrier_arrive_expect(uint64_t* b, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(b)), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void mbarrier_wait(uint64_t* b, int parity) {
  asm volatile(
      "{ .reg .pred done;\n"
      "WAIT_%=: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra WAIT_%=; }" ::"r"(shared_address(b)),
      "r"(parity)
      : "memory");
}
// A box of one mapped matrix from (row, column) to shared memory; its bytes count at the mbarrier.
__device__ __forceinline__ void tensor_copy(void* target, const TensorMap* map, uint64_t* barrier, int column, int row,
                                            int matrix) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::
          "r"(shared_address(target)),
      "l"(map), "r"(shared_address(barrier)), "r"(column), "r"(row), "r"(matrix)
      : "memory");
}

// 16 bytes to shared memory by this thread; zeros unless `valid` (source is then not read, but must be an address).
__device__ __forceinline__ void copy16(void* target, const void* source, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(target)), "l"(source),
               "r"(valid ? 16 : 0)
               : "memory");
}
// An arrival at the mbarrier, of those that it was made for, once all copy16 of this thread so far have landed.
__device__ __forceinline__ void mbarrier_arrive_after_copies(uint64_t* b) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(b)) : "memory");
}
// copy16 writes like a thread, wgmma reads like TMA: between the two, after the wait, a thread needs this.
__device__ __forceinline__ void fence_copies_before_wgmma() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// A K-major tile of 128-byte rows under the 128-byte swizzle: groups of 8 rows lie 1024 bytes apart.
__device__ __forceinline__ uint64_t tile_descriptor(const void* tile) {
  return (shared_address(tile) & 0x3ffff) >> 4 | uint64_t{1} << 16 | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
}
// A tile of which the product's depth runs along the rows (128 bytes, 64 columns) under the same swizzle: 8 rows lie
// 1024 bytes apart from the next 8, 64 columns `apart` bytes from the next 64.
__device__ __forceinline__ uint64_t upright_descriptor(const void* tile, int apart) {
  return (shared_address(tile) & 0x3ffff) >> 4 | static_cast<uint64_t>(apart >> 4) << 16 | uint64_t{1024 >> 4} << 32 |
         uint64_t{1} << 62;
}
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kLeft>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kLeft) : "memory");
}
// Each warpgroup takes or gives registers: consumers need many, the producer hardly any.
template <int kCount>
__device__ __forceinline__ void registers_more() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount>
__device__ __forceinline__ void registers_fewer() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}

#define DSMOE_SUMS8(i)                                                                                    \
  "+f"(sums[i]), "+f"(sums[i + 1]), "+f"(sums[i + 2]), "+f"(sums[i + 3]), "+f"(sums[i + 4]), "+f"(sums[i + 5]), \
      "+f"(sums[i + 6]), "+f"(sums[i + 7])
// sums[64 x 128 of the warpgroup] += a[64 x 16] b, bf16 into float. b: 128 x 16 by tile_descriptor, taken transposed;
// with kUpright 16 x 128 by upright_descriptor.
template <bool kUpright>
__device__ __forceinline__ void wgmma_64x128x16(float (&sums)[64], uint64_t a, uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
      "%64, %65, 1, 1, 1, 0, %66;"
      : DSMOE_SUMS8(0), DSMOE_SUMS8(8), DSMOE_SUMS8(16), DSMOE_SUMS8(24), DSMOE_SUMS8(32), DSMOE_SUMS8(40),
        DSMOE_SUMS8(48), DSMOE_SUMS8(56)
      : "l"(a), "l"(b), "n"(kUpright ? 1 : 0));
}
#undef DSMOE_SUMS8

}  // namespace dsmoe
#endif
