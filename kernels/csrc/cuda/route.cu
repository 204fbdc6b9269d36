// Launchers of routing: product and choice (one kernel), scan, ranking; and the backward.
#include "launch.cuh"
#include "route_backward.cuh"
#include "route_map.cuh"
#include "route_product.cuh"

namespace dsmoe {
namespace {

// Fits two devices' limits (163 KiB on sm_80, 227 KiB on sm_90) beside the static arrays.
constexpr int64_t kResidentBytes = 144 << 10;

struct RouteScratch {
  int *block_counts, *block_base;
  float* block_sums;
};
int64_t route_blocks(int64_t tokens) { return ceil_div(tokens, kRouteTokens); }
RouteScratch split_scratch(void* scratch, int64_t tokens, int experts) {
  const int64_t n = route_blocks(tokens) * experts;
  int* ints = static_cast<int*>(scratch);
  return {ints, ints + n, reinterpret_cast<float*>(ints + 2 * n)};
}

bool covered(int64_t tokens, int experts, int k) {
  return is_count(tokens) && experts >= 1 && experts <= kMaxExperts && (k == 1 || k == 2 || k == 4) && k <= experts &&
         is_count(tokens * k);
}

// f(Number<P>) with P the smallest power of two from 2 on that holds the experts.
template <class F>
int by_padded_experts(int experts, F&& f) {
  if (experts <= 2) return f(Number<2>{});
  if (experts <= 4) return f(Number<4>{});
  if (experts <= 8) return f(Number<8>{});
  if (experts <= 16) return f(Number<16>{});
  if (experts <= 32) return f(Number<32>{});
  return f(Number<64>{});
}

template <class T, int kPadded, bool kVector>
int launch_choice(const void* x, const void* weight, const float* bias, const RouteShape& shape,
                  const RouteOutputs& out, void* stream) {
  const T *x_ = static_cast<const T*>(x), *w_ = static_cast<const T*>(weight);
  const dim3 grid(shape.blocks), threads(kRouteThreads);
  if constexpr (kPadded <= 16) {
    const int64_t bytes = int64_t{kPadded} * resident_row_floats(shape.dim) * 4;
    if (bytes <= kResidentBytes) {
      auto kernel = route_resident<T, kPadded, kVector>;
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
      DSMOE_LAUNCH(kernel, grid, threads, bytes, stream, x_, w_, bias, shape, out);
      return launch_status();
    }
  }
  constexpr int kTiled = kPadded <= 32 ? 32 : 64;
  auto kernel = route_tiled<T, kTiled, kVector>;
  DSMOE_LAUNCH(kernel, grid, threads, 0, stream, x_, w_, bias, shape, out);
  return launch_status();
}

}  // namespace
}  // namespace dsmoe

using namespace dsmoe;

extern "C" int64_t DSMOE_SYM(dsmoe_route_scratch_bytes)(int64_t N, int E) { return route_blocks(N) * E * 12 + 16; }

extern "C" int DSMOE_SYM(dsmoe_route)(int dtype, int64_t N, int64_t D, int E, int k, int renormalize, const void* x,
                                      const void* weight, const float* bias, float* probs, float* gates,
                                      int64_t* indices, int64_t* counts, int32_t* ends, int64_t* order,
                                      int64_t* position, float* logsumexp, float* prob_sum, void* scratch,
                                      void* stream) {
  if (!covered(N, E, k) || !is_count(D) || D == 0) return DSMOE_NOT_COVERED;
  const RouteScratch own = split_scratch(scratch, N, E);
  const int blocks = static_cast<int>(route_blocks(N));
  const RouteShape shape{N, static_cast<int>(D), E, k, blocks, renormalize != 0};
  const RouteOutputs out{probs, gates, indices, logsumexp, own.block_counts, own.block_sums};
  int status = by_dtype(dtype, [](auto) { return 0; });
  if (status) return status;
  if (blocks > 0) {
    status = by_dtype(dtype, [&](auto type) {
      using T = typename decltype(type)::type;
      return by_flag(vector_access(D, D, x, weight), [&](auto vector) {
        return by_padded_experts(E, [&](auto padded) {
          constexpr int kPadded = decltype(padded)::value;
          return launch_choice<T, kPadded, decltype(vector)::value>(x, weight, bias, shape, out, stream);
        });
      });
    });
    if (status) return status;
  }
  DSMOE_LAUNCH(route_scan, dim3(E), dim3(kScanThreads), 0, stream, own.block_counts, own.block_sums, blocks,
               own.block_base, counts, prob_sum);
  // Without tokens one block still writes ends.
  const unsigned rank_blocks = blocks ? static_cast<unsigned>(ceil_div(blocks, kRouteWarps)) : 1;
  DSMOE_LAUNCH(route_rank, dim3(rank_blocks), dim3(kRouteWarps * kWarp), 0, stream, indices, own.block_base, counts,
               N * k, E, k, blocks, position, order, ends);
  return launch_status();
}

extern "C" int DSMOE_SYM(dsmoe_route_backward)(int64_t N, int E, int k, int renormalize, const float* probs,
                                               const float* gates, const int64_t* indices, const float* dprobs,
                                               const float* dgates, const float* dlogsumexp, const float* dprob_sum,
                                               float* dlogits, void* stream) {
  if (!covered(N, E, k)) return DSMOE_NOT_COVERED;
  if (N == 0) return 0;
  const RouteShape shape{N, 0, E, k, 0, renormalize != 0};
  const RouteGradients d{dprobs, dgates, dlogsumexp, dprob_sum};
  return by_padded_experts(E, [&](auto padded) {
    constexpr int kPadded = decltype(padded)::value;
    const dim3 grid(static_cast<unsigned>(ceil_div(N, kRouteWarps * Segments<kPadded>::tokens)));
    auto kernel = route_backward<kPadded>;
    DSMOE_LAUNCH(kernel, grid, dim3(kRouteWarps * kWarp), 0, stream, probs, gates, indices, d, shape, dlogits);
    return launch_status();
  });
}
