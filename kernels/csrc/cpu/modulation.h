// Adaptive layer norm, one pass each way over a token that stays in the first cache. A unit is kTokens tokens of one
// image.

template <class T>
static void modulate_of(const Modulate& a, int64_t begin, int64_t end) {
  for (int64_t unit = begin; unit < end; unit++)
    tokens_of(a.tokens, unit, [&](int64_t image, int64_t n) {
      const T* x = static_cast<const T*>(a.x) + n * a.dim;
      T* out = static_cast<T*>(a.out) + n * a.dim;
      const float *shift = a.shift + image * a.dim, *scale = a.scale + image * a.dim;
      vf sum{}, square{};
      sweep(a.dim, [&](int64_t i, auto part) { sum += load(x + i, part); });
      const float mean = float(double(total(sum)) / a.dim);
      sweep(a.dim, [&](int64_t i, auto part) {
        vf d = valid(load(x + i, part) - mean, part);
        square += d * d;
      });
      const float rstd = float(1.0 / std::sqrt(double(total(square)) / a.dim + 1e-6));
      sweep(a.dim, [&](int64_t i, auto part) {
        vf normed = (load(x + i, part) - mean) * rstd;
        store(out + i, normed * (1.0f + load(scale + i, part)) + load(shift + i, part), part);
      });
      a.mean[n] = mean;
      a.rstd[n] = rstd;
    });
}

template <class T>
static void modulate_backward_of(const Modulate& a, int64_t begin, int64_t end) {
  for (int64_t unit = begin; unit < end; unit++) {
    float *dshift = a.partial + unit * 2 * a.dim, *dscale = dshift + a.dim;
    std::fill_n(dshift, 2 * a.dim, 0.0f);
    tokens_of(a.tokens, unit, [&](int64_t image, int64_t n) {
      const T *x = static_cast<const T*>(a.x) + n * a.dim, *dout = static_cast<const T*>(a.dout) + n * a.dim;
      T* dx = static_cast<T*>(a.out) + n * a.dim;
      const float *scale = a.scale + image * a.dim, mean = a.mean[n], rstd = a.rstd[n];
      vf first{}, second{};
      sweep(a.dim, [&](int64_t i, auto part) {
        vf d = load(dout + i, part), normed = valid((load(x + i, part) - mean) * rstd, part);
        vf g = d * (1.0f + load(scale + i, part));
        first += g;
        second += g * normed;
        store(dshift + i, load(dshift + i, part) + d, part);
        store(dscale + i, load(dscale + i, part) + d * normed, part);
      });
      float c1 = total(first) / a.dim, c2 = total(second) / a.dim;
      sweep(a.dim, [&](int64_t i, auto part) {
        vf normed = (load(x + i, part) - mean) * rstd, g = load(dout + i, part) * (1.0f + load(scale + i, part));
        store(dx + i, (g - c1 - normed * c2) * rstd, part);
      });
    });
  }
}

static void modulate(const Modulate& a, int64_t begin, int64_t end) {
  a.dtype == 1 ? modulate_of<bf16>(a, begin, end) : modulate_of<float>(a, begin, end);
}

static void modulate_backward(const Modulate& a, int64_t begin, int64_t end) {
  a.dtype == 1 ? modulate_backward_of<bf16>(a, begin, end) : modulate_backward_of<float>(a, begin, end);
}
