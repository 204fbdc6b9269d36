// Launchers of gather_rows, sum_rows and their backward.
#include "launch.cuh"
#include "partials.cuh"
#include "rows.cuh"

namespace dsmoe {
namespace {

bool covered(int64_t tokens, int64_t dim, int k, int64_t images) {
  return is_count(tokens) && is_count(dim) && (k == 1 || k == 2 || k == 4) && is_count(tokens * k) && images >= 1 &&
         tokens % images == 0;
}
template <class F>
int by_choices(int k, F&& f) {
  return k == 1 ? f(Number<1>{}) : k == 2 ? f(Number<2>{}) : f(Number<4>{});
}
int64_t sum_chunks(int64_t tokens, int64_t images) { return ceil_div(tokens / images, kSumChunk); }
bool known_dtypes(int dtype, int other) {
  return dtype >= DSMOE_FLOAT32 && dtype <= DSMOE_FLOAT16 && (other == dtype || other == DSMOE_FLOAT32);
}

}  // namespace
}  // namespace dsmoe

using namespace dsmoe;

extern "C" int DSMOE_SYM(dsmoe_gather_rows)(int dtype, int64_t N, int64_t D, int k, const void* x,
                                            const int64_t* order, void* rows, void* stream) {
  if (!covered(N, D, k, 1) || !known_dtypes(dtype, dtype)) return DSMOE_NOT_COVERED;
  if (N == 0 || D == 0) return 0;
  return by_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    return by_flag(vector_access(D, D, x, rows), [&](auto vector) {
      auto kernel = gather_rows<T, decltype(vector)::value>;
      DSMOE_LAUNCH(kernel, dim3(static_cast<unsigned>(ceil_div(N * k, kRowWarps))), dim3(kRowThreads), 0, stream,
                   static_cast<const T*>(x), order, N * k, static_cast<int>(D), k, static_cast<T*>(rows));
      return launch_status();
    });
  });
}

extern "C" int DSMOE_SYM(dsmoe_sum_rows)(int dtype, int out_dtype, int64_t N, int64_t D, int k, int64_t images,
                                         const void* rows, const int64_t* position, const float* gates,
                                         const void* add, const void* residual, const void* ada_gate,
                                         int64_t ada_stride, void* out, void* branch, void* stream) {
  if (!covered(N, D, k, images) || !known_dtypes(dtype, out_dtype)) return DSMOE_NOT_COVERED;
  if (N == 0 || D == 0) return 0;
  const bool aligned = vector_access(D, ada_gate ? ada_stride : D, rows, add, residual, ada_gate, out, branch);
  return by_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const SumRowsInputs<T> in{static_cast<const T*>(rows),     position,
                              gates,                           static_cast<const T*>(add),
                              static_cast<const T*>(residual), static_cast<const T*>(ada_gate),
                              ada_stride,                      N / images};
    return by_choices(k, [&](auto choices) {
      return by_flag(aligned, [&](auto vector) {
        return by_flag(out_dtype == dtype, [&](auto same) {
          using Out = std::conditional_t<decltype(same)::value, T, float>;
          auto kernel = sum_rows<T, Out, decltype(choices)::value, decltype(vector)::value>;
          DSMOE_LAUNCH(kernel, dim3(static_cast<unsigned>(ceil_div(N, kRowWarps))), dim3(kRowThreads), 0, stream, in, N,
                       static_cast<int>(D), static_cast<Out*>(out), static_cast<T*>(branch));
          return launch_status();
        });
      });
    });
  });
}

extern "C" int64_t DSMOE_SYM(dsmoe_sum_rows_backward_scratch_bytes)(int64_t N, int64_t D, int64_t images) {
  return images > 0 ? images * sum_chunks(N, images) * D * 4 : 0;
}

extern "C" int DSMOE_SYM(dsmoe_sum_rows_backward)(int dtype, int dout_dtype, int64_t N, int64_t D, int k,
                                                  int64_t images, const void* dout, const void* rows,
                                                  const int64_t* position, const float* gates, const void* branch,
                                                  const void* ada_gate, int64_t ada_stride, void* drows, float* dgates,
                                                  void* dbranch, void* dada_gate, void* scratch, void* stream) {
  if (!covered(N, D, k, images) || !known_dtypes(dtype, dout_dtype) || D > kMaxBlockWidth) return DSMOE_NOT_COVERED;
  const bool aligned =
      vector_access(D, ada_gate ? ada_stride : D, dout, rows, branch, ada_gate, drows, dbranch, scratch);
  const int chunks = static_cast<int>(sum_chunks(N, images));
  return by_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if (N > 0 && D > 0) {
      const int status = by_choices(k, [&](auto choices) {
        return by_flag(aligned, [&](auto vector) {
          return by_flag(dout_dtype == dtype, [&](auto same) {
            using Grad = std::conditional_t<decltype(same)::value, T, float>;
            SumRowsGradients<T, Grad> g{};
            g.dout = static_cast<const Grad*>(dout), g.rows = static_cast<const T*>(rows);
            g.position = position, g.gates = gates;
            g.branch = static_cast<const T*>(branch), g.ada_gate = static_cast<const T*>(ada_gate);
            g.ada_stride = ada_stride, g.tokens_per_image = N / images;
            g.drows = static_cast<T*>(drows), g.dgates = dgates, g.dbranch = static_cast<T*>(dbranch);
            g.ada_partial = dada_gate ? static_cast<float*>(scratch) : nullptr;
            auto kernel = sum_rows_backward<T, Grad, decltype(choices)::value, decltype(vector)::value>;
            DSMOE_LAUNCH(kernel, dim3(static_cast<unsigned>(images * chunks)), dim3(threads_for_width(D)), 0, stream, g,
                         static_cast<int>(D), chunks);
            return launch_status();
          });
        });
      });
      if (status) return status;
    }
    if (!dada_gate || D == 0) return 0;
    const int dim = static_cast<int>(D);
    DSMOE_LAUNCH(add_partials<T>, dim3(static_cast<unsigned>(images) * partial_blocks(1, dim)), dim3(kPartialThreads),
                 0, stream, static_cast<const float*>(scratch), chunks, 1, dim, static_cast<T*>(dada_gate),
                 static_cast<T*>(nullptr));
    return launch_status();
  });
}
