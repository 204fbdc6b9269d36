// The CPU kernels: one table of functions per instruction set, chosen once by what the processor offers.
//
// Every function works on a range of units (blocks of tokens or rows) whose size is fixed here, never by the number of
// threads: what is summed in which order, and with it every bit of a result, does not depend on the threads.
// Tensors are contiguous. "T" is float or bfloat16 (dtype 0, 1); mathematics and sums are in float.
#pragma once
#include <cstdint>

namespace dsmoe {

constexpr int64_t kTokens = 64;  // tokens of a unit (where images matter: of one image)
constexpr int64_t kRows = 32;    // rows of a unit: of one expert
constexpr int64_t kHidden = 24;  // rows of an expert's first matrices whose gradients are a unit

inline int64_t units_of(int64_t count, int64_t size) { return (count + size - 1) / size; }

struct Route {
  int dtype, renormalize;
  int64_t tokens, dim, experts, k;
  const void* x;         // T [N, D]
  const float* weight;   // [E, D]
  const float* bias;     // [E] or null
  float *probs, *gates;  // [N, E], [N, k]
  int64_t* indices;      // [N, k]
  float* logsumexp;      // [N]
  int64_t* histogram;    // [units, E]: choices; `place` expects the first row of each unit and expert here
  float* prob_sum;       // [units, E]
  int64_t *order, *position;
};

struct RouteBackward {
  int renormalize;
  int64_t tokens, experts, k;
  const float *probs, *gates;
  const int64_t* indices;
  const float *dprobs, *dgates, *dlogsumexp, *dprob_sum;  // each may be null
  float* dlogits;                                         // [N, E]
};

struct Rows {
  int dtype, wide_dtype;  // of T; of the sum, or of its gradient
  int64_t tokens, dim, k, images, ada_stride;
  const void *rows, *add, *residual, *ada;  // T [R, D], [N, D], [N, D], [images, D]; all but rows may be null
  const int64_t *order, *position;
  const float* gates;  // [N, k] or null
  void *out, *branch;  // [N, D]; branch T, may be null
  // backward; every output may be null
  const void *dout, *saved_branch;
  void *drows, *dbranch;
  float *dgates, *dada;  // dada [units, D]: sums over the tokens of a unit; units of one image stand together
};

struct ActUnit {
  int64_t expert, begin, end;
};

struct Act {
  int dtype, gelu;
  int64_t hidden;
  const ActUnit* units;
  const void *h, *up, *dout;  // T [R, F]
  const float *bias, *gate;   // [E, F], [R]; may be null
  void *out, *dh, *dup;       // T [R, F]; `out` may be null in backward
  float *dgate, *dbias;       // [R]; [units, F], null without bias
};

struct GluBlock {
  int64_t expert, row, count;  // rows [row, row + count), at most Kernels::lanes, all of one expert
};

// SwiGLU experts, tokens to rows; blocks in the order of rows, an expert's first ones full.
struct Glu {
  int dtype;
  int64_t dim, hidden, k;
  const GluBlock* blocks;
  const void* x;          // T: row r is x[order[r] / k], or x[r] without order
  const int64_t* order;   // [R] or null
  const float* gates;     // [N, k], of row r the one at order[r]; null: all 1
  const void *w1, *w2, *w3;  // T [E, F, D], [E, D, F], [E, F, D]
  void *h, *up;           // T, R F numbers in an order of their own: written forward, read backward; null: not kept
  void* y;                // T [R, D]
};

// Gradients of one expert, of blocks [first, last). Units: blocks for the rows; kHidden rows of w1 for the weights.
struct GluBackward {
  const Glu* forward;
  int64_t first, last, height;  // height: kLanes for each block
  const void* dy;               // T [N, D], or [R, D] without order
  void* dx;                     // T [R, D]
  float* dgates;                // [N, k] or null
  float *dh, *dup, *a;          // [blocks][F][lanes], handed from the rows to the weights; a null: no weights
  float *x_strips, *dy_strips;  // [ceil(D / lanes)][height][lanes], likewise
  void *dw1, *dw2, *dw3;        // T, as the weights
};

struct Modulate {
  int dtype;
  int64_t images, tokens, dim;
  const void *x, *dout;        // T [B, T, D]
  const float *shift, *scale;  // [B, D]
  void* out;                   // y, or dx
  float *mean, *rstd;          // [B, T]
  float* partial;              // backward: [units, 2, D], sums of dshift and dscale; units of one image stand together
};

struct Kernels {
  const char* name;
  void (*route)(const Route&, int64_t, int64_t);
  void (*place)(const Route&, int64_t, int64_t);
  void (*route_backward)(const RouteBackward&, int64_t, int64_t);  // range of tokens
  void (*gather)(const Rows&, int64_t, int64_t);                   // range of rows
  void (*sum)(const Rows&, int64_t, int64_t);                      // range of tokens
  void (*sum_backward)(const Rows&, int64_t, int64_t);
  void (*act)(const Act&, int64_t, int64_t);
  void (*act_backward)(const Act&, int64_t, int64_t);
  int64_t lanes;
  void (*glu)(const Glu&, int64_t, int64_t);  // range of blocks
  void (*glu_rows)(const GluBackward&, int64_t, int64_t);
  void (*glu_weights)(const GluBackward&, int64_t, int64_t);
  void (*modulate)(const Modulate&, int64_t, int64_t);
  void (*modulate_backward)(const Modulate&, int64_t, int64_t);
};

extern const Kernels kernels_base, kernels_avx512, kernels_avx512bf16;
const Kernels& kernels();  // the best that this processor runs

// launchers.cpp: the whole of it, with blocks of counts [E] rows; scratch and blocks are theirs. Experts without rows
// get zero gradients.
void run_glu(Glu, int64_t E, const int64_t* counts);
void run_glu_backward(Glu, GluBackward, int64_t E, const int64_t* counts, bool weights);

}  // namespace dsmoe
