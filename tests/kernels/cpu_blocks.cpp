// The CPU's SwiGLU kernels (kernels/csrc/cpu/glu.h) without torch, for the address sanitizer: every buffer is a heap
// block of its exact size. Held against plain loops in double; allowed is twice the error of the same loops in float,
// with every intermediate result rounded to the tensors' dtype. Exit code 1 and a line for each result that is not
// right.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <type_traits>
#include <vector>

#include <immintrin.h>

#include "cpu/kernels.h"

namespace dsmoe {
namespace {
#include "cpu/vector.h"

#include "cpu/products.h"

#include "cpu/glu.h"
}  // namespace
}  // namespace dsmoe

using namespace dsmoe;

namespace {

uint32_t state = 1;
float noise() { return ((state = state * 1664525u + 1013904223u) >> 8) / 8388608.0f - 1.0f; }

uint16_t to_bf16(float f) {
  if (f != f) return 0x7fc0;
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  return (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
}
float from_bf16(uint16_t h) {
  uint32_t bits = uint32_t(h) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

struct Buffer {
  // Without a scale NaN, so that what is read before it was written shows.
  Buffer(int dtype, int64_t count, float scale = NAN) : dtype(dtype), bytes(new char[count * (dtype ? 2 : 4)]) {
    for (int64_t i = 0; i < count; i++) set(i, scale * noise());
  }
  float operator[](int64_t i) const {
    return dtype ? from_bf16(reinterpret_cast<uint16_t*>(bytes.get())[i]) : reinterpret_cast<float*>(bytes.get())[i];
  }
  void set(int64_t i, float v) {
    if (dtype) reinterpret_cast<uint16_t*>(bytes.get())[i] = to_bf16(v);
    else reinterpret_cast<float*>(bytes.get())[i] = v;
  }
  void* data() const { return bytes.get(); }
  int dtype;
  std::unique_ptr<char[]> bytes;
};

struct Layer {
  std::vector<int64_t> counts;
  int64_t D, F, k;
  int dtype;
  bool keep, weights;
  int64_t E() const { return counts.size(); }
  int64_t rows() const {
    int64_t sum = 0;
    for (int64_t c : counts) sum += c;
    return sum;
  }
};

struct Inputs {
  explicit Inputs(const Layer& l)
      : x(l.dtype, l.rows() / l.k * l.D, 1), dy(l.dtype, l.rows() / l.k * l.D, 1),
        w1(l.dtype, l.E() * l.F * l.D, std::sqrt(3.0f / l.D)), w2(l.dtype, l.E() * l.F * l.D, std::sqrt(3.0f / l.F)),
        w3(l.dtype, l.E() * l.F * l.D, std::sqrt(3.0f / l.D)), gates(0, l.rows(), 1), order(new int64_t[l.rows()]) {
    const int64_t R = l.rows();
    for (int64_t i = 0; i < R; i++) order[i] = (i * 7919) % R;  // R is no multiple of the prime
  }
  Buffer x, dy, w1, w2, w3, gates;
  std::unique_ptr<int64_t[]> order;
};

// y, dx [R, D], dgates [R], dw1, dw2, dw3
template <class Real>
using Results = std::array<std::vector<Real>, 6>;

template <class Real>
Results<Real> by_loops(const Layer& l, const Inputs& in) {
  const int64_t D = l.D, F = l.F, R = l.rows(), all = l.E() * F * D;
  auto rounded = [&](Real v) { return sizeof(Real) == 4 && l.dtype ? Real(from_bf16(to_bf16(v))) : v; };
  Results<Real> out{std::vector<Real>(R * D), std::vector<Real>(R * D), std::vector<Real>(R),
                    std::vector<Real>(all),   std::vector<Real>(all),   std::vector<Real>(all)};
  auto& [y, dx, dgates, dw1, dw2, dw3] = out;
  for (int64_t e = 0, r = 0; e < l.E(); e++)
    for (const int64_t end = r + l.counts[e]; r < end; r++) {
      const int64_t token = in.order[r] / l.k * D, own = e * F * D;
      const Real gate = in.gates[in.order[r]];
      for (int64_t f = 0; f < F; f++) {
        Real h = 0, up = 0, da = 0;
        for (int64_t d = 0; d < D; d++) {
          h += Real(in.w1[own + f * D + d]) * in.x[token + d];
          up += Real(in.w3[own + f * D + d]) * in.x[token + d];
          da += Real(in.w2[own + d * F + f]) * in.dy[token + d];
        }
        h = rounded(h), up = rounded(up), da = rounded(da);
        const Real s = 1 / (1 + std::exp(-h)), plain = h * s * up, a = rounded(plain * gate);
        const Real dh = rounded(da * gate * up * s * (1 + h * (1 - s))), dup = rounded(da * gate * h * s);
        dgates[in.order[r]] += da * plain;
        for (int64_t d = 0; d < D; d++) {
          y[r * D + d] += in.w2[own + d * F + f] * a;
          dx[r * D + d] += in.w1[own + f * D + d] * dh + in.w3[own + f * D + d] * dup;
          dw1[own + f * D + d] += dh * in.x[token + d];
          dw2[own + d * F + f] += a * in.dy[token + d];
          dw3[own + f * D + d] += dup * in.x[token + d];
        }
      }
    }
  for (int i : {0, 1, 3, 4, 5})
    for (Real& v : out[i]) v = rounded(v);
  return out;
}

// As the launchers call them, in two ranges of units each, as of two threads.
template <class Argument>
void spread(void (*kernel)(const Argument&, int64_t, int64_t), const Argument& a, int64_t units) {
  if (units / 2) kernel(a, 0, units / 2);
  kernel(a, units / 2, units);
}

void backward(const Layer& l, const Glu& g, GluBackward b, const std::vector<GluBlock>& blocks) {
  for (int64_t first = 0, last; first < int64_t(blocks.size()); first = last) {
    for (last = first; last < int64_t(blocks.size()) && blocks[last].expert == blocks[first].expert;) last++;
    b.forward = &g, b.first = first, b.last = last, b.height = (last - first) * kLanes;
    const int64_t hidden = b.height * l.F, strips = units_of(l.D, kLanes) * kLanes * b.height;
    const Buffer dh(0, hidden), dup(0, hidden), a(0, hidden), x(0, strips), dy(0, strips);
    b.dh = static_cast<float*>(dh.data()), b.dup = static_cast<float*>(dup.data());
    b.a = l.weights ? static_cast<float*>(a.data()) : nullptr;
    b.x_strips = static_cast<float*>(x.data()), b.dy_strips = static_cast<float*>(dy.data());
    spread(glu_rows, b, last - first);
    if (l.weights) spread(glu_weights, b, units_of(l.F, kHidden));
  }
}

template <class A, class B>
double rms(const A& found, const B& truth, int64_t count) {
  double sum = 0;
  for (int64_t i = 0; i < count; i++) sum += (found[i] - truth[i]) * (found[i] - truth[i]);
  return std::sqrt(sum / count);
}

bool right(const Layer& l) {
  const Inputs in(l);
  const int64_t R = l.rows(), all = l.E() * l.F * l.D;
  const Buffer y(l.dtype, R * l.D), h(l.dtype, R * l.F), up(l.dtype, R * l.F), dx(l.dtype, R * l.D), dgates(0, R);
  Buffer dw1(l.dtype, all), dw2(l.dtype, all), dw3(l.dtype, all);
  std::vector<GluBlock> blocks;
  for (int64_t e = 0, row = 0; e < l.E(); e++)
    for (const int64_t end = row + l.counts[e]; row < end; row += blocks.back().count)
      blocks.push_back({e, row, std::min<int64_t>(kLanes, end - row)});
  blocks.shrink_to_fit();
  Glu g{};
  g.dtype = l.dtype, g.dim = l.D, g.hidden = l.F, g.k = l.k, g.blocks = blocks.data(), g.x = in.x.data();
  g.order = in.order.get(), g.gates = static_cast<const float*>(in.gates.data()), g.y = y.data();
  g.w1 = in.w1.data(), g.w2 = in.w2.data(), g.w3 = in.w3.data();
  g.h = l.keep ? h.data() : nullptr, g.up = l.keep ? up.data() : nullptr;
  spread(glu, g, blocks.size());
  GluBackward b{};
  b.dy = in.dy.data(), b.dx = dx.data(), b.dgates = static_cast<float*>(dgates.data());
  b.dw1 = dw1.data(), b.dw2 = dw2.data(), b.dw3 = dw3.data();
  backward(l, g, b, blocks);
  for (int64_t i = 0; i < all; i++)  // the launchers' part
    for (Buffer* dw : {&dw1, &dw2, &dw3})
      if (!l.counts[i / (l.F * l.D)]) dw->set(i, 0);

  const auto truth = by_loops<double>(l, in);
  const auto plain = by_loops<float>(l, in);
  const Buffer* found[] = {&y, &dx, &dgates, &dw1, &dw2, &dw3};
  const char* names[] = {"y", "dx", "dgates", "dw1", "dw2", "dw3"};
  bool good = true;
  for (int i = 0; i < (l.weights ? 6 : 3); i++) {
    const int64_t count = truth[i].size();
    const double unit = found[i]->dtype ? 1.0 / 256 : 1.0 / 16777216;
    const double floor = unit * rms(truth[i], std::vector<double>(count), count);
    const double error = rms(*found[i], truth[i], count);
    const double allowed = 2 * std::max(floor, rms(plain[i], truth[i], count));
    if (error <= allowed) continue;  // not of a NaN
    good = false;
    std::printf("dtype %d, D %ld, F %ld, kept %d: error of %s is %g, allowed %g\n", l.dtype, long(l.D), long(l.F),
                l.keep, names[i], error, allowed);
  }
  return good;
}

}  // namespace

int main() {
  bool good = true;
  for (int dtype : {0, 1})
    for (bool keep : {true, false})
      for (bool weights : {true, false})
        for (const Layer& l :
             {Layer{{3, 0, 70, 1}, 24, 40, 2}, Layer{{300, 17}, 7, 9, 1}, Layer{{5, 6, 7}, 150, 33, 2},
              Layer{{20}, 33, 150, 4}, Layer{{9}, 40, 40, 1}, Layer{{64, 32}, 50, 30, 2},
              Layer{{140}, 33, 26, 2}})
          good &= right({l.counts, l.D, l.F, l.k, dtype, keep, weights});
  std::printf("%ld lanes\n", long(kLanes));
  return good ? 0 : 1;
}
