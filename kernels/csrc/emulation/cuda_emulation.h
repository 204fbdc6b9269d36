// Compiles CUDA kernel source with g++ and runs it on the CPU; takes the place of cuda_runtime.h when nvcc is absent.
//
// A fiber per CUDA thread (fiber.h), barriers and shuffles as rendezvous (block.h, warp.h), one OS thread per block
// that runs. C++17, no dependency. Not modelled: time, the memory order between threads of a block beyond barriers, bank
// conflicts, register limits, cooperation between blocks.
#pragma once
#include <atomic>
#include <thread>
#include <vector>

#include "numbers.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __restrict__ __restrict
#define __align__(n) __attribute__((aligned(n)))
#define __grid_constant__

#define threadIdx (emu::thread->index)
#define blockIdx (emu::block_index)
#define blockDim (emu::block_size)
#define gridDim (emu::grid_size)

typedef void* cudaStream_t;
typedef int cudaError_t;
constexpr cudaError_t cudaSuccess = 0;
constexpr int cudaFuncAttributeMaxDynamicSharedMemorySize = 0;
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, int, int) {
  return cudaSuccess;
}

namespace emu {

struct Settings {
  int schedule = 0;    // order of the threads of a block, and of the blocks: see fill_order
  int os_threads = 1;  // blocks that run at the same time
};
inline Settings settings;

constexpr size_t kMaxDynamicShared = 227 << 10, kMaxThreads = 1024;

template <class Body>
void launch(dim3 grid, dim3 threads, size_t dynamic_bytes, const Body& body) {
  const size_t blocks = static_cast<size_t>(grid.x) * grid.y * grid.z;
  const size_t per_block = static_cast<size_t>(threads.x) * threads.y * threads.z;
  block_index = {0, 0, 0};
  if (!blocks || grid.y > 65535 || grid.z > 65535) stop("a grid that the device refuses");
  if (!per_block || per_block > kMaxThreads || per_block % kWarpSize) stop("a block size other than 32 to 1024 in 32s");
  if (dynamic_bytes > kMaxDynamicShared) stop("more dynamic shared memory than a block may have");
  std::vector<int> order;
  fill_order(order, static_cast<int>(blocks), settings.schedule, blocks);
  std::atomic<size_t> next{0};
  auto work = [&] {
    static thread_local Block mine;
    mine.body = [](const void* arguments) { (*static_cast<const Body*>(arguments))(); };
    mine.arguments = &body;
    grid_size = grid, block_size = threads;
    for (size_t i; (i = next++) < blocks;) {
      const size_t b = order[i];
      block_index = {static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
                     static_cast<unsigned>(b / (static_cast<size_t>(grid.x) * grid.y))};
      run_block(mine, dynamic_bytes, settings.schedule);
    }
  };
  std::vector<std::thread> helpers;
  for (size_t i = 1; i < std::min<size_t>(settings.os_threads, blocks); i++) helpers.emplace_back(work);
  work();
  for (std::thread& t : helpers) t.join();
}

}  // namespace emu

// A shared array: DSMOE_SHARED(float, name, [8][4]); fresh and poisoned in every block.
#define DSMOE_SHARED(type, name, extent) \
  auto& name = *static_cast<type(*) extent>(emu::static_shared(__COUNTER__, sizeof(type extent)))
#define DSMOE_DYNAMIC_SHARED(type, name) type* const name = reinterpret_cast<type*>(emu::dynamic_shared())
#define DSMOE_LAUNCH(kernel, grid, threads, dynamic_bytes, stream, ...) \
  ((void)(stream), emu::launch(grid, threads, dynamic_bytes, [=] { kernel(__VA_ARGS__); }))

extern "C" inline __attribute__((used, visibility("default"))) void dsmoe_emu_configure(int schedule, int os_threads) {
  emu::settings = {schedule, os_threads};
}
