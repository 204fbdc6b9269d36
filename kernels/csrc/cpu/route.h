// Router: product, softmax, top-k, counts, probability sums; then the stable, expert-contiguous map. W tokens side by
// side: a vector holds one expert's number for W tokens.

constexpr int kTileExperts = W == 16 ? 4 : 2;

// Scalar products of 4 tokens with kTileExperts experts; rows beyond the end repeat the last and are not kept.
template <class T>
static void logits_tile(const T* const x[4], const float* const w[kTileExperts], int64_t dim, float* out) {
  vf sums[4][kTileExperts] = {};
  sweep(dim, [&](int64_t i, auto part) {
    vf columns[kTileExperts];
    for (int e = 0; e < kTileExperts; e++) columns[e] = load(w[e] + i, part);
    for (int t = 0; t < 4; t++) {
      vf row = load(x[t] + i, part);
      for (int e = 0; e < kTileExperts; e++) sums[t][e] += row * columns[e];
    }
  });
  for (int t = 0; t < 4; t++)
    for (int e = 0; e < kTileExperts; e++) out[t * kTileExperts + e] = total(sums[t][e]);
}

// logits [E][W] of tokens first .. first + count - 1.
template <class T>
static void logits_group(const Route& a, int64_t first, int count, float* logits) {
  const T* x = static_cast<const T*>(a.x) + first * a.dim;
  for (int t = 0; t < count; t += 4)
    for (int64_t e = 0; e < a.experts; e += kTileExperts) {
      const T* rows[4];
      const float* columns[kTileExperts];
      for (int i = 0; i < 4; i++) rows[i] = x + std::min(t + i, count - 1) * a.dim;
      for (int i = 0; i < kTileExperts; i++) columns[i] = a.weight + std::min(e + i, a.experts - 1) * a.dim;
      float tile[4 * kTileExperts];
      logits_tile<T>(rows, columns, a.dim, tile);
      for (int i = 0; i < 4 && t + i < count; i++)
        for (int j = 0; j < kTileExperts && e + j < a.experts; j++) logits[(e + j) * W + t + i] = tile[i * kTileExperts + j];
    }
}

// In place: logits to probabilities.
static void softmax_group(const Route& a, int64_t first, int count, vf* p) {
  vf largest = p[0];
  for (int64_t e = 1; e < a.experts; e++) largest = p[e] > largest ? p[e] : largest;
  vf sum{};
  for (int64_t e = 0; e < a.experts; e++) {
    p[e] = exponential(p[e] - largest);
    sum += p[e];
  }
  for (int64_t e = 0; e < a.experts; e++) p[e] = p[e] / sum;
  for (int t = 0; t < count; t++)
    a.logsumexp[first + t] = std::isinf(largest[t]) ? largest[t] : largest[t] + std::log(sum[t]);
}

// Largest first, equal ones and NaN in the order of the experts: every index is in range whatever the numbers.
static void choose_group(const Route& a, int64_t first, int count, const vf* p, vf* score, int64_t* histogram) {
  for (int64_t e = 0; e < a.experts; e++) score[e] = a.bias ? p[e] + a.bias[e] : p[e];
  std::vector<vi> taken(a.experts, vi{});
  std::vector<vi> chosen(a.k);
  for (int64_t j = 0; j < a.k; j++) {
    vi best = vi{} - 1;
    vf top{};
    for (int64_t e = 0; e < a.experts; e++) {
      vi better = ~taken[e] & ((best < 0) | (score[e] > top));
      best = better ? vi{} + int32_t(e) : best;
      top = better ? score[e] : top;
    }
    for (int64_t e = 0; e < a.experts; e++) taken[e] |= best == int32_t(e);
    chosen[j] = best;
  }
  for (int t = 0; t < count; t++) {
    float sum = 0;
    for (int64_t j = 0; j < a.k; j++) {
      int64_t slot = (first + t) * a.k + j, e = chosen[j][t];
      a.indices[slot] = e;
      a.gates[slot] = p[e][t];
      sum += p[e][t];
      histogram[e]++;
    }
    if (a.renormalize)
      for (int64_t j = 0; j < a.k; j++) a.gates[(first + t) * a.k + j] /= sum;
  }
}

static void route(const Route& a, int64_t begin, int64_t end) {
  std::vector<vf> p(a.experts), score(a.experts), sums(a.experts);
  for (int64_t unit = begin; unit < end; unit++) {
    int64_t* histogram = a.histogram + unit * a.experts;
    std::fill_n(histogram, a.experts, 0);
    std::fill(sums.begin(), sums.end(), vf{});
    int64_t stop = std::min(a.tokens, (unit + 1) * kTokens);
    for (int64_t first = unit * kTokens; first < stop; first += W) {
      int count = int(std::min<int64_t>(W, stop - first));
      std::fill(p.begin(), p.end(), vf{});
      float* logits = reinterpret_cast<float*>(p.data());
      if (a.dtype == 1)
        logits_group<bf16>(a, first, count, logits);
      else
        logits_group<float>(a, first, count, logits);
      softmax_group(a, first, count, p.data());
      choose_group(a, first, count, p.data(), score.data(), histogram);
      for (int t = 0; t < count; t++)
        for (int64_t e = 0; e < a.experts; e++) a.probs[(first + t) * a.experts + e] = p[e][t];
      for (int64_t e = 0; e < a.experts; e++)
        for (int t = 0; t < count; t++) sums[e][t] += p[e][t];
    }
    for (int64_t e = 0; e < a.experts; e++) a.prob_sum[unit * a.experts + e] = total(sums[e]);
  }
}

// Row of every slot, and slot of every row; histogram holds the first free row of each unit and expert.
static void place(const Route& a, int64_t begin, int64_t end) {
  for (int64_t unit = begin; unit < end; unit++) {
    int64_t* next = a.histogram + unit * a.experts;
    int64_t stop = std::min(a.tokens, (unit + 1) * kTokens) * a.k;
    for (int64_t slot = unit * kTokens * a.k; slot < stop; slot++) {
      int64_t row = next[a.indices[slot]]++;
      a.position[slot] = row;
      a.order[row] = slot;
    }
  }
}

// d loss / d logits: softmax of everything that arrives at the probabilities, plus the log-sum-exp.
static void route_backward(const RouteBackward& a, int64_t begin, int64_t end) {
  int64_t E = a.experts;
  std::vector<float> arriving(E);
  for (int64_t n = begin; n < end; n++) {
    const float* p = a.probs + n * E;
    for (int64_t e = 0; e < E; e++)
      arriving[e] = (a.dprobs ? a.dprobs[n * E + e] : 0.0f) + (a.dprob_sum ? a.dprob_sum[e] : 0.0f);
    if (a.dgates) {
      const float *g = a.gates + n * a.k, *dg = a.dgates + n * a.k;
      const int64_t* index = a.indices + n * a.k;
      float mean = 0, scale = 1;
      if (a.renormalize) {
        float sum = 0;
        for (int64_t j = 0; j < a.k; j++) {
          mean += dg[j] * g[j];
          sum += p[index[j]];
        }
        scale = 1 / sum;
      }
      for (int64_t j = 0; j < a.k; j++) arriving[index[j]] += (dg[j] - mean) * scale;
    }
    float mean = 0, dlse = a.dlogsumexp ? a.dlogsumexp[n] : 0.0f;
    for (int64_t e = 0; e < E; e++) mean += p[e] * arriving[e];
    for (int64_t e = 0; e < E; e++) a.dlogits[n * E + e] = p[e] * (arriving[e] - mean + dlse);
  }
}
