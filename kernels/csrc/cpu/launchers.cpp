// The interface of ../cuda/launchers.h on the CPU (functions NAME_cpu): units of work for the kernels, spread over
// torch's own threads; the sums over units are in unit order. Not covered: float16. E and k may be anything.
#define DSMOE_SYM(name) name##_cpu
#include "../cuda/launchers.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

#include "kernels.h"

using namespace dsmoe;

namespace {

// Elements that make starting a thread worth while.
constexpr int64_t kGrain = 16384;

template <class A>
void spread(void (*kernel)(const A&, int64_t, int64_t), const A& a, int64_t units, int64_t elements_each) {
  if (units == 0) return;
  int64_t grain = kGrain / (elements_each ? elements_each : 1) + 1;
  if (units <= grain) return kernel(a, 0, units);
  torch::stable::parallel_for(0, units, grain, [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
}

float to_float(const void* p, int dtype, int64_t i) {
  if (dtype == DSMOE_FLOAT32) return static_cast<const float*>(p)[i];
  uint32_t bits = uint32_t(static_cast<const uint16_t*>(p)[i]) << 16;
  float v;
  std::memcpy(&v, &bits, 4);
  return v;
}

void from_float(void* p, int dtype, int64_t i, float v) {
  if (dtype == DSMOE_FLOAT32) {
    static_cast<float*>(p)[i] = v;
    return;
  }
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  uint32_t rounded = v == v ? (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16 : (bits >> 16) | 0x40u;
  static_cast<uint16_t*>(p)[i] = uint16_t(rounded);
}

// A small matrix in float, for kernels that read it once a row; empty for null.
std::vector<float> widened(const void* p, int dtype, int64_t rows, int64_t columns, int64_t stride) {
  std::vector<float> out(p ? rows * columns : 0);
  for (int64_t r = 0; p && r < rows; r++)
    for (int64_t c = 0; c < columns; c++) out[r * columns + c] = to_float(p, dtype, r * stride + c);
  return out;
}

const float* data_or_null(const std::vector<float>& v) { return v.empty() ? nullptr : v.data(); }

// out[c] of dtype = sum of partial[unit][c] over `units`, in their order. stride: floats from unit to unit.
void add_units(const float* partial, int64_t units, int64_t stride, int64_t columns, void* out, int64_t at, int dtype) {
  std::vector<float> sums(columns);
  for (int64_t u = 0; u < units; u++)
    for (int64_t c = 0; c < columns; c++) sums[c] += partial[u * stride + c];
  for (int64_t c = 0; c < columns; c++) from_float(out, dtype, at + c, sums[c]);
}

bool covered(int dtype) { return dtype == DSMOE_FLOAT32 || dtype == DSMOE_BFLOAT16; }

// Rows of one expert in units; ends null: all rows are one expert's.
std::vector<ActUnit> act_units(int64_t R, int E, const int32_t* ends) {
  std::vector<ActUnit> units;
  int64_t begin = 0;
  for (int e = 0; e < (ends ? E : 1); e++) {
    const int64_t end = ends ? ends[e] : R;
    for (; begin < end; begin += kRows) units.push_back({e, begin, begin + kRows < end ? begin + kRows : end});
    begin = end;
  }
  return units;
}

// Rows of each expert in blocks.
std::vector<GluBlock> glu_blocks(int64_t E, const int64_t* counts) {
  std::vector<GluBlock> blocks;
  const int64_t lanes = kernels().lanes;
  int64_t row = 0;
  for (int64_t e = 0; e < E; e++)
    for (int64_t end = row + counts[e]; row < end; row += blocks.back().count)
      blocks.push_back({e, row, std::min(lanes, end - row)});
  return blocks;
}

void zero(void* p, int dtype, int64_t from, int64_t count) {
  const int64_t bytes = dtype == DSMOE_FLOAT32 ? 4 : 2;
  std::memset(static_cast<char*>(p) + from * bytes, 0, count * bytes);
}

}  // namespace

namespace dsmoe {

void run_glu(Glu g, int64_t E, const int64_t* counts) {
  const std::vector<GluBlock> blocks = glu_blocks(E, counts);
  g.blocks = blocks.data();
  spread(kernels().glu, g, blocks.size(), kernels().lanes * g.dim * g.hidden / 8);
}

void run_glu_backward(Glu g, GluBackward b, int64_t E, const int64_t* counts, bool weights) {
  const std::vector<GluBlock> blocks = glu_blocks(E, counts);
  const int64_t lanes = kernels().lanes, matrix = g.dim * g.hidden, all = blocks.size();
  g.blocks = blocks.data(), b.forward = &g;
  for (int64_t e = 0, first = 0; e < E; e++) {
    int64_t last = first;
    while (last < all && blocks[last].expert == e) last++;
    if (first == last) {
      for (void* dw : {b.dw1, b.dw2, b.dw3})
        if (weights) zero(dw, g.dtype, e * matrix, matrix);
      continue;
    }
    b.first = first, b.last = last, b.height = (last - first) * lanes;
    const int64_t hidden = b.height * g.hidden, strips = weights ? units_of(g.dim, lanes) * lanes * b.height : 0;
    const std::unique_ptr<float[]> own(new float[(weights ? 3 : 2) * hidden + 2 * strips]);
    b.dh = own.get(), b.dup = b.dh + hidden, b.a = weights ? b.dup + hidden : nullptr;
    b.x_strips = b.dup + (weights ? 2 : 1) * hidden, b.dy_strips = b.x_strips + strips;
    spread(kernels().glu_rows, b, last - first, lanes * matrix / 4);
    if (weights) spread(kernels().glu_weights, b, units_of(g.hidden, kHidden), kHidden * g.dim * b.height / 4);
    first = last;
  }
}

}  // namespace dsmoe

extern "C" {

int64_t dsmoe_route_scratch_bytes_cpu(int64_t, int) { return 0; }

int dsmoe_route_cpu(int dtype, int64_t N, int64_t D, int E, int k, int renormalize, const void* x, const void* weight,
                    const float* bias, float* probs, float* gates, int64_t* indices, int64_t* counts, int32_t* ends,
                    int64_t* order, int64_t* position, float* logsumexp, float* prob_sum, void*, void*) {
  if (!covered(dtype)) return DSMOE_NOT_COVERED;
  const int64_t units = units_of(N, kTokens);
  std::vector<float> wide = dtype == DSMOE_FLOAT32 ? std::vector<float>() : widened(weight, dtype, E, D, D);
  std::vector<int64_t> histogram(units * E);
  std::vector<float> sums(units * E);
  Route a{dtype, renormalize, N, D, E, k, x, wide.empty() ? static_cast<const float*>(weight) : wide.data(), bias, probs,
          gates, indices, logsumexp, histogram.data(), sums.data(), order, position};
  spread(kernels().route, a, units, kTokens * (D * E / 16 + E * 8));
  int64_t row = 0;
  for (int e = 0; e < E; e++) {
    counts[e] = 0;
    double sum = 0;
    for (int64_t u = 0; u < units; u++) {
      const int64_t here = histogram[u * E + e];
      histogram[u * E + e] = row + counts[e];
      counts[e] += here;
      sum += sums[u * E + e];
    }
    row += counts[e];
    ends[e] = int32_t(row);
    prob_sum[e] = float(sum);
  }
  spread(kernels().place, a, units, kTokens * k);
  return 0;
}

int dsmoe_route_backward_cpu(int64_t N, int E, int k, int renormalize, const float* probs, const float* gates,
                             const int64_t* indices, const float* dprobs, const float* dgates, const float* dlogsumexp,
                             const float* dprob_sum, float* dlogits, void*) {
  RouteBackward a{renormalize, N, E, k, probs, gates, indices, dprobs, dgates, dlogsumexp, dprob_sum, dlogits};
  spread(kernels().route_backward, a, N, E * 4);
  return 0;
}

int dsmoe_gather_rows_cpu(int dtype, int64_t N, int64_t D, int k, const void* x, const int64_t* order, void* rows,
                          void*) {
  if (!covered(dtype)) return DSMOE_NOT_COVERED;
  Rows a{};
  a.dtype = dtype, a.dim = D, a.k = k, a.rows = x, a.order = order, a.out = rows;
  spread(kernels().gather, a, N * k, D);
  return 0;
}

int dsmoe_sum_rows_cpu(int dtype, int out_dtype, int64_t N, int64_t D, int k, int64_t images, const void* rows,
                       const int64_t* position, const float* gates, const void* add, const void* residual,
                       const void* ada_gate, int64_t ada_stride, void* out, void* branch, void*) {
  if (!covered(dtype)) return DSMOE_NOT_COVERED;
  Rows a{};
  a.dtype = dtype, a.wide_dtype = out_dtype, a.tokens = N, a.dim = D, a.k = k, a.images = images;
  a.ada_stride = ada_stride, a.rows = rows, a.add = add, a.residual = residual, a.ada = ada_gate;
  a.position = position, a.gates = gates, a.out = out, a.branch = branch;
  spread(kernels().sum, a, N, D * (k + 1));
  return 0;
}

int64_t dsmoe_sum_rows_backward_scratch_bytes_cpu(int64_t, int64_t, int64_t) { return 0; }

int dsmoe_sum_rows_backward_cpu(int dtype, int dout_dtype, int64_t N, int64_t D, int k, int64_t images,
                                const void* dout, const void* rows, const int64_t* position, const float* gates,
                                const void* branch, const void* ada_gate, int64_t ada_stride, void* drows,
                                float* dgates, void* dbranch, void* dada_gate, void*, void*) {
  if (!covered(dtype)) return DSMOE_NOT_COVERED;
  const int64_t each = images ? units_of(N / images, kTokens) : 0;
  std::vector<float> dada(dada_gate ? images * each * D : 0);
  Rows a{};
  a.dtype = dtype, a.wide_dtype = dout_dtype, a.tokens = N, a.dim = D, a.k = k, a.images = images;
  a.ada_stride = ada_stride, a.rows = rows, a.ada = ada_gate, a.position = position, a.gates = gates;
  a.dout = dout, a.saved_branch = branch, a.drows = drows, a.dbranch = dbranch, a.dgates = dgates;
  a.dada = dada.empty() ? nullptr : dada.data();
  spread(kernels().sum_backward, a, images * each, kTokens * D * (k + 1));
  for (int64_t i = 0; dada_gate && i < images; i++)
    add_units(dada.data() + i * each * D, each, D, D, dada_gate, i * D, dtype);
  return 0;
}

int dsmoe_expert_act_cpu(int dtype, int kind, int64_t R, int64_t F, int E, const void* h, const void* up,
                         const void* bias, int64_t bias_stride, const int32_t* ends, const float* gate, void* out,
                         void*) {
  if (!covered(dtype)) return DSMOE_NOT_COVERED;
  const std::vector<float> wide = widened(kind == DSMOE_GELU ? bias : nullptr, dtype, E, F, bias_stride);
  const std::vector<ActUnit> units = act_units(R, E, wide.empty() ? nullptr : ends);
  Act a{};
  a.dtype = dtype, a.gelu = kind == DSMOE_GELU, a.hidden = F, a.units = units.data(), a.h = h, a.up = up;
  a.bias = data_or_null(wide), a.gate = gate, a.out = out;
  spread(kernels().act, a, units.size(), kRows * F * 4);
  return 0;
}

int64_t dsmoe_expert_act_backward_scratch_bytes_cpu(int64_t, int64_t, int) { return 0; }

int dsmoe_expert_act_backward_cpu(int dtype, int kind, int64_t R, int64_t F, int E, const void* da, const void* h,
                                  const void* up, const void* bias, int64_t bias_stride, const int32_t* ends,
                                  const float* gate, void* dh, void* dup, void* dbias, float* dgate, void* out, void*,
                                  void*) {
  if (!covered(dtype)) return DSMOE_NOT_COVERED;
  const std::vector<float> wide = widened(kind == DSMOE_GELU ? bias : nullptr, dtype, E, F, bias_stride);
  const std::vector<ActUnit> units = act_units(R, E, wide.empty() ? nullptr : ends);
  std::vector<float> partial(dbias ? units.size() * F : 0);
  Act a{};
  a.dtype = dtype, a.gelu = kind == DSMOE_GELU, a.hidden = F, a.units = units.data(), a.h = h, a.up = up;
  a.dout = da, a.bias = data_or_null(wide), a.gate = gate, a.out = out, a.dh = dh, a.dup = dup, a.dgate = dgate;
  a.dbias = partial.empty() ? nullptr : partial.data();
  spread(kernels().act_backward, a, units.size(), kRows * F * 8);
  size_t first = 0;
  for (int e = 0; dbias && e < E; e++) {
    size_t last = first;
    while (last < units.size() && units[last].expert == e) last++;
    add_units(partial.data() + first * F, last - first, F, F, dbias, int64_t(e) * F, dtype);
    first = last;
  }
  return 0;
}

int dsmoe_modulate_cpu(int dtype, int64_t B, int64_t T, int64_t D, const void* x, const void* shift, const void* scale,
                       int64_t mod_stride, void* y, float* mean, float* rstd, void*) {
  if (!covered(dtype)) return DSMOE_NOT_COVERED;
  const std::vector<float> wide_shift = widened(shift, dtype, B, D, mod_stride);
  const std::vector<float> wide_scale = widened(scale, dtype, B, D, mod_stride);
  Modulate a{dtype, B, T, D, x, nullptr, wide_shift.data(), wide_scale.data(), y, mean, rstd, nullptr};
  spread(kernels().modulate, a, B * units_of(T, kTokens), kTokens * D * 2);
  return 0;
}

int64_t dsmoe_modulate_backward_scratch_bytes_cpu(int64_t, int64_t, int64_t) { return 0; }

int dsmoe_modulate_backward_cpu(int dtype, int64_t B, int64_t T, int64_t D, const void* dy, const void* x,
                                const void* scale, int64_t mod_stride, const float* mean, const float* rstd, void* dx,
                                void* dshift, void* dscale, void*, void*) {
  if (!covered(dtype)) return DSMOE_NOT_COVERED;
  const int64_t each = units_of(T, kTokens);
  const std::vector<float> wide_scale = widened(scale, dtype, B, D, mod_stride);
  std::vector<float> partial(B * each * 2 * D);
  Modulate a{dtype, B, T, D, x, dy, nullptr, wide_scale.data(), dx, const_cast<float*>(mean), const_cast<float*>(rstd),
             partial.data()};
  spread(kernels().modulate_backward, a, B * each, kTokens * D * 4);
  for (int64_t b = 0; b < B; b++) {
    const float* first = partial.data() + b * each * 2 * D;
    add_units(first, each, 2 * D, D, dshift, b * D, dtype);
    add_units(first + D, each, 2 * D, D, dscale, b * D, dtype);
  }
  return 0;
}

}  // extern "C"
