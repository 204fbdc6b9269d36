// The best kernels for this processor. DSMOE_CPU=base|avx512|avx512bf16 takes another, for tests and measurements.
#include "kernels.h"

#include <cstdlib>
#include <cstring>
#include <initializer_list>

namespace dsmoe {

static const Kernels& best() {
#if defined(DSMOE_X86)
  const Kernels* found = &kernels_base;
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    found = &kernels_avx512;
    if (__builtin_cpu_supports("avx512bf16")) found = &kernels_avx512bf16;
  }
  if (const char* wanted = std::getenv("DSMOE_CPU"))
    for (const Kernels* k : {&kernels_base, &kernels_avx512, &kernels_avx512bf16}) {
      if (!std::strcmp(k->name, wanted)) return *k;
      if (k == found) break;  // beyond it are instructions that this processor does not have
    }
  return *found;
#else
  return kernels_base;
#endif
}

const Kernels& kernels() {
  static const Kernels& chosen = best();
  return chosen;
}

}  // namespace dsmoe
