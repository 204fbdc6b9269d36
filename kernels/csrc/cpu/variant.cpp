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

#define DSMOE_OWN(name) DSMOE_ISA::name
const Kernels DSMOE_JOIN(kernels_, DSMOE_ISA) = {
    DSMOE_TEXT(DSMOE_ISA),    DSMOE_OWN(route), DSMOE_OWN(place),        DSMOE_OWN(route_backward),
    DSMOE_OWN(gather),        DSMOE_OWN(sum),   DSMOE_OWN(sum_backward), DSMOE_OWN(act),
    DSMOE_OWN(act_backward),  DSMOE_OWN(kLanes), DSMOE_OWN(glu),          DSMOE_OWN(glu_rows),
    DSMOE_OWN(glu_weights),   DSMOE_OWN(modulate), DSMOE_OWN(modulate_backward),
};
}  // namespace dsmoe
