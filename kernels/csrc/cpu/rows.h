// Tokens to expert rows and back, and the gradients of the way back. K: choices a token where known at compile time.

template <class T>
static void gather_of(const Rows& a, int64_t begin, int64_t end) {
  const T* x = static_cast<const T*>(a.rows);
  T* out = static_cast<T*>(a.out);
  for (int64_t row = begin; row < end; row++)
    std::memcpy(out + row * a.dim, x + a.order[row] / a.k * a.dim, a.dim * sizeof(T));
}

static void gather(const Rows& a, int64_t begin, int64_t end) {
  a.dtype == 1 ? gather_of<bf16>(a, begin, end) : gather_of<float>(a, begin, end);
}

template <class T>
static const T* row_or_null(const void* matrix, int64_t row, int64_t stride) {
  return matrix ? static_cast<const T*>(matrix) + row * stride : nullptr;
}

template <class T, class O, int K>
static void sum_of(const Rows& a, int64_t begin, int64_t end) {
  const int64_t k = K ? K : a.k, tokens = a.images ? a.tokens / a.images : 1;
  for (int64_t n = begin; n < end; n++) {
    const T *add = row_or_null<T>(a.add, n, a.dim), *residual = row_or_null<T>(a.residual, n, a.dim);
    const T* ada = row_or_null<T>(a.ada, n / tokens, a.ada_stride);
    const int64_t* position = a.position + n * k;
    const float* gates = a.gates ? a.gates + n * k : nullptr;
    O* out = static_cast<O*>(a.out) + n * a.dim;
    T* branch = a.branch ? static_cast<T*>(a.branch) + n * a.dim : nullptr;
    sweep(a.dim, [&](int64_t i, auto part) {
      vf sum{};
      for (int64_t j = 0; j < k; j++) {
        vf row = load(static_cast<const T*>(a.rows) + position[j] * a.dim + i, part);
        sum = gates ? sum + row * gates[j] : sum + row;
      }
      if (add) sum += load(add + i, part);
      if (branch) store(branch + i, sum, part);
      if (ada) sum = sum * load(ada + i, part);
      if (residual) sum += load(residual + i, part);
      store(out + i, sum, part);
    });
  }
}

template <class T, class O>
static void sum_to(const Rows& a, int64_t begin, int64_t end) {
  if (a.k == 1) return sum_of<T, O, 1>(a, begin, end);
  if (a.k == 2) return sum_of<T, O, 2>(a, begin, end);
  sum_of<T, O, 0>(a, begin, end);
}

static void sum(const Rows& a, int64_t begin, int64_t end) {
  if (a.dtype == 0) return sum_to<float, float>(a, begin, end);
  a.wide_dtype == 1 ? sum_to<bf16, bf16>(a, begin, end) : sum_to<bf16, float>(a, begin, end);
}

// One token: d is the gradient of its branch.
template <class T, class O>
static void sum_backward_token(const Rows& a, int64_t n, const O* dout, const T* ada, T* dbranch) {
  auto gradient = [&](int64_t i, auto part) {
    vf d = load(dout + i, part);
    return ada ? d * load(ada + i, part) : d;
  };
  if (dbranch) sweep(a.dim, [&](int64_t i, auto part) { store(dbranch + i, gradient(i, part), part); });
  for (int64_t j = 0; (a.drows || a.dgates) && j < a.k; j++) {
    const int64_t row = a.position[n * a.k + j];
    const float gate = a.gates ? a.gates[n * a.k + j] : 1.0f;
    T* drows = a.drows ? static_cast<T*>(a.drows) + row * a.dim : nullptr;
    const T* rows = a.dgates ? static_cast<const T*>(a.rows) + row * a.dim : nullptr;
    Sum dot;
    sweep(a.dim, [&](int64_t i, auto part) {
      vf d = gradient(i, part);
      if (rows) dot.add(d * load(rows + i, part));
      if (drows) store(drows + i, d * gate, part);
    });
    if (rows) a.dgates[n * a.k + j] = dot.value();
  }
}

template <class T, class O>
static void sum_backward_of(const Rows& a, int64_t begin, int64_t end) {
  for (int64_t unit = begin; unit < end; unit++) {
    float* dada = a.dada ? a.dada + unit * a.dim : nullptr;
    if (dada) std::fill_n(dada, a.dim, 0.0f);
    tokens_of(a.tokens / a.images, unit, [&](int64_t image, int64_t n) {
      const O* dout = static_cast<const O*>(a.dout) + n * a.dim;
      T* dbranch = a.dbranch ? static_cast<T*>(a.dbranch) + n * a.dim : nullptr;
      sum_backward_token<T, O>(a, n, dout, row_or_null<T>(a.ada, image, a.ada_stride), dbranch);
      if (!dada) return;
      const T* branch = static_cast<const T*>(a.saved_branch) + n * a.dim;
      sweep(a.dim, [&](int64_t i, auto part) {
        store(dada + i, load(dada + i, part) + load(dout + i, part) * load(branch + i, part), part);
      });
    });
  }
}

static void sum_backward(const Rows& a, int64_t begin, int64_t end) {
  if (a.dtype == 0) return sum_backward_of<float, float>(a, begin, end);
  a.wide_dtype == 1 ? sum_backward_of<bf16, bf16>(a, begin, end) : sum_backward_of<bf16, float>(a, begin, end);
}
