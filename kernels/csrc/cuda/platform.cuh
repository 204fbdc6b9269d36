// What differs between nvcc and the host emulation, and nothing else.
#pragma once
#include <stdint.h>

#include <type_traits>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define DSMOE_SHARED(type, name, extent) __shared__ __align__(16) type name extent
#define DSMOE_DYNAMIC_SHARED(type, name)                      \
  extern __shared__ __align__(1024) unsigned char name##_[]; \
  type* const name = reinterpret_cast<type*>(name##_)
#define DSMOE_LAUNCH(kernel, grid, threads, dynamic_bytes, stream, ...) \
  kernel<<<grid, threads, dynamic_bytes, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#else
#include "../emulation/cuda_emulation.h"
#endif

#include "launchers.h"
