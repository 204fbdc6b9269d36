// torch's side of SwiGLU experts on a CPU from tokens to rows (cpu/glu.h), called by dsmoe/ops/native/ffn_blocks.py
// inside dsmoe::moe_ffn. The shared expert is one of E = 1 that all tokens pass.
#include "binding.h"

#include "cpu/kernels.h"

using namespace dsmoe::binding;

namespace {

// Arguments that both directions have.
struct Experts {
  Experts(const Tensor& x0, const Maybe& order0, int64_t k, const Maybe& gates0, const Tensor& counts0,
          const Tensor& w10, const Tensor& w20, const Tensor& w30)
      : x(dense(x0)), counts(dense(counts0)), w1(dense(w10)), w2(dense(w20)), w3(dense(w30)), order(dense(order0)),
        gates(dense(gates0)) {
    const ScalarType type = x.scalar_type();
    need(type == ScalarType::Float || type == ScalarType::BFloat16, "glu_experts: float32 or bfloat16 is needed");
    need(w1.dim() == 3 && w1.size(2) == x.size(1), "glu_experts: w1 must be [E, F, D]");
    E = w1.size(0), F = w1.size(1), D = w1.size(2);
    for (const Tensor* w : {&w1, &w2, &w3}) need(w->scalar_type() == type, "glu_experts: one dtype is needed");
    need(w2.size(0) == E && w2.size(1) == D && w2.size(2) == F, "glu_experts: w2 must be [E, D, F]");
    need(w3.size(0) == E && w3.size(1) == F && w3.size(2) == D, "glu_experts: w3 must be [E, F, D]");
    need(counts.numel() == E && counts.scalar_type() == ScalarType::Long, "glu_experts: counts must be int64 [E]");
    need_type(order, ScalarType::Long, "glu_experts: order must be int64");
    need_type(gates, ScalarType::Float, "glu_experts: gates must be float32");
    need(k >= 1 && (order || (k == 1 && !gates)), "glu_experts: k and gates need an order");
    R = x.size(0) * k;
    need(!order || order->numel() == R, "glu_experts: order must have N * k elements");
    need(!gates || gates->numel() == R, "glu_experts: gates must be [N, k]");
    int64_t sum = 0;
    for (int64_t e = 0; e < E; e++) {
      need(as<int64_t>(counts)[e] >= 0, "glu_experts: counts must not be negative");
      sum += as<int64_t>(counts)[e];
    }
    need(sum == R, "glu_experts: counts must sum to the rows");
    for (int64_t r = 0; order && r < R; r++)
      need(as<int64_t>(order)[r] >= 0 && as<int64_t>(order)[r] < R, "glu_experts: order must be of 0 to R - 1");
    glu.dtype = code(type), glu.dim = D, glu.hidden = F, glu.k = k, glu.x = data(x), glu.order = as<int64_t>(order);
    glu.gates = as<float>(gates), glu.w1 = data(w1), glu.w2 = data(w2), glu.w3 = data(w3);
  }
  Tensor x, counts, w1, w2, w3;
  Maybe order, gates;
  int64_t E, F, D, R;
  dsmoe::Glu glu{};
};

using Three = std::tuple<Tensor, Tensor, Tensor>;

Three glu_experts(const Tensor& x, const Maybe& order, int64_t k, const Maybe& gates, const Tensor& counts,
                  const Tensor& w1, const Tensor& w2, const Tensor& w3, bool keep) {
  Experts in(x, order, k, gates, counts, w1, w2, w3);
  const ScalarType type = x.scalar_type();
  const std::vector<int64_t> kept = keep ? std::vector<int64_t>{in.R, in.F} : std::vector<int64_t>{0};
  const Tensor rows = empty(x, {in.R, in.D}, type), h = empty(x, kept, type), up = empty(x, kept, type);
  in.glu.y = data(rows), in.glu.h = keep ? data(h) : nullptr, in.glu.up = keep ? data(up) : nullptr;
  dsmoe::run_glu(in.glu, in.E, as<int64_t>(in.counts));
  return {rows, h, up};
}

using Five = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Five glu_experts_backward(const Tensor& dy0, const Tensor& x, const Maybe& order, int64_t k, const Maybe& gates,
                          const Tensor& counts, const Tensor& w1, const Tensor& w2, const Tensor& w3, const Maybe& h0,
                          const Maybe& up0, bool weights) {
  Experts in(x, order, k, gates, counts, w1, w2, w3);
  const Tensor dy = dense(dy0);
  const Maybe h = dense(h0), up = dense(up0);
  const ScalarType type = x.scalar_type();
  need(dy.scalar_type() == type && dy.dim() == 2 && dy.size(0) == x.size(0) && dy.size(1) == in.D,
       "glu_experts_backward: dy must be as x");
  need(h.has_value() == up.has_value(), "glu_experts_backward: both h and up or neither");
  for (const Maybe* t : {&h, &up})
    need(!*t || ((*t)->scalar_type() == type && (*t)->numel() == in.R * in.F),
         "glu_experts_backward: h and up must be as glu_experts kept them");
  auto made = [&](const Tensor& w) {
    return weights ? empty(w, {w.size(0), w.size(1), w.size(2)}, type) : empty(w, {0}, type);
  };
  const Tensor dx = empty(x, {in.R, in.D}, type), dw1 = made(in.w1), dw2 = made(in.w2), dw3 = made(in.w3);
  const Tensor dgates = empty(x, in.gates ? std::vector<int64_t>{x.size(0), k} : std::vector<int64_t>{0},
                              ScalarType::Float);
  in.glu.h = data(h), in.glu.up = data(up);
  dsmoe::GluBackward back{};
  back.dy = data(dy), back.dx = data(dx), back.dgates = in.gates ? as<float>(dgates) : nullptr;
  back.dw1 = data(dw1), back.dw2 = data(dw2), back.dw3 = data(dw3);
  dsmoe::run_glu_backward(in.glu, back, in.E, as<int64_t>(in.counts), weights);
  return {dx, dgates, dw1, dw2, dw3};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dsmoe, m) {
  m.def("glu_experts(Tensor x, Tensor? order, int k, Tensor? gates, Tensor counts, Tensor w1, Tensor w2, Tensor w3, "
        "bool keep) -> (Tensor rows, Tensor h, Tensor up)");
  m.def("glu_experts_backward(Tensor dy, Tensor x, Tensor? order, int k, Tensor? gates, Tensor counts, Tensor w1, "
        "Tensor w2, Tensor w3, Tensor? h, Tensor? up, bool weights) -> (Tensor dx, Tensor dgates, Tensor dw1, "
        "Tensor dw2, Tensor dw3)");
}

STABLE_TORCH_LIBRARY_IMPL(dsmoe, CPU, m) {
  m.impl("glu_experts", TORCH_BOX(&glu_experts));
  m.impl("glu_experts_backward", TORCH_BOX(&glu_experts_backward));
}
