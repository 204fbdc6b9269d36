// torch's side of the kernels: schemas and the calls of the launchers, through torch's stable ABI alone, so that one
// file serves several versions of torch and of Python. The launchers of a CPU (cpu/launchers.cpp) and of a GPU
// (cuda/*.cu, absent where nvcc was) have one interface, cuda/launchers.h. Autograd and fakes are in
// dsmoe/ops/native/registration.py; what the arguments mean, in dsmoe/ops/__init__.py.
#include "binding.h"

#include "cpu/kernels.h"

using namespace dsmoe::binding;

// What the build knows (kernels/build.py), in the file itself: hash of the sources and architectures of the GPU part.
#ifndef DSMOE_BUILT
#define DSMOE_BUILT "dsmoe kernels built of unknown|"
#endif

extern "C" {
DSMOE_WEAK(dsmoe_route_scratch_bytes)
DSMOE_WEAK(dsmoe_route)
DSMOE_WEAK(dsmoe_route_backward)
DSMOE_WEAK(dsmoe_gather_rows)
DSMOE_WEAK(dsmoe_sum_rows)
DSMOE_WEAK(dsmoe_sum_rows_backward_scratch_bytes)
DSMOE_WEAK(dsmoe_sum_rows_backward)
DSMOE_WEAK(dsmoe_expert_act)
DSMOE_WEAK(dsmoe_expert_act_backward_scratch_bytes)
DSMOE_WEAK(dsmoe_expert_act_backward)
DSMOE_WEAK(dsmoe_modulate)
DSMOE_WEAK(dsmoe_modulate_backward_scratch_bytes)
DSMOE_WEAK(dsmoe_modulate_backward)

__attribute__((visibility("default"))) const char* dsmoe_built() { return DSMOE_BUILT; }
__attribute__((visibility("default"))) const char* dsmoe_cpu_isa() { return dsmoe::kernels().name; }
}

namespace {

using Nine = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Nine route(const Tensor& x0, const Tensor& weight0, int64_t k, bool renormalize, const Maybe& bias0) {
  const Tensor x = dense(x0), weight = dense(weight0);
  const Maybe bias = dense(bias0);
  const int64_t N = x.size(0), D = x.size(1), E = weight.size(0);
  const int dtype = code(x.scalar_type());
  need(weight.size(1) == D && weight.scalar_type() == x.scalar_type(), "route: weight must be [E, D] of x's dtype");
  need(k >= 1 && k <= E, "route: k must be 1 to E");
  need_type(bias, ScalarType::Float, "route: bias must be float32");
  Place place(x);
  Tensor probs = empty(x, {N, E}, ScalarType::Float), gates = empty(x, {N, k}, ScalarType::Float);
  Tensor indices = empty(x, {N, k}, ScalarType::Long), counts = empty(x, {E}, ScalarType::Long);
  Tensor ends = empty(x, {E}, ScalarType::Int), order = empty(x, {N * k}, ScalarType::Long);
  Tensor position = empty(x, {N, k}, ScalarType::Long), logsumexp = empty(x, {N}, ScalarType::Float);
  Tensor prob_sum = empty(x, {E}, ScalarType::Float);
  Tensor scratch = DSMOE_SCRATCH(place, x, dsmoe_route, N, E);
  DSMOE_CALL(place, dsmoe_route, dtype, N, D, E, k, renormalize, data(x), data(weight), as<float>(bias),
             as<float>(probs), as<float>(gates), as<int64_t>(indices), as<int64_t>(counts), as<int32_t>(ends),
             as<int64_t>(order), as<int64_t>(position), as<float>(logsumexp), as<float>(prob_sum), data(scratch),
             place.stream);
  return {probs, gates, indices, counts, ends, order, position, logsumexp, prob_sum};
}

Tensor route_backward(const Tensor& probs, const Tensor& gates, const Tensor& indices, bool renormalize,
                      const Maybe& dprobs0, const Maybe& dgates0, const Maybe& dlogsumexp0, const Maybe& dprob_sum0) {
  const Maybe dprobs = dense(dprobs0), dgates = dense(dgates0), dlogsumexp = dense(dlogsumexp0);
  const Maybe dprob_sum = dense(dprob_sum0);
  Place place(probs);
  Tensor dlogits = empty(probs, {probs.size(0), probs.size(1)}, ScalarType::Float);
  DSMOE_CALL(place, dsmoe_route_backward, probs.size(0), probs.size(1), gates.size(1), renormalize, as<float>(probs),
             as<float>(gates), as<int64_t>(indices), as<float>(dprobs), as<float>(dgates), as<float>(dlogsumexp),
             as<float>(dprob_sum), as<float>(dlogits), place.stream);
  return dlogits;
}

Tensor gather_rows(const Tensor& x0, const Tensor& order0, const Tensor& position) {
  const Tensor x = dense(x0), order = dense(order0);
  const int64_t N = x.size(0), D = x.size(1), k = position.size(1);
  need(order.numel() == N * k, "gather_rows: order must have N * k elements");
  Place place(x);
  Tensor rows = empty(x, {N * k, D}, x.scalar_type());
  DSMOE_CALL(place, dsmoe_gather_rows, code(x.scalar_type()), N, D, k, data(x), as<int64_t>(order), data(rows),
             place.stream);
  return rows;
}

std::tuple<Tensor, Tensor> sum_rows(const Tensor& rows0, const Tensor& position0, const Maybe& gates0,
                                    const Maybe& add0, const Maybe& residual0, const Maybe& ada_gate0, bool wide,
                                    bool keep_branch) {
  const Tensor rows = dense(rows0), position = dense(position0);
  const Maybe gates = dense(gates0), add = dense(add0), residual = dense(residual0), ada = dense_rows(ada_gate0);
  const int64_t N = position.size(0), D = rows.size(1), k = position.size(1), images = ada ? ada->size(0) : 1;
  const ScalarType type = rows.scalar_type();
  need(rows.size(0) == N * k, "sum_rows: there must be N * k rows");
  need_type(gates, ScalarType::Float, "sum_rows: gates must be float32");
  need_type(add, type, "sum_rows: add must have the dtype of the rows");
  need_type(residual, type, "sum_rows: residual must have the dtype of the rows");
  need_type(ada, type, "sum_rows: ada_gate must have the dtype of the rows");
  need(images ? N % images == 0 : N == 0, "sum_rows: N must be a multiple of the images");
  Place place(rows);
  Tensor out = empty(rows, {N, D}, wide ? ScalarType::Float : type);
  Maybe branch = keep_branch ? Maybe(empty(rows, {N, D}, type)) : Maybe();
  DSMOE_CALL(place, dsmoe_sum_rows, code(type), code(out.scalar_type()), N, D, k, images, data(rows),
             as<int64_t>(position), as<float>(gates), data(add), data(residual), data(ada), stride_of(ada), data(out),
             data(branch), place.stream);
  return {out, branch ? *branch : empty(rows, {0}, type)};
}

using Four = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Four sum_rows_backward(const Tensor& dout0, const Tensor& position0, int64_t dtype, const Maybe& rows0,
                       const Maybe& gates0, const Maybe& branch0, const Maybe& ada_gate0, bool want_dbranch) {
  const Tensor dout = dense(dout0), position = dense(position0);
  const Maybe rows = dense(rows0), gates = dense(gates0), branch = dense(branch0), ada = dense_rows(ada_gate0);
  const int64_t N = dout.size(0), D = dout.size(1), k = position.size(1), images = ada ? ada->size(0) : 1;
  const ScalarType type = type_of(dtype);
  Place place(dout);
  Tensor drows = empty(dout, {N * k, D}, type);
  Maybe dgates = gates ? Maybe(empty(dout, {N, k}, ScalarType::Float)) : Maybe();
  Maybe dbranch = want_dbranch ? Maybe(empty(dout, {N, D}, type)) : Maybe();
  Maybe dada = branch ? Maybe(empty(dout, {images, D}, type)) : Maybe();
  Tensor scratch = DSMOE_SCRATCH(place, dout, dsmoe_sum_rows_backward, N, D, images);
  DSMOE_CALL(place, dsmoe_sum_rows_backward, dtype, code(dout.scalar_type()), N, D, k, images, data(dout), data(rows),
             as<int64_t>(position), as<float>(gates), data(branch), data(ada), stride_of(ada), data(drows),
             as<float>(dgates), data(dbranch), data(dada), data(scratch), place.stream);
  const Tensor none = empty(dout, {0}, ScalarType::Float);
  return {drows, dgates ? *dgates : none, dbranch ? *dbranch : empty(dout, {0}, type),
          dada ? *dada : empty(dout, {0}, type)};
}

struct ActInputs {
  ActInputs(const Tensor& h0, int64_t kind, const Maybe& up0, const Maybe& bias0, const Maybe& ends0,
            const Maybe& gate0)
      : h(dense(h0)), up(dense(up0)), bias(dense_rows(bias0)), ends(dense(ends0)), gate(dense(gate0)) {
    need(kind == DSMOE_SWIGLU ? up && !bias : !up, "expert_act: up belongs to swiglu, bias to gelu");
    need(!bias || ends, "expert_act: bias needs ends");
    need_type(up, h.scalar_type(), "expert_act: up must have the dtype of h");
    need_type(bias, h.scalar_type(), "expert_act: bias must have the dtype of h");
    need_type(ends, ScalarType::Int, "expert_act: ends must be int32");
    need_type(gate, ScalarType::Float, "expert_act: gate must be float32");
    experts = ends ? ends->size(0) : 1;
  }
  Tensor h;
  Maybe up, bias, ends, gate;
  int64_t experts;
};

Tensor expert_act(const Tensor& h0, int64_t kind, const Maybe& up, const Maybe& bias, const Maybe& ends,
                  const Maybe& gate) {
  const ActInputs in(h0, kind, up, bias, ends, gate);
  const int64_t R = in.h.size(0), F = in.h.size(1);
  Place place(in.h);
  Tensor a = empty(in.h, {R, F}, in.h.scalar_type());
  DSMOE_CALL(place, dsmoe_expert_act, code(in.h.scalar_type()), kind, R, F, in.experts, data(in.h), data(in.up),
             data(in.bias), stride_of(in.bias), as<int32_t>(in.ends), as<float>(in.gate), data(a), place.stream);
  return a;
}

using Five = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Five expert_act_backward(const Tensor& da0, const Tensor& h0, int64_t kind, const Maybe& up, const Maybe& bias,
                         const Maybe& ends, const Maybe& gate, bool again) {
  const ActInputs in(h0, kind, up, bias, ends, gate);
  const Tensor da = dense(da0);
  const int64_t R = in.h.size(0), F = in.h.size(1);
  const ScalarType type = in.h.scalar_type();
  need(da.scalar_type() == type, "expert_act_backward: da must have the dtype of h");
  Place place(in.h);
  Tensor dh = empty(in.h, {R, F}, type), none = empty(in.h, {0}, type);
  Maybe dup = in.up ? Maybe(empty(in.h, {R, F}, type)) : Maybe();
  Maybe dbias = in.bias ? Maybe(empty(in.h, {in.experts, F}, type)) : Maybe();
  Maybe dgate = in.gate ? Maybe(empty(in.h, {R}, ScalarType::Float)) : Maybe();
  Maybe a = again ? Maybe(empty(in.h, {R, F}, type)) : Maybe();
  Tensor scratch = DSMOE_SCRATCH(place, in.h, dsmoe_expert_act_backward, R, F, in.experts);
  DSMOE_CALL(place, dsmoe_expert_act_backward, code(type), kind, R, F, in.experts, data(da), data(in.h), data(in.up),
             data(in.bias), stride_of(in.bias), as<int32_t>(in.ends), as<float>(in.gate), data(dh), data(dup),
             data(dbias), as<float>(dgate), data(a), data(scratch), place.stream);
  return {dh, dup ? *dup : empty(in.h, {0}, type), dbias ? *dbias : empty(in.h, {0}, type),
          dgate ? *dgate : empty(in.h, {0}, ScalarType::Float), a ? *a : none};
}

using Three = std::tuple<Tensor, Tensor, Tensor>;

Three modulate(const Tensor& x0, const Tensor& shift0, const Tensor& scale0) {
  const Tensor x = dense(x0);
  Tensor shift = dense_rows(shift0), scale = dense_rows(scale0);
  if (shift.stride(0) != scale.stride(0)) shift = dense(shift), scale = dense(scale);
  const int64_t B = x.size(0), T = x.size(1), D = x.size(2);
  const ScalarType type = x.scalar_type();
  need(shift.scalar_type() == type && scale.scalar_type() == type, "modulate: shift and scale must have x's dtype");
  Place place(x);
  Tensor y = empty(x, {B, T, D}, type);
  Tensor mean = empty(x, {B, T}, ScalarType::Float), rstd = empty(x, {B, T}, ScalarType::Float);
  DSMOE_CALL(place, dsmoe_modulate, code(type), B, T, D, data(x), data(shift), data(scale), scale.stride(0), data(y),
             as<float>(mean), as<float>(rstd), place.stream);
  return {y, mean, rstd};
}

Three modulate_backward(const Tensor& dy0, const Tensor& x0, const Tensor& scale0, const Tensor& mean,
                        const Tensor& rstd) {
  const Tensor dy = dense(dy0), x = dense(x0), scale = dense_rows(scale0);
  const int64_t B = x.size(0), T = x.size(1), D = x.size(2);
  const ScalarType type = x.scalar_type();
  need(dy.scalar_type() == type, "modulate_backward: dy must have x's dtype");
  Place place(x);
  Tensor dx = empty(x, {B, T, D}, type), dshift = empty(x, {B, D}, type), dscale = empty(x, {B, D}, type);
  Tensor scratch = DSMOE_SCRATCH(place, x, dsmoe_modulate_backward, B, T, D);
  DSMOE_CALL(place, dsmoe_modulate_backward, code(type), B, T, D, data(dy), data(x), data(scale), scale.stride(0),
             as<float>(mean), as<float>(rstd), data(dx), data(dshift), data(dscale), data(scratch), place.stream);
  return {dx, dshift, dscale};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dsmoe, m) {
  m.def("route(Tensor x, Tensor weight, int k, bool renormalize, Tensor? bias) -> (Tensor probs, Tensor gates, "
        "Tensor indices, Tensor counts, Tensor ends, Tensor order, Tensor position, Tensor logsumexp, Tensor prob_sum)");
  m.def("route_backward(Tensor probs, Tensor gates, Tensor indices, bool renormalize, Tensor? dprobs, Tensor? dgates, "
        "Tensor? dlogsumexp, Tensor? dprob_sum) -> Tensor");
  m.def("gather_rows(Tensor x, Tensor order, Tensor position) -> Tensor");
  m.def("sum_rows(Tensor rows, Tensor position, Tensor? gates, Tensor? add, Tensor? residual, Tensor? ada_gate, "
        "bool wide, bool keep_branch) -> (Tensor out, Tensor branch)");
  m.def("sum_rows_backward(Tensor dout, Tensor position, int dtype, Tensor? rows, Tensor? gates, Tensor? branch, "
        "Tensor? ada_gate, bool want_dbranch) -> (Tensor drows, Tensor dgates, Tensor dbranch, Tensor dada_gate)");
  m.def("expert_act(Tensor h, int kind, Tensor? up, Tensor? bias, Tensor? ends, Tensor? gate) -> Tensor");
  m.def("expert_act_backward(Tensor da, Tensor h, int kind, Tensor? up, Tensor? bias, Tensor? ends, Tensor? gate, "
        "bool again) -> (Tensor dh, Tensor dup, Tensor dbias, Tensor dgate, Tensor a)");
  m.def("modulate(Tensor x, Tensor shift, Tensor scale) -> (Tensor y, Tensor mean, Tensor rstd)");
  m.def("modulate_backward(Tensor dy, Tensor x, Tensor scale, Tensor mean, Tensor rstd) -> (Tensor dx, Tensor dshift, "
        "Tensor dscale)");
}

#define DSMOE_IMPLEMENT(key)                                    \
  STABLE_TORCH_LIBRARY_IMPL(dsmoe, key, m) {                    \
    m.impl("route", TORCH_BOX(&route));                         \
    m.impl("route_backward", TORCH_BOX(&route_backward));       \
    m.impl("gather_rows", TORCH_BOX(&gather_rows));             \
    m.impl("sum_rows", TORCH_BOX(&sum_rows));                   \
    m.impl("sum_rows_backward", TORCH_BOX(&sum_rows_backward)); \
    m.impl("expert_act", TORCH_BOX(&expert_act));               \
    m.impl("expert_act_backward", TORCH_BOX(&expert_act_backward)); \
    m.impl("modulate", TORCH_BOX(&modulate));                   \
    m.impl("modulate_backward", TORCH_BOX(&modulate_backward)); \
  }
DSMOE_IMPLEMENT(CPU)
DSMOE_IMPLEMENT(CUDA)
