// Products of an expert's matrices with a block of its rows. The rows stand in the lanes of vectors: a block is a
// matrix [K][kLanes], one column a row, so that weights [M, K] are read as they are stored, one broadcast number at a
// time, and the results of one product are the operand of the next. Scratch is float whatever the tensors are.

constexpr int kLanes = 2 * W;  // rows of a block
// Rows of weights at once: sums and operands fill the registers, 32 of the wider vectors and 16 of others.
constexpr int kPanel = W == 16 ? 12 : 6, kDirect = W == 16 ? 8 : 4;
constexpr int64_t kDepth = 128;            // terms of one chain of sums: as many as leave it as right as the library's
constexpr int64_t kWeightsAtOnce = 49152;  // numbers of weights that all blocks pass before the next come, in the L2

constexpr int smaller(int panel) { return panel == 12 ? 8 : panel == 6 ? 4 : panel / 2; }

// f(size, first) for panels of `P` rows of [first, last), then for smaller ones.
template <int P, class F>
static inline __attribute__((always_inline)) void panels(int64_t first, int64_t last, F f) {
  for (; first + P <= last; first += P) f(std::integral_constant<int, P>(), first);
  if constexpr (P > 1)
    if (first < last) panels<smaller(P)>(first, last, f);
}

// f(vectors) for as many vectors as `count` lanes need.
template <class F>
static inline __attribute__((always_inline)) void by_width(int64_t count, F f) {
  count > W ? f(std::integral_constant<int, 2>()) : f(std::integral_constant<int, 1>());
}

// f(first, last) for pieces of [0, rows) of which `columns` columns stay in the cache.
template <class F>
static inline void pieces(int64_t rows, int64_t columns, F f) {
  const int64_t step = std::max<int64_t>(1, kWeightsAtOnce / (columns * kPanel)) * kPanel;
  for (int64_t first = 0; first < rows; first += step) f(first, std::min(rows, first + step));
}

// sums[i][v] += sum over k of a[i * row + k * step] * b[k][v]: weights as they are (step 1) or packed (row 1, step P).
template <int P, int V>
static inline __attribute__((always_inline)) void chain(vf (&sums)[P][V], const float* a, int64_t row, int64_t step,
                                                        int64_t depth, const float* b) {
  for (int64_t k = 0; k < depth; k++) {
    vf right[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; v++) right[v] = load(b + k * kLanes + v * W, Full());
#pragma GCC unroll 16
    for (int i = 0; i < P; i++)
#pragma GCC unroll 2
      for (int v = 0; v < V; v++) sums[i][v] += a[i * row + k * step] * right[v];
  }
}

// Set one by one: an initialiser becomes a call of memset.
template <int P, int V>
static inline __attribute__((always_inline)) void clear(vf (&sums)[P][V]) {
#pragma GCC unroll 16
  for (int i = 0; i < P; i++)
#pragma GCC unroll 2
    for (int v = 0; v < V; v++) sums[i][v] = vf{};
}

template <int P, int V>
static inline __attribute__((always_inline)) void add(vf (&sums)[P][V], const vf (&more)[P][V]) {
#pragma GCC unroll 16
  for (int i = 0; i < P; i++)
#pragma GCC unroll 2
    for (int v = 0; v < V; v++) sums[i][v] += more[i][v];
}

// As `chain`, in chains of kDepth: one long chain of sums would lose digits as it grows.
template <int P, int V>
static inline __attribute__((always_inline)) void multiply(vf (&sums)[P][V], const float* a, int64_t row, int64_t step,
                                                           int64_t depth, const float* b) {
  for (int64_t k = 0; k < depth; k += kDepth) {
    vf part[P][V];
    clear(part);
    chain(part, a + k * step, row, step, std::min(kDepth, depth - k), b + k * kLanes);
    add(sums, part);
  }
}

// From and to block rows [P][kLanes].
template <int P, int V>
static inline void read(vf (&sums)[P][V], const float* at) {
#pragma GCC unroll 16
  for (int i = 0; i < P; i++)
    for (int v = 0; v < V; v++) sums[i][v] = load(at + i * kLanes + v * W, Full());
}
template <int P, int V>
static inline void write(const vf (&sums)[P][V], float* at) {
#pragma GCC unroll 16
  for (int i = 0; i < P; i++)
    for (int v = 0; v < V; v++) store(at + i * kLanes + v * W, sums[i][v], Full());
}

static inline float number(float v) { return v; }
static inline float number(bf16 v) {
  uint32_t bits = uint32_t(v.bits) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
static inline void put(float* p, float v) { *p = v; }
static inline void put(bf16* p, float v) {  // as `narrow`
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  p->bits = v == v ? (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16 : (bits >> 16) | 0x40u;
}

// Rows [first, last) and columns [from, to) of weights as float, row after row `stride` apart: themselves, or a copy.
struct Wide {
  const float* at;
  int64_t stride;
};
static inline Wide widened(const float* w, int64_t stride, int64_t first, int64_t, int64_t from, int64_t, float*) {
  return {w + first * stride + from, stride};
}
static inline Wide widened(const bf16* w, int64_t stride, int64_t first, int64_t last, int64_t from, int64_t to,
                           float* copy) {
  for (int64_t r = first; r < last; r++)
    sweep(to - from, [&](int64_t i, auto part) {
      store(copy + (r - first) * (to - from) + i, load(w + r * stride + from + i, part), part);
    });
  return {copy, to - from};
}

// Weights transposed for `multiply`: rows [from, to) become depth, columns [first, last) become panels [depth][P].
template <class T>
static inline void pack(const T* w, int64_t stride, int64_t from, int64_t to, int64_t first, int64_t last, float* out) {
  const int64_t depth = to - from;
  for (int64_t k = 0; k < depth; k++) {
    const T* row = w + (from + k) * stride;
    panels<kPanel>(first, last, [&](auto size, int64_t m) {
      constexpr int P = decltype(size)::value;
      float* to_panel = out + (m - first) * depth + k * P;
      for (int i = 0; i < P; i++) to_panel[i] = number(row[m + i]);
    });
  }
}

// `count` rows given by their addresses, as a block [columns][kLanes]; the lanes beyond are zero.
template <class T, class At>
static inline void to_block(At at, int64_t count, int64_t columns, float* block) {
  for (int64_t r = 0; r < count; r++) {
    const T* row = at(r);
    for (int64_t i = 0; i < columns; i++) block[i * kLanes + r] = number(row[i]);
  }
  for (int64_t i = 0; i < columns && count < kLanes; i++)
    std::fill(block + i * kLanes + count, block + (i + 1) * kLanes, 0.0f);
}

template <class T>
static inline void from_block(const float* block, int64_t count, int64_t columns, T* rows) {
  for (int64_t r = 0; r < count; r++)
    for (int64_t i = 0; i < columns; i++) put(rows + r * columns + i, block[i * kLanes + r]);
}

// The same rows as strips of kLanes columns [strips][height][kLanes], rows from `first` on; columns beyond are zero.
template <class T, class At>
static inline void to_strips(At at, int64_t count, int64_t columns, int64_t height, int64_t first, float* strips) {
  for (int64_t r = 0; r < count; r++) {
    const T* row = at(r);
    for (int64_t from = 0; from < columns; from += kLanes) {
      float* out = strips + (from / kLanes * height + first + r) * kLanes;
      const int64_t here = std::min<int64_t>(kLanes, columns - from);
      sweep(here, [&](int64_t i, auto part) { store(out + i, load(row + from + i, part), part); });
      std::fill(out + here, out + kLanes, 0.0f);
    }
  }
}
