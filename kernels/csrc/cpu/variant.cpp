// Compiled once per instruction set: DSMOE_ISA names it, the compiler's -m options set it.
#include "kernels.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <type_traits>
#include <vector>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define DSMOE_JOIN_(a, b) a##b
#define DSMOE_JOIN(a, b) DSMOE_JOIN_(a, b)
#define DSMOE_TEXT_(a) #a
#define DSMOE_TEXT(a) DSMOE_TEXT_(a)

namespace dsmoe {
namespace DSMOE_ISA {
#include "vector.h"

#include "activation.h"
#include "modulation.h"
#include "products.h"
#include "route.h"
#include "rows.h"

#include "glu.h"
}  // namespace DSMOE_ISA

const Kernels DSMOE_JOIN(kernels_, DSMOE_ISA) = {
    DSMOE_TEXT(DSMOE_ISA),   DSMOE_ISA::route,    DSMOE_ISA::place,        DSMOE_ISA::route_backward,
    DSMOE_ISA::gather,       DSMOE_ISA::sum,      DSMOE_ISA::sum_backward, DSMOE_ISA::act,
    DSMOE_ISA::act_backward, DSMOE_ISA::kLanes,   DSMOE_ISA::glu,          DSMOE_ISA::glu_rows,
    DSMOE_ISA::glu_weights,  DSMOE_ISA::modulate, DSMOE_ISA::modulate_backward,
};
}  // namespace dsmoe
