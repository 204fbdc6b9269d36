// SwiGLU experts from tokens to rows: y = w2 (gate silu(w1 x) * w3 x) and its gradients, block after block.

constexpr int64_t kGroup = 128 / kLanes;  // blocks that go forward together: weights are widened once for them

// A scratch of floats that is not cleared.
struct Floats {
  explicit Floats(int64_t count) : at(new float[count ? count : 1]) {}
  float* get() const { return at.get(); }
  std::unique_ptr<float[]> at;
};

template <class T>
struct Expert {
  Expert(const Glu& g, int64_t expert)
      : w1(static_cast<const T*>(g.w1) + expert * g.hidden * g.dim),
        w2(static_cast<const T*>(g.w2) + expert * g.hidden * g.dim),
        w3(static_cast<const T*>(g.w3) + expert * g.hidden * g.dim) {}
  const T *w1, *w2, *w3;
};

static inline vf rounded(vf v, const float*) { return v; }
static inline vf rounded(vf v, const bf16*) { return widen(narrow(v)); }

// Where a block's kept products lie: [F][count], so that all blocks together have R F numbers.
template <class T>
static inline T* kept(void* all, const Glu& g, const GluBlock& b) {
  return static_cast<T*>(all) + b.row * g.hidden;
}

// f(v, lanes of vector v) for the vectors that `count` lanes reach.
template <int V, class F>
static inline __attribute__((always_inline)) void lanes(int64_t count, F f) {
#pragma GCC unroll 2
  for (int v = 0; v < V; v++) {
    const int64_t here = count - v * W;
    here >= W ? f(v, Full()) : f(v, Part{int(here)});
  }
}

// Where the rows of a block lie in `tokens` [N, D].
template <class T>
static inline auto rows_at(const Glu& g, const GluBlock& b, const void* tokens) {
  return [&g, row = b.row, tokens](int64_t r) {
    return static_cast<const T*>(tokens) + (g.order ? g.order[row + r] / g.k : row + r) * g.dim;
  };
}

// Gates of a block's rows, zero beyond them.
static inline void gates_of(const Glu& g, const GluBlock& b, float* out) {
  for (int64_t r = 0; r < kLanes; r++)
    out[r] = r >= b.count ? 0.0f : g.gates ? g.gates[g.order[b.row + r]] : 1.0f;
}

// h and up of blocks [begin, end) from tokens in blocks x; f(block, hidden row, h, up) for each panel, rounded to T.
template <class T, class F>
static inline void first_products(const Glu& g, int64_t begin, int64_t end, const float* x, float* wide, F f) {
  const Expert<T> e(g, g.blocks[begin].expert);
  pieces(g.hidden, 2 * g.dim, [&](int64_t first, int64_t last) {
    const Wide w1 = widened(e.w1, g.dim, first, last, 0, g.dim, wide);
    const Wide w3 = widened(e.w3, g.dim, first, last, 0, g.dim, wide + (last - first) * g.dim);
    for (int64_t b = begin; b < end; b++)
      by_width(g.blocks[b].count, [&](auto width) {
        constexpr int V = decltype(width)::value;
        const float* block = x + (b - begin) * g.dim * kLanes;
        panels<kDirect / 2>(first, last, [&](auto size, int64_t m) {
          constexpr int P = decltype(size)::value;
          vf h[P][V], up[P][V];
          clear(h);
          clear(up);
          const float *a1 = w1.at + (m - first) * w1.stride, *a3 = w3.at + (m - first) * w3.stride;
          for (int64_t from = 0; from < g.dim; from += kDepth) {
            vf part1[P][V], part3[P][V];
            clear(part1);
            clear(part3);
            // Not two chains: both read the same columns of the block.
            for (int64_t k = from; k < std::min(g.dim, from + kDepth); k++) {
#pragma GCC unroll 2
              for (int v = 0; v < V; v++) {
                const vf right = load(block + k * kLanes + v * W, Full());
#pragma GCC unroll 16
                for (int i = 0; i < P; i++) {
                  part1[i][v] += a1[i * w1.stride + k] * right;
                  part3[i][v] += a3[i * w3.stride + k] * right;
                }
              }
            }
            add(h, part1);
            add(up, part3);
          }
#pragma GCC unroll 16
          for (int i = 0; i < P; i++)
            for (int v = 0; v < V; v++) {
              h[i][v] = rounded(h[i][v], static_cast<const T*>(nullptr));
              up[i][v] = rounded(up[i][v], static_cast<const T*>(nullptr));
            }
          f(b, m, h, up);
        });
      });
  });
}

// Blocks of one expert, forward. Scratch: x, y [blocks][D][kLanes], a [blocks][F][kLanes], weights.
template <class T>
static void glu_group(const Glu& g, int64_t begin, int64_t end, float* x, float* a, float* y, float* wide) {
  const int64_t D = g.dim, F = g.hidden;
  float gates[kGroup * kLanes];
  for (int64_t b = begin; b < end; b++) gates_of(g, g.blocks[b], gates + (b - begin) * kLanes);
  for (int64_t b = begin; b < end; b++)
    to_block<T>(rows_at<T>(g, g.blocks[b], g.x), g.blocks[b].count, D, x + (b - begin) * D * kLanes);
  first_products<T>(g, begin, end, x, wide, [&](int64_t b, int64_t m, auto& h, auto& up) {
    constexpr int P = sizeof h / sizeof h[0], V = sizeof h[0] / sizeof h[0][0];
    const GluBlock& block = g.blocks[b];
#pragma GCC unroll 16
    for (int i = 0; i < P; i++)
#pragma GCC unroll 2
      for (int v = 0; v < V; v++) {
        const vf gate = load(gates + (b - begin) * kLanes + v * W, Full());
        const vf out = h[i][v] * sigmoid(h[i][v]) * up[i][v] * gate;
        store(a + ((b - begin) * F + m + i) * kLanes + v * W, out, Full());
      }
    if (!g.h) return;
    lanes<V>(block.count, [&](int v, auto part) {
      for (int i = 0; i < P; i++) {
        const int64_t at = (m + i) * block.count + v * W;
        store(kept<T>(g.h, g, block) + at, h[i][v], part);
        store(kept<T>(g.up, g, block) + at, up[i][v], part);
      }
    });
  });
  const Expert<T> e(g, g.blocks[begin].expert);
  for (int64_t from = 0; from < F; from += kDepth) {
    const int64_t to = std::min(F, from + kDepth);
    pieces(D, to - from, [&](int64_t first, int64_t last) {
      const Wide w2 = widened(e.w2, F, first, last, from, to, wide);
      for (int64_t b = begin; b < end; b++)
        by_width(g.blocks[b].count, [&](auto width) {
          constexpr int V = decltype(width)::value;
          panels<kDirect>(first, last, [&](auto size, int64_t m) {
            constexpr int P = decltype(size)::value;
            float* out = y + ((b - begin) * D + m) * kLanes;
            vf sums[P][V];
            from ? read(sums, out) : clear(sums);
            multiply(sums, w2.at + (m - first) * w2.stride, w2.stride, 1, to - from,
                     a + ((b - begin) * F + from) * kLanes);
            write(sums, out);
          });
        });
    });
  }
  for (int64_t b = begin; b < end; b++)
    from_block(y + (b - begin) * D * kLanes, g.blocks[b].count, D, static_cast<T*>(g.y) + g.blocks[b].row * D);
}

static int64_t wide_floats(const Glu& g) {
  return std::max(kWeightsAtOnce, 2 * kPanel * std::max(g.dim, kDepth)) + 2 * kPanel;
}

template <class T>
static void glu_of(const Glu& g, int64_t begin, int64_t end) {
  const int64_t most = std::min(end - begin, kGroup);
  const Floats x(most * g.dim * kLanes), y(most * g.dim * kLanes), a(most * g.hidden * kLanes), wide(wide_floats(g));
  while (begin < end) {
    int64_t last = begin + 1;
    while (last < end && last - begin < most && g.blocks[last].expert == g.blocks[begin].expert) last++;
    glu_group<T>(g, begin, last, x.get(), a.get(), y.get(), wide.get());
    begin = last;
  }
}

// dh, dup and a of blocks [begin, end) from dy in blocks; h and up in `made` [2][blocks][F][kLanes] or as kept.
template <class T>
static void glu_hidden(const Glu& g, const GluBackward& back, int64_t begin, int64_t end, const float* dy,
                       const float* made, float* packed, float* dgate) {
  const int64_t D = g.dim, F = g.hidden, blocks = end - begin;
  const Expert<T> e(g, g.blocks[begin].expert);
  // Of kDepth rows at most: a piece is a chain of the gates' gradients.
  pieces(F, std::max(D, kWeightsAtOnce / kDepth), [&](int64_t first, int64_t last) {
    pack(e.w2, F, 0, D, first, last, packed);
    for (int64_t b = begin; b < end; b++)
      by_width(g.blocks[b].count, [&](auto width) {
        constexpr int V = decltype(width)::value;
        const GluBlock& block = g.blocks[b];
        float gate[kLanes];
        gates_of(g, block, gate);
        vf dots[1][V], before[1][V];
        clear(dots);
        panels<kPanel>(first, last, [&](auto size, int64_t m) {
          constexpr int P = decltype(size)::value;
          vf da[P][V];
          clear(da);
          multiply(da, packed + (m - first) * D, 1, P, D, dy + (b - begin) * D * kLanes);
          for (int i = 0; i < P; i++)
            lanes<V>(block.count, [&](int v, auto part) {
              const int64_t own = ((b - begin) * F + m + i) * kLanes + v * W, at = (m + i) * block.count + v * W;
              const vf h = made ? load(made + own, Full()) : load(kept<T>(g.h, g, block) + at, part);
              const vf up = made ? load(made + blocks * F * kLanes + own, Full())
                                 : load(kept<T>(g.up, g, block) + at, part);
              vf rest, s = sigmoid(h, rest), silu = h * s, y = silu * up, d = da[i][v];
              const vf factor = load(gate + v * W, Full()), dg = d * factor;
              dots[0][v] += d * y;
              const int64_t place = ((b - back.first) * F + m + i) * kLanes + v * W;
              store(back.dup + place, dg * silu, Full());
              store(back.dh + place, dg * (up * s * (1.0f + h * rest)), Full());
              if (back.a) store(back.a + place, y * factor, Full());
            });
        });
        read(before, dgate + (b - begin) * kLanes);
        add(before, dots);
        write(before, dgate + (b - begin) * kLanes);
      });
  });
}

// Gradients of the rows of blocks [begin, end), all of one expert.
template <class T>
static void glu_rows_of(const Glu& g, const GluBackward& back, int64_t begin, int64_t end) {
  const int64_t D = g.dim, F = g.hidden, blocks = end - begin;
  const Floats dy(blocks * D * kLanes), packed(wide_floats(g)), dgate(blocks * kLanes);
  const Floats made(g.h ? 0 : 2 * blocks * F * kLanes);
  std::fill_n(dgate.get(), blocks * kLanes, 0.0f);
  if (!g.h) {
    for (int64_t b = begin; b < end; b++)
      to_block<T>(rows_at<T>(g, g.blocks[b], g.x), g.blocks[b].count, D, dy.get() + (b - begin) * D * kLanes);
    first_products<T>(g, begin, end, dy.get(), packed.get(), [&](int64_t b, int64_t m, auto& h, auto& up) {
      float* at = made.get() + ((b - begin) * F + m) * kLanes;
      write(h, at);
      write(up, at + blocks * F * kLanes);
    });
  }
  for (int64_t b = begin; b < end; b++) {
    const GluBlock& block = g.blocks[b];
    const auto incoming = rows_at<T>(g, block, back.dy);
    to_block<T>(incoming, block.count, D, dy.get() + (b - begin) * D * kLanes);
    if (!back.a) continue;
    const int64_t own = (b - back.first) * kLanes;
    to_strips<T>(incoming, block.count, D, back.height, own, back.dy_strips);
    to_strips<T>(rows_at<T>(g, block, g.x), block.count, D, back.height, own, back.x_strips);
  }
  glu_hidden<T>(g, back, begin, end, dy.get(), g.h ? nullptr : made.get(), packed.get(), dgate.get());
  float* dx = dy.get();  // the incoming gradients are not needed again
  const Expert<T> e(g, g.blocks[begin].expert);
  for (int64_t from = 0; from < F; from += kDepth) {
    const int64_t to = std::min(F, from + kDepth), depth = to - from;
    pieces(D, 2 * depth, [&](int64_t first, int64_t last) {
      float* packed3 = packed.get() + (last - first) * depth;
      pack(e.w1, D, from, to, first, last, packed.get());
      pack(e.w3, D, from, to, first, last, packed3);
      for (int64_t b = begin; b < end; b++)
        by_width(g.blocks[b].count, [&](auto width) {
          constexpr int V = decltype(width)::value;
          const int64_t at = ((b - back.first) * F + from) * kLanes;
          panels<kPanel>(first, last, [&](auto size, int64_t m) {
            constexpr int P = decltype(size)::value;
            float* out = dx + ((b - begin) * D + m) * kLanes;
            vf sums[P][V];
            from ? read(sums, out) : clear(sums);
            multiply(sums, packed.get() + (m - first) * depth, 1, P, depth, back.dh + at);
            multiply(sums, packed3 + (m - first) * depth, 1, P, depth, back.dup + at);
            write(sums, out);
          });
        });
    });
  }
  for (int64_t b = begin; b < end; b++) {
    const GluBlock& block = g.blocks[b];
    from_block(dx + (b - begin) * D * kLanes, block.count, D, static_cast<T*>(back.dx) + block.row * D);
    for (int64_t r = 0; r < block.count && back.dgates; r++)
      back.dgates[g.order[block.row + r]] = dgate.get()[(b - begin) * kLanes + r];
  }
}

// totals [strips][kHidden][kLanes] (+)= sum over the rows of blocks [begin, end) of left[hidden row, row] strip[row,
// column].
static inline void add_outer(const Glu& g, const GluBackward& back, int64_t begin, int64_t end, int64_t first,
                             int64_t last, const float* left, const float* strips, float* totals) {
  for (int64_t from = 0; from < g.dim; from += kLanes)
    by_width(g.dim - from, [&](auto width) {
      constexpr int V = decltype(width)::value;
      panels<kPanel>(first, last, [&](auto size, int64_t m) {
        constexpr int P = decltype(size)::value;
        vf sums[P][V];
        clear(sums);
        for (int64_t b = begin; b < end; b++)
          chain(sums, left + ((b - back.first) * g.hidden + m) * kLanes, kLanes, 1, g.blocks[b].count,
                strips + (from / kLanes * back.height + (b - back.first) * kLanes) * kLanes);
        float* out = totals + (from / kLanes * kHidden + m - first) * kLanes;
        if (begin > back.first) {
          vf before[P][V];
          read(before, out);
          add(sums, before);
        }
        write(sums, out);
      });
    });
}

static inline int64_t totals_of(const Glu& g) { return units_of(g.dim, kLanes) * kLanes * kHidden; }

// Gradients of the weights for hidden rows [first, last), at most kHidden, of the expert of blocks [back.first,
// back.last). The rows go by in chains of kDepth, whose strips stay in the L1 for all panels of hidden rows.
template <class T>
static void glu_weights_of(const Glu& g, const GluBackward& back, int64_t first, int64_t last, float* totals) {
  const int64_t D = g.dim, F = g.hidden, at = g.blocks[back.first].expert * F * D;
  float *sum1 = totals, *sum3 = sum1 + totals_of(g), *sum2 = sum3 + totals_of(g);
  for (int64_t begin = back.first; begin < back.last; begin += kDepth / kLanes) {
    const int64_t end = std::min<int64_t>(back.last, begin + kDepth / kLanes);
    add_outer(g, back, begin, end, first, last, back.dh, back.x_strips, sum1);
    add_outer(g, back, begin, end, first, last, back.dup, back.x_strips, sum3);
    add_outer(g, back, begin, end, first, last, back.a, back.dy_strips, sum2);
  }
  for (int64_t from = 0; from < D; from += kLanes) {
    const int64_t strip = from / kLanes * kHidden * kLanes, columns = std::min<int64_t>(kLanes, D - from);
    for (int64_t m = first; m < last; m++)
      sweep(columns, [&](int64_t i, auto part) {
        const int64_t own = strip + (m - first) * kLanes + i, to = at + m * D + from + i;
        store(static_cast<T*>(back.dw1) + to, load(sum1 + own, part), part);
        store(static_cast<T*>(back.dw3) + to, load(sum3 + own, part), part);
      });
    for (int64_t c = 0; c < columns; c++)
      for (int64_t m = first; m < last; m++)
        put(static_cast<T*>(back.dw2) + at + (from + c) * F + m, sum2[strip + (m - first) * kLanes + c]);
  }
}

static void glu(const Glu& g, int64_t begin, int64_t end) {
  g.dtype == 0 ? glu_of<float>(g, begin, end) : glu_of<bf16>(g, begin, end);
}
static void glu_rows(const GluBackward& b, int64_t begin, int64_t end) {
  begin += b.first, end += b.first;
  b.forward->dtype == 0 ? glu_rows_of<float>(*b.forward, b, begin, end) : glu_rows_of<bf16>(*b.forward, b, begin, end);
}
static void glu_weights(const GluBackward& b, int64_t begin, int64_t end) {
  const Floats totals(3 * totals_of(*b.forward));
  for (int64_t first = begin * kHidden; begin < end; begin++, first += kHidden) {
    const int64_t last = std::min(b.forward->hidden, first + kHidden);
    b.forward->dtype == 0 ? glu_weights_of<float>(*b.forward, b, first, last, totals.get())
                          : glu_weights_of<bf16>(*b.forward, b, first, last, totals.get());
  }
}
