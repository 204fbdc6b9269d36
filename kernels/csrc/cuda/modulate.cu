// Launchers of modulate and its backward.
#include "launch.cuh"
#include "modulate.cuh"
#include "partials.cuh"

namespace dsmoe {
namespace {

bool covered(int64_t images, int64_t tokens, int64_t dim) {
  return is_count(images) && is_count(tokens) && (tokens == 0 || images <= kMaxRows / tokens) && dim >= 1 &&
         dim <= kModulateMaxThreads * 8;
}
int modulate_chunks(int64_t tokens) { return static_cast<int>(ceil_div(tokens, kModulateChunk)); }

}  // namespace
}  // namespace dsmoe

using namespace dsmoe;

extern "C" int DSMOE_SYM(dsmoe_modulate)(int dtype, int64_t B, int64_t T, int64_t D, const void* x, const void* shift,
                                         const void* scale, int64_t mod_stride, void* y, float* mean, float* rstd,
                                         void* stream) {
  if (!covered(B, T, D)) return DSMOE_NOT_COVERED;
  return by_dtype(dtype, [&](auto type) {
    using E = typename decltype(type)::type;
    if (B == 0 || T == 0) return 0;
    return by_flag(vector_access(D, mod_stride, x, shift, scale, y), [&](auto vector) {
      auto kernel = modulate<E, decltype(vector)::value>;
      DSMOE_LAUNCH(kernel, dim3(static_cast<unsigned>(B * modulate_chunks(T))), dim3(threads_for_width(D)), 0, stream,
                   static_cast<const E*>(x), static_cast<const E*>(shift), static_cast<const E*>(scale), mod_stride, T,
                   modulate_chunks(T), static_cast<int>(D), static_cast<E*>(y), mean, rstd);
      return launch_status();
    });
  });
}

extern "C" int64_t DSMOE_SYM(dsmoe_modulate_backward_scratch_bytes)(int64_t B, int64_t T, int64_t D) {
  return B * modulate_chunks(T) * 2 * D * 4;
}

extern "C" int DSMOE_SYM(dsmoe_modulate_backward)(int dtype, int64_t B, int64_t T, int64_t D, const void* dy,
                                                  const void* x, const void* scale, int64_t mod_stride,
                                                  const float* mean, const float* rstd, void* dx, void* dshift,
                                                  void* dscale, void* scratch, void* stream) {
  if (!covered(B, T, D)) return DSMOE_NOT_COVERED;
  return by_dtype(dtype, [&](auto type) {
    using E = typename decltype(type)::type;
    if (B == 0) return 0;
    if (T > 0) {
      const int status = by_flag(vector_access(D, mod_stride, dy, x, scale, dx, scratch), [&](auto vector) {
        auto kernel = modulate_backward<E, decltype(vector)::value>;
        DSMOE_LAUNCH(kernel, dim3(static_cast<unsigned>(B * modulate_chunks(T))), dim3(threads_for_width(D)), 0, stream,
                     static_cast<const E*>(dy), static_cast<const E*>(x), static_cast<const E*>(scale), mod_stride,
                     mean, rstd, T, modulate_chunks(T), static_cast<int>(D), static_cast<E*>(dx),
                     static_cast<float*>(scratch));
        return launch_status();
      });
      if (status) return status;
    }
    const int dim = static_cast<int>(D);
    DSMOE_LAUNCH(add_partials<E>, dim3(static_cast<unsigned>(B) * partial_blocks(2, dim)), dim3(kPartialThreads), 0,
                 stream, static_cast<const float*>(scratch), modulate_chunks(T), 2, dim, static_cast<E*>(dshift),
                 static_cast<E*>(dscale));
    return launch_status();
  });
}
