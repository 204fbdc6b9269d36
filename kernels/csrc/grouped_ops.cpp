// torch's side of the grouped products with SwiGLU in their epilogue (cuda/grouped_glu.cu, grouped_dglu.cu), on GPUs
// alone. Their meaning on a CPU, where they serve and what runs elsewhere: dsmoe/ops/native/glu.py.
#include "binding.h"

using namespace dsmoe::binding;

extern "C" {
DSMOE_WEAK(dsmoe_has_wgmma)
DSMOE_WEAK(dsmoe_grouped_glu)
DSMOE_WEAK(dsmoe_grouped_dglu_scratch_bytes)
DSMOE_WEAK(dsmoe_grouped_dglu)
}

namespace {

bool has_wgmma(const Tensor& like) {
  Place place(like);
  return place.pick<decltype(dsmoe_has_wgmma_cpu)>(nullptr, dsmoe_has_wgmma_cuda)();
}

// What both products are given beside their matrices.
struct Rows {
  Rows(const Tensor& tokens0, const Maybe& order0, int64_t k, const Tensor& ends0, const Maybe& gate0)
      : tokens(dense(tokens0)), ends(dense(ends0)), order(dense(order0)), gate(dense(gate0)) {
    need_type(ends, ScalarType::Int, "grouped product: ends must be int32");
    need_type(order, ScalarType::Long, "grouped product: order must be int64");
    need_type(gate, ScalarType::Float, "grouped product: gate must be float32");
    need(k >= 1, "grouped product: k must be at least 1");
    N = tokens.size(0), D = tokens.size(1), R = N * k, E = ends.size(0);
    need(!order || order->numel() == R, "grouped product: order must have N * k elements");
    need(!gate || gate->numel() == R, "grouped product: gate must have a number for each row");
  }
  Tensor tokens, ends;
  Maybe order, gate;
  int64_t N, D, R, E;
};

void need_shape(const Maybe& t, const Tensor& like, std::vector<int64_t> sizes, const char* what) {
  if (!t) return;
  bool right = t->dim() == static_cast<int64_t>(sizes.size()) && t->scalar_type() == like.scalar_type();
  for (size_t i = 0; right && i < sizes.size(); i++) right = t->size(i) == sizes[i];
  need(right, what);
}

Maybe output(bool wanted, const Tensor& like, int64_t rows, int64_t columns) {
  return wanted ? Maybe(empty(like, {rows, columns}, like.scalar_type())) : Maybe();
}
Tensor given(const Maybe& t, const Tensor& like) { return t ? *t : empty(like, {0}, like.scalar_type()); }

using Six = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Six grouped_glu(const Tensor& x0, const Maybe& order0, int64_t k, const Tensor& w_gate0, const Tensor& w_up0,
                const Tensor& ends0, const Maybe& gate0, const Maybe& shared_gate0, const Maybe& shared_up0,
                bool keep) {
  const Rows in(x0, order0, k, ends0, gate0);
  const Tensor &x = in.tokens, w_gate = dense(w_gate0), w_up = dense(w_up0);
  const Maybe shared_gate = dense(shared_gate0), shared_up = dense(shared_up0);
  const int64_t F = w_gate.size(1), wide = shared_gate ? shared_gate->size(0) : 0;
  need_shape(w_gate, x, {in.E, F, in.D}, "grouped_glu: w_gate must be [E, F, D] of x's dtype");
  need_shape(w_up, x, {in.E, F, in.D}, "grouped_glu: w_up must be [E, F, D] of x's dtype");
  need(shared_gate.has_value() == shared_up.has_value(), "grouped_glu: both shared matrices or none");
  need_shape(shared_gate, x, {wide, in.D}, "grouped_glu: shared_gate must be [F, D] of x's dtype");
  need_shape(shared_up, x, {wide, in.D}, "grouped_glu: shared_up must be [F, D] of x's dtype");
  Place place(x);
  const Tensor a = empty(x, {in.R, F}, x.scalar_type());
  const Maybe h = output(keep, x, in.R, F), up = output(keep, x, in.R, F);
  const Maybe beside_a = output(wide, x, in.N, wide), beside_h = output(wide && keep, x, in.N, wide);
  const Maybe beside_up = output(wide && keep, x, in.N, wide);
  DSMOE_GPU_CALL(place, dsmoe_grouped_glu, code(x.scalar_type()), in.N, in.D, F, in.E, k, data(x),
                 as<int64_t>(in.order), data(w_gate), data(w_up), as<int32_t>(in.ends), as<float>(in.gate), data(a),
                 data(h), data(up), wide, data(shared_gate), data(shared_up), data(beside_a), data(beside_h),
                 data(beside_up), place.stream);
  return {a, given(h, x), given(up, x), given(beside_a, x), given(beside_h, x), given(beside_up, x)};
}

using Seven = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Seven grouped_dglu(const Tensor& dy0, const Maybe& order0, int64_t k, const Tensor& w20, const Tensor& ends0,
                   const Tensor& h0, const Tensor& up0, const Maybe& gate0, const Maybe& shared_w20,
                   const Maybe& shared_h0, const Maybe& shared_up0, bool again) {
  const Rows in(dy0, order0, k, ends0, gate0);
  const Tensor &dy = in.tokens, w2 = dense(w20), h = dense(h0), up = dense(up0);
  const Maybe shared_w2 = dense(shared_w20), shared_h = dense(shared_h0), shared_up = dense(shared_up0);
  const int64_t F = w2.size(2), wide = shared_w2 ? shared_w2->size(1) : 0;
  need_shape(w2, dy, {in.E, in.D, F}, "grouped_dglu: w2 must be [E, D, F] of dy's dtype");
  need_shape(h, dy, {in.R, F}, "grouped_dglu: h must be [N * k, F] of dy's dtype");
  need_shape(up, dy, {in.R, F}, "grouped_dglu: up must be [N * k, F] of dy's dtype");
  need(shared_w2.has_value() == shared_h.has_value() && shared_w2.has_value() == shared_up.has_value(),
       "grouped_dglu: all three shared tensors or none");
  need_shape(shared_w2, dy, {in.D, wide}, "grouped_dglu: shared_w2 must be [D, F] of dy's dtype");
  need_shape(shared_h, dy, {in.N, wide}, "grouped_dglu: shared_h must be [N, F] of dy's dtype");
  need_shape(shared_up, dy, {in.N, wide}, "grouped_dglu: shared_up must be [N, F] of dy's dtype");
  Place place(dy);
  const Tensor dh = empty(dy, {in.R, F}, dy.scalar_type()), dup = empty(dy, {in.R, F}, dy.scalar_type());
  const Maybe a = output(again, dy, in.R, F);
  const Maybe dgate = in.gate ? Maybe(empty(dy, {in.R}, ScalarType::Float)) : Maybe();
  const Maybe beside_dh = output(wide, dy, in.N, wide), beside_dup = output(wide, dy, in.N, wide);
  const Maybe beside_a = output(wide && again, dy, in.N, wide);
  const int64_t bytes = dsmoe_grouped_dglu_scratch_bytes_cuda ? dsmoe_grouped_dglu_scratch_bytes_cuda(in.R, F) : 0;
  const Tensor scratch = empty(dy, {dgate ? bytes : 0}, ScalarType::Byte);
  DSMOE_GPU_CALL(place, dsmoe_grouped_dglu, code(dy.scalar_type()), in.N, in.D, F, in.E, k, data(dy),
                 as<int64_t>(in.order), data(w2), as<int32_t>(in.ends), data(h), data(up), as<float>(in.gate),
                 data(dh), data(dup), data(a), as<float>(dgate), wide, data(shared_w2), data(shared_h),
                 data(shared_up), data(beside_dh), data(beside_dup), data(beside_a), data(scratch), place.stream);
  return {dh, dup, given(a, dy), dgate ? *dgate : empty(dy, {0}, ScalarType::Float), given(beside_dh, dy),
          given(beside_dup, dy), given(beside_a, dy)};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dsmoe, m) {
  m.def("has_wgmma(Tensor like) -> bool");
  m.def("grouped_glu(Tensor x, Tensor? order, int k, Tensor w_gate, Tensor w_up, Tensor ends, Tensor? gate, "
        "Tensor? shared_gate, Tensor? shared_up, bool keep) -> (Tensor a, Tensor h, Tensor up, Tensor shared_a, "
        "Tensor shared_h, Tensor shared_up_out)");
  m.def("grouped_dglu(Tensor dy, Tensor? order, int k, Tensor w2, Tensor ends, Tensor h, Tensor up, Tensor? gate, "
        "Tensor? shared_w2, Tensor? shared_h, Tensor? shared_up, bool again) -> (Tensor dh, Tensor dup, Tensor a, "
        "Tensor dgate, Tensor shared_dh, Tensor shared_dup, Tensor shared_a)");
}

STABLE_TORCH_LIBRARY_IMPL(dsmoe, CUDA, m) {
  m.impl("has_wgmma", TORCH_BOX(&has_wgmma));
  m.impl("grouped_glu", TORCH_BOX(&grouped_glu));
  m.impl("grouped_dglu", TORCH_BOX(&grouped_dglu));
}
