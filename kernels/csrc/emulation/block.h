// One emulated thread block: its threads (fibers), barriers, shared memory and the order in which threads take turns.
//
// A thread runs until it waits (barrier, shuffle, mbarrier); then the next in the block's order goes on. So a missing
// barrier shows as a wrong result under some order, and a barrier that can never be complete as a deadlock, which is
// reported with the place where each thread stands.
#pragma once
#include <cstring>
#include <memory>
#include <vector>

#include "fiber.h"

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};

namespace emu {

constexpr int kWarpSize = 32;
constexpr int kPoison = 0xFF;  // unwritten shared memory reads as NaN, or -1
constexpr int kCanary = 0x5A;
constexpr size_t kCanaryBytes = EMU_ADDRESS_SANITIZER ? 0 : 64;

struct Thread {
  Fiber fiber;
  uint3 index;
  int linear, lane, warp;
  bool finished;
  const char* where;  // what it waits for, for the deadlock report
};

struct Barrier {
  unsigned arrived = 0, generation = 0;
  const char* operation = nullptr;
};

struct Warp {
  Barrier full;                          // all 32 lanes
  Barrier partial[kWarpSize][2];         // other masks, by lowest lane: before and after the slots are read
  uint64_t full_slot[2][kWarpSize];      // by parity of full.generation, so that one rendezvous is enough
  uint64_t partial_slot[kWarpSize];
  unsigned live = 0;                     // lanes that have not left the kernel
};

// Shared memory of exactly the declared size: the address sanitizer sees an overrun at once, else the canary at the end
// of the block.
struct SharedMemory {
  std::unique_ptr<char, void (*)(void*)> bytes{nullptr, free};
  size_t size = 0;
  int id = 0;

  void allocate(size_t wanted) {
    if (!bytes || size != wanted) {
      bytes.reset(static_cast<char*>(aligned_alloc_exact(1024, wanted + kCanaryBytes)));
      size = wanted;
    }
    memset(bytes.get(), kPoison, size);
    memset(bytes.get() + size, kCanary, kCanaryBytes);
  }
  bool intact() const {
    for (size_t i = 0; i < kCanaryBytes; i++)
      if (bytes.get()[size + i] != kCanary) return false;
    return true;
  }
  static void* aligned_alloc_exact(size_t alignment, size_t n) {
    void* p = nullptr;
    if (posix_memalign(&p, alignment, n ? n : 1)) abort();
    return p;
  }
};

struct Block {
  std::vector<Thread> threads;
  std::vector<int> order;
  std::vector<Warp> warps;
  std::vector<SharedMemory> static_memory;
  SharedMemory dynamic_memory;
  Barrier barrier;
  Fiber host;
  void (*body)(const void*) = nullptr;
  const void* arguments = nullptr;
  int size = 0, live = 0, turn = 0;
  bool warp_ahead = false;   // a warp goes on while any of its lanes can
  unsigned stalled = 0;      // turns since anything last moved
  unsigned warp_turns = 0;   // the same within the warp whose turn it is
};

inline thread_local Block* block = nullptr;
inline thread_local Thread* thread = nullptr;
inline thread_local dim3 grid_size, block_size;
inline thread_local uint3 block_index;

[[noreturn]] inline void stop(const char* why) {
  fprintf(stderr, "cuda emulation: %s in block (%u,%u,%u)", why, block_index.x, block_index.y, block_index.z);
  if (thread) fprintf(stderr, ", thread %d (warp %d lane %d)", thread->linear, thread->warp, thread->lane);
  fprintf(stderr, "\n");
  fflush(stderr);
  abort();
}

[[noreturn]] inline void report_deadlock() {
  fprintf(stderr, "cuda emulation: deadlock; threads that wait:\n");
  int shown = 0;
  for (const Thread& t : block->threads)
    if (&t < block->threads.data() + block->size && !t.finished && shown++ < 40)
      fprintf(stderr, "  thread %d (warp %d lane %d): %s\n", t.linear, t.warp, t.lane, t.where);
  stop("deadlock: threads wait for what never comes");
}

inline void moved() { block->stalled = block->warp_turns = 0; }

// The live thread whose turn is next: in the order of the block; or of the same warp, until none of it moves.
inline Thread* next_thread() {
  const Thread* me = thread;
  const unsigned lanes = block->warps[me->warp].live;
  if (block->warp_ahead && lanes && ++block->warp_turns <= static_cast<unsigned>(__builtin_popcount(lanes))) {
    int lane = me->lane;
    do lane = (lane + 1) % kWarpSize;
    while (!(lanes >> lane & 1));
    return &block->threads[me->warp * kWarpSize + lane];
  }
  block->warp_turns = 0;
  Thread* next;
  int tried = 0;
  do {
    if (++block->turn == block->size) block->turn = 0;
    next = &block->threads[block->order[block->turn]];
  } while (next->finished || (block->warp_ahead && next->warp == me->warp && ++tried < block->size));
  return next;
}

// Hands over to the next live thread of the block, or to the launcher when none is left.
inline void give_way() {
  Thread* me = thread;
  if (block->live == 0) {
    thread = nullptr;
    switch_fiber(me->fiber, block->host);
    return;
  }
  Thread* next = next_thread();
  if (next == me) return;
  thread = next;
  switch_fiber(me->fiber, next->fiber);
}

// One turn of waiting. After every live thread has had turns in which nothing moved, nothing ever will.
inline void wait_a_turn(const char* what) {
  thread->where = what;
  if (++block->stalled > 4u * block->live + 8) report_deadlock();
  give_way();
}

inline void complete(Barrier& b) {
  b.arrived = 0;
  b.generation++;
  moved();
}

// Waits until `needed` threads have arrived. All must be there for the same operation.
inline void rendezvous(Barrier& b, unsigned needed, const char* operation) {
  if (b.arrived && b.operation != operation && strcmp(b.operation, operation)) {
    fprintf(stderr, "cuda emulation: %s meets %s\n", operation, b.operation);
    stop("threads of one barrier are at different operations");
  }
  b.operation = operation;
  const unsigned generation = b.generation;
  moved();
  if (++b.arrived == needed) return complete(b);
  while (b.generation == generation) wait_a_turn(operation);
}

inline void thread_main() {
  arrived_on_new_stack(block->host);
  block->body(block->arguments);
  thread->finished = true;
  block->live--;
  block->warps[thread->warp].live &= ~(1u << thread->lane);
  moved();
  // As on the device, __syncthreads waits for the threads that have not left.
  if (block->live && block->barrier.arrived == static_cast<unsigned>(block->live)) complete(block->barrier);
  give_way();
  abort();
}

inline uint64_t next_random(uint64_t& state) {
  state ^= state << 13;
  state ^= state >> 7;
  state ^= state << 17;
  return state;
}

// schedule 0 and 2: in order; 1: reversed; from 3 on: shuffled by that seed. In even ones from 2 on, one warp runs ahead
// of the others as far as it can (to the next barrier of the block); else threads take turns at every shuffle too.
inline void fill_order(std::vector<int>& order, int n, int schedule, uint64_t salt) {
  order.resize(n);
  for (int i = 0; i < n; i++) order[i] = schedule == 1 ? n - 1 - i : i;
  if (schedule < 3) return;
  uint64_t state = 0x9E3779B97F4A7C15ull * (schedule + 1 + salt * 7919u);
  for (int i = n - 1; i > 0; i--) std::swap(order[i], order[next_random(state) % (i + 1)]);
}

inline void start_threads(Block& b) {
  const int n = b.size;
  b.warps.assign((n + kWarpSize - 1) / kWarpSize, Warp{});
  while (static_cast<int>(b.threads.size()) < n) {
    b.threads.emplace_back();
    b.threads.back().fiber.stack = new_stack();
  }
  for (int i = 0; i < n; i++) {
    Thread& t = b.threads[i];
    t.finished = false;
    t.where = "start";
    t.linear = i, t.lane = i % kWarpSize, t.warp = i / kWarpSize;
    t.index = {i % block_size.x, i / block_size.x % block_size.y, i / (block_size.x * block_size.y)};
    b.warps[t.warp].live |= 1u << t.lane;
    prepare(t.fiber, thread_main, i);
  }
}

inline void run_block(Block& b, size_t dynamic_bytes, int schedule) {
  b.size = b.live = block_size.x * block_size.y * block_size.z;
  b.turn = 0;
  b.stalled = b.warp_turns = 0;
  b.barrier = {};
  fill_order(b.order, b.size, schedule, block_index.x);
  b.warp_ahead = schedule >= 2 && schedule % 2 == 0;
  b.dynamic_memory.allocate(dynamic_bytes);
  for (SharedMemory& m : b.static_memory) m.id = -1;
  start_threads(b);
  block = &b;
  thread = &b.threads[b.order[0]];
  switch_fiber(b.host, thread->fiber);
  if (!b.dynamic_memory.intact()) stop("a write past the end of dynamic shared memory");
  for (const SharedMemory& m : b.static_memory)
    if (m.id >= 0 && !m.intact()) stop("a write past the end of a shared array");
}

// The block's copy of the shared array declared at source place `id`; made, and poisoned, by the first thread.
inline void* static_shared(int id, size_t bytes) {
  SharedMemory* unused = nullptr;
  for (SharedMemory& m : block->static_memory) {
    if (m.id == id && m.size == bytes) return m.bytes.get();
    if (m.id < 0 && m.size == bytes) unused = &m;
  }
  if (!unused) {
    block->static_memory.reserve(64);
    block->static_memory.emplace_back();
    unused = &block->static_memory.back();
  }
  unused->allocate(bytes);
  unused->id = id;
  return unused->bytes.get();
}

inline char* dynamic_shared() { return block->dynamic_memory.bytes.get(); }

}  // namespace emu
