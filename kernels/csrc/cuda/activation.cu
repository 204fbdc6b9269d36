// Launchers of expert_act and its backward.
#include "activation.cuh"
#include "launch.cuh"

namespace dsmoe {
namespace {

constexpr int kMaxActExperts = 65535;  // a grid dimension

bool covered(int kind, int64_t rows, int64_t width, int experts, const void* bias) {
  return is_count(rows) && is_count(width) && (kind == DSMOE_SWIGLU || kind == DSMOE_GELU) &&
         (kind == DSMOE_SWIGLU || !bias || (experts >= 1 && experts <= kMaxActExperts));
}
template <class F>
int by_kind(int kind, F&& f) {
  return kind == DSMOE_SWIGLU ? f(Number<DSMOE_SWIGLU>{}) : f(Number<DSMOE_GELU>{});
}
template <class T>
ActInputs<T> inputs(const void* h, const void* up, const void* bias, int64_t bias_stride, const int32_t* ends,
                    const float* gate, int experts) {
  return {static_cast<const T*>(h), static_cast<const T*>(up), static_cast<const T*>(bias), bias_stride, ends, gate,
          experts};
}

}  // namespace
}  // namespace dsmoe

using namespace dsmoe;

extern "C" int DSMOE_SYM(dsmoe_expert_act)(int dtype, int kind, int64_t R, int64_t F, int E, const void* h,
                                           const void* up, const void* bias, int64_t bias_stride, const int32_t* ends,
                                           const float* gate, void* a, void* stream) {
  if (!covered(kind, R, F, E, bias)) return DSMOE_NOT_COVERED;
  if (kind == DSMOE_SWIGLU) bias = nullptr;
  else up = nullptr;
  return by_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if (R == 0 || F == 0) return 0;
    return by_kind(kind, [&](auto kind_) {
      return by_flag(vector_access(F, bias ? bias_stride : F, h, up, bias, a), [&](auto vector) {
        auto kernel = expert_act<T, decltype(kind_)::value, decltype(vector)::value>;
        DSMOE_LAUNCH(kernel, dim3(static_cast<unsigned>(ceil_div(R, kActWarps))), dim3(kActThreads), 0, stream,
                     inputs<T>(h, up, bias, bias_stride, ends, gate, E), R, static_cast<int>(F), static_cast<T*>(a));
        return launch_status();
      });
    });
  });
}

extern "C" int64_t DSMOE_SYM(dsmoe_expert_act_backward_scratch_bytes)(int64_t R, int64_t F, int E) {
  return (ceil_div(R, kActChunk) + E) * F * 4;
}

extern "C" int DSMOE_SYM(dsmoe_expert_act_backward)(int dtype, int kind, int64_t R, int64_t F, int E, const void* da,
                                                    const void* h, const void* up, const void* bias,
                                                    int64_t bias_stride, const int32_t* ends, const float* gate,
                                                    void* dh, void* dup, void* dbias, float* dgate, void* a,
                                                    void* scratch, void* stream) {
  if (!covered(kind, R, F, E, bias) || F > kMaxBlockWidth || (dbias && !bias)) return DSMOE_NOT_COVERED;
  if (kind == DSMOE_SWIGLU) bias = nullptr, dbias = nullptr;
  else up = nullptr, dup = nullptr;
  const bool aligned = vector_access(F, bias ? bias_stride : F, da, h, up, bias, dh, dup, a, dbias ? scratch : nullptr);
  return by_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if (F == 0) return 0;
    if (R > 0) {
      const int status = by_kind(kind, [&](auto kind_) {
        return by_flag(aligned, [&](auto vector) {
          ActGradients<T> g{};
          g.da = static_cast<const T*>(da), g.dh = static_cast<T*>(dh), g.dup = static_cast<T*>(dup);
          g.a = static_cast<T*>(a), g.dgate = dgate;
          g.bias_partial = dbias ? static_cast<float*>(scratch) : nullptr;
          auto kernel = expert_act_backward<T, decltype(kind_)::value, decltype(vector)::value>;
          DSMOE_LAUNCH(kernel, dim3(static_cast<unsigned>(ceil_div(R, kActChunk))), dim3(threads_for_width(F)), 0,
                       stream, inputs<T>(h, up, bias, bias_stride, ends, gate, E), g, R, static_cast<int>(F));
          return launch_status();
        });
      });
      if (status) return status;
    }
    if (!dbias) return 0;
    DSMOE_LAUNCH(add_bias_partials<T>, dim3(static_cast<unsigned>(ceil_div(F, kWarp)), static_cast<unsigned>(E)),
                 dim3(kWarp * kBiasStrips), 0, stream, static_cast<const float*>(scratch), ends, static_cast<int>(F),
                 static_cast<T*>(dbias));
    return launch_status();
  });
}
