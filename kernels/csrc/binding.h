// What the files that bind kernels to torch share: where a call runs, its launcher, checks and helpers on tensors.
#pragma once
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#define DSMOE_SYM(name) name##_cpu
#include "cuda/launchers.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Maybe = std::optional<Tensor>;

extern "C" {
// Of libtorch_cuda; null in a CPU build of torch.
__attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);
}
// A launcher of the GPU part, null without it. To be used inside extern "C".
#define DSMOE_WEAK(name) __attribute__((weak)) decltype(name##_cpu) name##_cuda;

namespace dsmoe::binding {

// Where a call runs: picks the launcher, holds the device and the stream.
class Place {
 public:
  explicit Place(const Tensor& t) : cuda_(t.is_cuda()) {
    if (!cuda_) return;
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream, "dsmoe: this torch has no CUDA");
    guard_.emplace(t.get_device_index());
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  }
  template <class F>
  F* pick(F* cpu, F* cuda) const {
    STD_TORCH_CHECK(!cuda_ || cuda, "dsmoe: the kernels were built without nvcc; set nothing and use the reference");
    return cuda_ ? cuda : cpu;
  }
  void* stream = nullptr;

 private:
  bool cuda_;
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
};

// Launchers of both kinds; of a GPU alone.
#define DSMOE_CALL(place, name, ...) check(place.pick(name##_cpu, name##_cuda)(__VA_ARGS__), #name)
#define DSMOE_GPU_CALL(place, name, ...) \
  check(place.pick<decltype(name##_cpu)>(nullptr, name##_cuda)(__VA_ARGS__), #name)
#define DSMOE_SCRATCH(place, like, name, ...) \
  empty(like, {place.pick(name##_scratch_bytes_cpu, name##_scratch_bytes_cuda)(__VA_ARGS__)}, ScalarType::Byte)

inline void check(int status, const char* name) {
  STD_TORCH_CHECK(status != DSMOE_NOT_COVERED, name, ": this dtype or size is not covered; use the reference");
  STD_TORCH_CHECK(status == 0, name, ": CUDA error ", status);
}

inline int code(ScalarType t) {
  if (t == ScalarType::Float) return DSMOE_FLOAT32;
  if (t == ScalarType::BFloat16) return DSMOE_BFLOAT16;
  STD_TORCH_CHECK(t == ScalarType::Half, "dsmoe: float32, bfloat16 or float16 is needed");
  return DSMOE_FLOAT16;
}

inline ScalarType type_of(int64_t code) {
  return code == DSMOE_FLOAT32 ? ScalarType::Float : code == DSMOE_BFLOAT16 ? ScalarType::BFloat16 : ScalarType::Half;
}

inline Tensor empty(const Tensor& like, std::vector<int64_t> sizes, ScalarType type) {
  return torch::stable::new_empty(like, sizes, type);
}

inline Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }
inline Maybe dense(const Maybe& t) { return t ? Maybe(dense(*t)) : t; }
inline Tensor dense_rows(const Tensor& t) {
  return t.size(1) == 1 || t.stride(1) == 1 ? t : torch::stable::contiguous(t);
}
inline Maybe dense_rows(const Maybe& t) { return t ? Maybe(dense_rows(*t)) : t; }

inline void* data(const Tensor& t) { return t.data_ptr(); }
inline void* data(const Maybe& t) { return t ? t->data_ptr() : nullptr; }
template <class T>
T* as(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}
template <class T>
T* as(const Maybe& t) {
  return t ? static_cast<T*>(t->data_ptr()) : nullptr;
}
inline int64_t stride_of(const Maybe& t) { return t ? t->stride(0) : 0; }

inline void need(bool right, const char* what) { STD_TORCH_CHECK(right, "dsmoe: ", what); }
inline void need_type(const Maybe& t, ScalarType type, const char* what) { need(!t || t->scalar_type() == type, what); }

}  // namespace dsmoe::binding
