// What happens between the two expert products: bias, activation, gate; and all gradients in one pass.

constexpr float kGeluScale = 1.5957691216057308f;  // 2 sqrt(2 / pi): gelu_tanh(x) = x sigmoid(kGeluScale (x + c x^3))
constexpr float kGeluCubic = 0.044715f;

template <class T, bool Gelu>
static void act_of(const Act& a, int64_t begin, int64_t end) {
  for (int64_t unit = begin; unit < end; unit++) {
    const ActUnit u = a.units[unit];
    const float* bias = a.bias ? a.bias + u.expert * a.hidden : nullptr;
    for (int64_t r = u.begin; r < u.end; r++) {
      const T *h = static_cast<const T*>(a.h) + r * a.hidden, *up = static_cast<const T*>(a.up) + r * a.hidden;
      T* out = static_cast<T*>(a.out) + r * a.hidden;
      const float gate = a.gate ? a.gate[r] : 1.0f;
      sweep(a.hidden, [&](int64_t i, auto part) {
        vf x = load(h + i, part);
        if (bias) x += load(bias + i, part);
        vf y;
        if constexpr (Gelu)
          y = x * sigmoid((x + x * x * x * kGeluCubic) * kGeluScale);
        else
          y = x * sigmoid(x) * load(up + i, part);
        store(out + i, y * gate, part);
      });
    }
  }
}

template <class T, bool Gelu>
static void act_backward_of(const Act& a, int64_t begin, int64_t end) {
  for (int64_t unit = begin; unit < end; unit++) {
    const ActUnit u = a.units[unit];
    const float* bias = a.bias ? a.bias + u.expert * a.hidden : nullptr;
    float* dbias = a.dbias ? a.dbias + unit * a.hidden : nullptr;
    if (dbias) std::fill_n(dbias, a.hidden, 0.0f);
    for (int64_t r = u.begin; r < u.end; r++) {
      const int64_t at = r * a.hidden;
      const T *h = static_cast<const T*>(a.h) + at, *up = static_cast<const T*>(a.up) + at;
      const T* dout = static_cast<const T*>(a.dout) + at;
      T *out = static_cast<T*>(a.out), *dh = static_cast<T*>(a.dh) + at, *dup = static_cast<T*>(a.dup) + at;
      const float gate = a.gate ? a.gate[r] : 1.0f;
      Sum dot;
      sweep(a.hidden, [&](int64_t i, auto part) {
        vf x = load(h + i, part), d = load(dout + i, part), y, dx;
        if (bias) x += load(bias + i, part);
        if constexpr (Gelu) {
          vf rest, s = sigmoid((x + x * x * x * kGeluCubic) * kGeluScale, rest);
          y = x * s;
          dx = s + y * rest * (kGeluScale + x * x * (3.0f * kGeluScale * kGeluCubic));
        } else {
          vf rest, s = sigmoid(x, rest), silu = x * s, u = load(up + i, part);
          y = silu * u;
          dx = u * s * (1.0f + x * rest);
          store(dup + i, d * gate * silu, part);
        }
        dot.add(d * y);
        vf g = d * gate * dx;
        store(dh + i, g, part);
        if (dbias) store(dbias + i, load(dbias + i, part) + g, part);
        if (out) store(out + at + i, y * gate, part);
      });
      if (a.dgate) a.dgate[r] = dot.value();
    }
  }
}

static void act(const Act& a, int64_t begin, int64_t end) {
  if (a.dtype == 0)
    a.gelu ? act_of<float, true>(a, begin, end) : act_of<float, false>(a, begin, end);
  else
    a.gelu ? act_of<bf16, true>(a, begin, end) : act_of<bf16, false>(a, begin, end);
}

static void act_backward(const Act& a, int64_t begin, int64_t end) {
  if (a.dtype == 0)
    a.gelu ? act_backward_of<float, true>(a, begin, end) : act_backward_of<float, false>(a, begin, end);
  else
    a.gelu ? act_backward_of<bf16, true>(a, begin, end) : act_backward_of<bf16, false>(a, begin, end);
}
