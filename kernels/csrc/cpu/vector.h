// Vectors of W floats on the compiler's vector extensions: one source for every instruction set, portable without any.
// Included inside the namespace of one instruction set.

#if defined(__AVX512F__) || defined(DSMOE_WIDE)  // the latter for tests on machines without
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif
typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));
typedef uint16_t vh __attribute__((vector_size(W * 2)));

struct bf16 {
  uint16_t bits;
};

struct Full {};
struct Part {
  int count;
};

static inline vf splat(float v) { return v - vf{}; }

static inline vf load(const float* p, Full) {
  vf v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
static inline vf load(const float* p, Part n) {
  vf v{};
  std::memcpy(&v, p, n.count * sizeof(float));
  return v;
}
static inline vf widen(vh h) {
  vu u = __builtin_convertvector(h, vu) << 16;
  vf v;
  std::memcpy(&v, &u, sizeof v);
  return v;
}
static inline vf load(const bf16* p, Full) {
  vh h;
  std::memcpy(&h, p, sizeof h);
  return widen(h);
}
static inline vf load(const bf16* p, Part n) {
  vh h{};
  std::memcpy(&h, p, n.count * sizeof(bf16));
  return widen(h);
}

// Round to nearest, ties to even; a NaN stays one.
static inline vh narrow(vf v) {
#if defined(__AVX512BF16__)
  auto b = _mm512_cvtneps_pbh((__m512)v);
  vh h;
  std::memcpy(&h, &b, sizeof h);
  return h;
#else
  vu u;
  std::memcpy(&u, &v, sizeof u);
  vu rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  vu nan = (u >> 16) | 0x40u;
  return __builtin_convertvector((vu)(v == v) ? rounded : nan, vh);
#endif
}
static inline void store(float* p, vf v, Full) { std::memcpy(p, &v, sizeof v); }
static inline void store(float* p, vf v, Part n) { std::memcpy(p, &v, n.count * sizeof(float)); }
static inline void store(bf16* p, vf v, Full) {
  vh h = narrow(v);
  std::memcpy(p, &h, sizeof h);
}
static inline void store(bf16* p, vf v, Part n) {
  vh h = narrow(v);
  std::memcpy(p, &h, n.count * sizeof(bf16));
}

// f(i, Full) for whole vectors of [0, n), then f(i, Part) for the rest.
template <class F>
static inline __attribute__((always_inline)) void sweep(int64_t n, F f) {
  int64_t i = 0;
  for (; i + W <= n; i += W) f(i, Full());
  if (i < n) f(i, Part{int(n - i)});
}

// Zero beyond the end.
static inline vf valid(vf v, Full) { return v; }
static inline vf valid(vf v, Part n) {
  for (int i = n.count; i < W; i++) v[i] = 0;
  return v;
}

// f(image, token) for the tokens of a unit; images of `tokens` tokens each.
template <class F>
static inline __attribute__((always_inline)) void tokens_of(int64_t tokens, int64_t unit, F f) {
  int64_t units = units_of(tokens, kTokens), image = unit / units, first = unit % units * kTokens;
  for (int64_t t = first; t < std::min(tokens, first + kTokens); t++) f(image, image * tokens + t);
}

static inline float total(vf v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#else
  float lanes[W];
  std::memcpy(lanes, &v, sizeof v);
  for (int half = W / 2; half > 0; half /= 2)
    for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
  return lanes[0];
#endif
}

// A sum of many terms in chains of 16: one long chain would lose digits as it grows.
struct Sum {
  vf chain{}, whole{};
  int length = 0;
  void add(vf term) {
    chain += term;
    if (++length < 16) return;
    whole += chain;
    chain = vf{}, length = 0;
  }
  float value() const { return total(whole + chain); }
};

// e^x to about one unit in the last place: x = n ln 2 + r, Taylor series of degree 7 in |r| <= 0.35 (error 5e-9).
// Above 88.37 infinity, below -87.33 zero, NaN stays NaN.
static inline vf exponential(vf x) {
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  vf n = x * 1.44269504f + magic;
  n = n - magic;
  vf r = x - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  vf p = splat(1.0f / 5040);
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  vi scale = (__builtin_convertvector(n, vi) + 127) << 23;
  vf power;
  std::memcpy(&power, &scale, sizeof power);
  p = p * power;
  p = x > 88.37f ? splat(INFINITY) : p;
  return x < -87.33f ? vf{} : p;
}

static inline vf sigmoid(vf x) { return 1.0f / (1.0f + exponential(-x)); }

// sigmoid(x) and 1 - sigmoid(x), each to the last place: gradients multiply the difference by large numbers.
static inline vf sigmoid(vf x, vf& other) {
  vf e = exponential(x > 0.0f ? -x : x), large = 1.0f / (1.0f + e), small = e * large;
  other = x > 0.0f ? small : large;
  return x > 0.0f ? large : small;
}
