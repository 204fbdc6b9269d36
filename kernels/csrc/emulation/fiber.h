// Stack switching: every emulated CUDA thread runs on a stack of its own and hands over only where it would wait.
#pragma once
#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define EMU_ADDRESS_SANITIZER 1
#else
#define EMU_ADDRESS_SANITIZER 0
#endif

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emu {

struct Stack {
  char* bottom = nullptr;
  size_t bytes = 0;
};

// One stack and where it stopped. The launching OS thread has a Fiber too, without a stack of its own.
struct Fiber {
  Stack stack;
  const void* host_bottom = nullptr;  // address sanitizer: bounds of the OS thread's stack, told on the first switch
  size_t host_bytes = 0;
#if defined(__x86_64__)
  void* top = nullptr;
#else
  ucontext_t context;
#endif
};

constexpr size_t kStackBytes = EMU_ADDRESS_SANITIZER ? 256 << 10 : 80 << 10;

inline Stack new_stack() {
  void* p = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) {
    perror("cuda emulation: no memory for a stack");
    abort();
  }
  return {static_cast<char*>(p), kStackBytes};
}

#if defined(__x86_64__)
// Saves the callee-saved registers on the old stack and takes them from the new one: all that a call may not change.
// (ucontext does the same with two system calls for the signal mask: 6.6x slower.)
__attribute__((naked, noinline)) static void switch_stack([[maybe_unused]] void** save, [[maybe_unused]] void* load) {
  asm("pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15\n"
      "movq %rsp, (%rdi)\n"
      "movq %rsi, %rsp\n"
      "popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp\n"
      "ret");
}
#endif

// Makes the fiber start at `entry` (which must never return) on its next turn. `color` shifts the top of the stack:
// with all tops one power of two apart they would share a single set of the first-level cache.
inline void prepare(Fiber& fiber, void (*entry)(), unsigned color) {
#if EMU_ADDRESS_SANITIZER
  // The frames in which the last user of the stack handed over for good were never left.
  __asan_unpoison_memory_region(fiber.stack.bottom + fiber.stack.bytes - (32 << 10), 32 << 10);
#endif
#if defined(__x86_64__)
  void** top = reinterpret_cast<void**>(fiber.stack.bottom + fiber.stack.bytes - (color * 832u) % 16384u) - 1;
  *top = nullptr;  // the return address of `entry`; keeps its frame 16-byte aligned
  *--top = reinterpret_cast<void*>(entry);
  for (int saved_register = 0; saved_register < 6; saved_register++) *--top = nullptr;
  fiber.top = top;
#else
  (void)color;
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.bottom;
  fiber.context.uc_stack.ss_size = fiber.stack.bytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, entry, 0);
#endif
}

// To be called first thing on a new fiber.
inline void arrived_on_new_stack(Fiber& host) {
#if EMU_ADDRESS_SANITIZER
  const void* bottom;
  size_t bytes;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &bytes);
  if (!host.host_bottom) host.host_bottom = bottom, host.host_bytes = bytes;
#else
  (void)host;
#endif
}

inline void switch_fiber(Fiber& from, Fiber& to) {
#if EMU_ADDRESS_SANITIZER
  void* fake = nullptr;
  const bool to_host = to.stack.bottom == nullptr;
  __sanitizer_start_switch_fiber(&fake, to_host ? to.host_bottom : to.stack.bottom,
                                 to_host ? to.host_bytes : to.stack.bytes);
#endif
#if defined(__x86_64__)
  switch_stack(&from.top, to.top);
#else
  swapcontext(&from.context, &to.context);
#endif
#if EMU_ADDRESS_SANITIZER
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

}  // namespace emu
