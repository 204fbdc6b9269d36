// The C interface of the CUDA kernels: raw pointers, sizes and a stream; no torch type, no torch header.
//
// Every *.cu file of this folder is one translation unit. nvcc builds it with functions named NAME_cuda; g++ builds
// the same file against ../emulation (g++ -std=c++17 -x c++ FILE.cu) with functions named NAME_emu, which run on host
// memory and ignore the stream. Callers declare either set by defining DSMOE_SYM before including this header.
//
// Return value of every launcher: 0; or a cudaError_t; or DSMOE_NOT_COVERED (-1), in which case nothing was launched
// and the caller takes its fallback (the conditions stand with each function; all functions: sizes that are negative,
// N * k or R >= 2^31, an unknown dtype).
// No launcher allocates, waits for the device or reads device memory on the host: all can be captured in a CUDA graph.
// Results are the same bits on every run: there are no float atomics, and sums have a fixed order.
//
// Shapes: N tokens, D dim, E experts (1 to 64), k choices (1, 2 or 4, at most E), R = N * k rows in expert order (all
// rows of expert 0 first), F hidden size of an expert, B images. A slot is (token n, choice j), number n * k + j.
// Tensors are contiguous unless a stride (in elements) is passed. "T" is the dtype named by `dtype`. Sums and
// everything typed float* are float32. Any pointer marked `?` may be null: an absent input, or an output not wanted.
// Pointers need only the alignment of their element: rows that are not 16-byte aligned take a slower path with the
// same result. Scratch must be 16-byte aligned, of at least the bytes told by *_scratch_bytes; it may hold anything.
// Any size may be 0: outputs that are sums are then zero.
#pragma once
#include <stdint.h>

#ifndef DSMOE_SYM
#ifdef __CUDACC__
#define DSMOE_SYM(name) name##_cuda
#else
#define DSMOE_SYM(name) name##_emu
#endif
#endif

#define DSMOE_NOT_COVERED (-1)
#define DSMOE_FLOAT32 0
#define DSMOE_BFLOAT16 1
#define DSMOE_FLOAT16 2
#define DSMOE_SWIGLU 0  // silu(h) * up
#define DSMOE_GELU 1    // gelu_tanh(h + bias)

#ifdef __cplusplus
extern "C" {
#endif

// ---- route.cu ------------------------------------------------------------------------------------------------------
// Top-k softmax routing, the meaning of dsmoe/ops/reference/routing.py.
//   x [N,D] T, weight [E,D] T, bias? [E] (added to the probabilities for the choice alone)
//   probs [N,E], gates [N,k], indices [N,k], counts [E], ends [E] (running count, inclusive), order [N*k] (slot of
//   each row), position [N,k] (row of each slot), logsumexp [N], prob_sum [E] (sum of probs over tokens)
// Equal scores go to the lower expert; NaN counts as the largest, so NaN or Inf logits still give indices in range
// and an order that is a permutation.
int64_t DSMOE_SYM(dsmoe_route_scratch_bytes)(int64_t N, int E);
int DSMOE_SYM(dsmoe_route)(int dtype, int64_t N, int64_t D, int E, int k, int renormalize, const void* x,
                           const void* weight, const float* bias, float* probs, float* gates, int64_t* indices,
                           int64_t* counts, int32_t* ends, int64_t* order, int64_t* position, float* logsumexp,
                           float* prob_sum, void* scratch, void* stream);

// Gradient of the logits (= x @ weight.T) from those of probs? [N,E], gates? [N,k], logsumexp? [N], prob_sum? [E], in
// one pass: dlogits [N,E]. probs, gates, indices as given by dsmoe_route with the same renormalize.
int DSMOE_SYM(dsmoe_route_backward)(int64_t N, int E, int k, int renormalize, const float* probs, const float* gates,
                                    const int64_t* indices, const float* dprobs, const float* dgates,
                                    const float* dlogsumexp, const float* dprob_sum, float* dlogits, void* stream);

// ---- rows.cu -------------------------------------------------------------------------------------------------------
// rows[r] = x[order[r] / k]: x [N,D] T, order [N*k] -> rows [N*k,D] T.
int DSMOE_SYM(dsmoe_gather_rows)(int dtype, int64_t N, int64_t D, int k, const void* x, const int64_t* order,
                                 void* rows, void* stream);

// branch[n] = sum_j gates?[n,j] * rows[position[n,j]] + add?[n]
// out[n]    = residual?[n] + ada_gate?[image of n] * branch[n], the image of n being n / (N / images)
//   rows [N*k,D] T, position [N,k], gates? [N,k] (1 when null), add? [N,D] T (the shared expert's output),
//   residual? [N,D] T, ada_gate? [images,D] T with row stride ada_stride -> out [N,D], branch? [N,D] T (rounded, for
//   the backward of ada_gate).
// out_dtype is dtype or DSMOE_FLOAT32. N must be a multiple of images; images = 1 without ada_gate.
int DSMOE_SYM(dsmoe_sum_rows)(int dtype, int out_dtype, int64_t N, int64_t D, int k, int64_t images, const void* rows,
                              const int64_t* position, const float* gates, const void* add, const void* residual,
                              const void* ada_gate, int64_t ada_stride, void* out, void* branch, void* stream);

// Backward of dsmoe_sum_rows. dout [N,D] of dout_dtype (dtype or DSMOE_FLOAT32); the gradient of residual is dout.
//   dbranch[n]            = ada_gate?[image] * dout[n]             [N,D] T ? (also the gradient of `add`)
//   drows[position[n,j]]  = gates?[n,j] * dbranch[n]               [N*k,D] T ?
//   dgates[n,j]           = <dbranch[n], rows[position[n,j]]>      [N,k] ?    needs rows, gates
//   dada_gate[i]          = sum over tokens of image i of dout[n] * branch[n]   [images,D] T ?   needs branch, ada_gate
// Not covered: D > 8192.
int64_t DSMOE_SYM(dsmoe_sum_rows_backward_scratch_bytes)(int64_t N, int64_t D, int64_t images);
int DSMOE_SYM(dsmoe_sum_rows_backward)(int dtype, int dout_dtype, int64_t N, int64_t D, int k, int64_t images,
                                       const void* dout, const void* rows, const int64_t* position, const float* gates,
                                       const void* branch, const void* ada_gate, int64_t ada_stride, void* drows,
                                       float* dgates, void* dbranch, void* dada_gate, void* scratch, void* stream);

// ---- activation.cu -------------------------------------------------------------------------------------------------
// a[r] = gate?[r] * act(r); act = silu(h) * up (DSMOE_SWIGLU; up required, bias and ends ignored) or
// gelu_tanh(h + bias[e(r)]) (DSMOE_GELU; up ignored; bias? [E,F] T with row stride bias_stride, which needs ends [E]).
//   h, up [R,F] T, gate? [R] -> a [R,F] T. e(r) is the number of ends <= r. With a bias, rows from ends[E-1] on are
//   padding: their a (and every gradient) is 0.
int DSMOE_SYM(dsmoe_expert_act)(int dtype, int kind, int64_t R, int64_t F, int E, const void* h, const void* up,
                                const void* bias, int64_t bias_stride, const int32_t* ends, const float* gate, void* a,
                                void* stream);

// Backward: da [R,F] T -> dh [R,F] T, dup [R,F] T (DSMOE_SWIGLU), dbias? [E,F] T contiguous (DSMOE_GELU with bias),
// dgate? [R] = <da[r], act(r)>, a? [R,F] T (the forward's result again, for the weight gradient).
// Not covered: F > 8192. Scratch is used only when dbias is wanted.
int64_t DSMOE_SYM(dsmoe_expert_act_backward_scratch_bytes)(int64_t R, int64_t F, int E);
int DSMOE_SYM(dsmoe_expert_act_backward)(int dtype, int kind, int64_t R, int64_t F, int E, const void* da,
                                         const void* h, const void* up, const void* bias, int64_t bias_stride,
                                         const int32_t* ends, const float* gate, void* dh, void* dup, void* dbias,
                                         float* dgate, void* a, void* scratch, void* stream);

// ---- modulate.cu ---------------------------------------------------------------------------------------------------
// y[b,t] = layer_norm(x[b,t]) * (1 + scale[b]) + shift[b]; eps 1e-6, no affine parameters, float32 inside.
//   x [B,T,D] T, shift and scale [B,D] T with row stride mod_stride -> y [B,T,D] T, mean? and rstd? [B,T].
// Not covered: D > 4096.
int DSMOE_SYM(dsmoe_modulate)(int dtype, int64_t B, int64_t T, int64_t D, const void* x, const void* shift,
                              const void* scale, int64_t mod_stride, void* y, float* mean, float* rstd, void* stream);

// dy, x [B,T,D] T, scale as above, mean, rstd [B,T] -> dx [B,T,D] T, dshift and dscale [B,D] T contiguous.
// Not covered: D > 4096.
int64_t DSMOE_SYM(dsmoe_modulate_backward_scratch_bytes)(int64_t B, int64_t T, int64_t D);
int DSMOE_SYM(dsmoe_modulate_backward)(int dtype, int64_t B, int64_t T, int64_t D, const void* dy, const void* x,
                                       const void* scale, int64_t mod_stride, const float* mean, const float* rstd,
                                       void* dx, void* dshift, void* dscale, void* scratch, void* stream);

// ---- grouped_glu.cu, grouped_dglu.cu (tier B) ----------------------------------------------------------------------
// On Hopper's tensor cores (wgmma, TMA), sums in float32. Both take their rows from tokens [N,D] by `order` [N*k] (slot
// of each row; its token is slot / k), or with order null and k = 1 rows [N,D] that already lie in expert order. e(r)
// is the number of ends <= r; rows from ends[E-1] on are not written. With shared_F > 0 (which needs `order`) the
// shared expert's products over all N tokens are further tiles of the same launch, without gate; all shared_* inputs
// must then be given.
// Not covered: a device other than compute capability 9.0 (dsmoe_has_wgmma says 1 where it serves, and reads only the
// device's properties); dtype other than bfloat16; D, F or shared_F not a multiple of 8; a pointer that is not 16-byte
// aligned; D = 0 or F = 0.
int DSMOE_SYM(dsmoe_has_wgmma)();

// The experts' first product with SwiGLU and the gate in its epilogue:
//   h = row r times w_gate[e(r)]^T, up = row r times w_up[e(r)]^T, a = gate?[r] * silu(h) * up
//   w_gate and w_up [E,F,D] T, ends [E] -> a [R,F] T, h? and up? [R,F] T (for the backward).
//   shared_gate and shared_up [shared_F,D] T -> shared_a [N,shared_F] T, shared_h? and shared_up_out? of that shape.
int DSMOE_SYM(dsmoe_grouped_glu)(int dtype, int64_t N, int64_t D, int64_t F, int E, int k, const void* x,
                                 const int64_t* order, const void* w_gate, const void* w_up, const int32_t* ends,
                                 const float* gate, void* a, void* h, void* up, int64_t shared_F,
                                 const void* shared_gate, const void* shared_up, void* shared_a, void* shared_h,
                                 void* shared_up_out, void* stream);

// The backward of the second product with that of SwiGLU and the gate in its epilogue; da is never written:
//   da = row r of dy times w2[e(r)], w2 [E,D,F] T; h, up [R,F] T, gate? [R] as in the forward
//   -> dh, dup [R,F] T, a? [R,F] T (gate * act, for the weight gradient), dgate? [R] = <da[r], act(r)>.
//   shared_w2 [D,shared_F], shared_h, shared_up [N,shared_F] T -> shared_dh, shared_dup, shared_a? of that shape.
// Scratch is used only when dgate is wanted.
int64_t DSMOE_SYM(dsmoe_grouped_dglu_scratch_bytes)(int64_t R, int64_t F);
int DSMOE_SYM(dsmoe_grouped_dglu)(int dtype, int64_t N, int64_t D, int64_t F, int E, int k, const void* dy,
                                  const int64_t* order, const void* w2, const int32_t* ends, const void* h,
                                  const void* up, const float* gate, void* dh, void* dup, void* a, float* dgate,
                                  int64_t shared_F, const void* shared_w2, const void* shared_h,
                                  const void* shared_up, void* shared_dh, void* shared_dup, void* shared_a,
                                  void* scratch, void* stream);

#ifdef __cplusplus
}
#endif
