// Tokens to expert rows and back, and the backward of the weighted sum. No scatter-add: every output has one writer.
#pragma once
#include "numbers.cuh"
#include "reduce.cuh"

namespace dsmoe {

constexpr int kRowThreads = 256;  // of the kernels with a warp for each row
constexpr int kRowWarps = kRowThreads / kWarp;

// rows[r] = x[order[r] / k]: a warp for each row. Slots and tokens fit 32 bits, whose division needs no subroutine.
template <class T, bool kVector>
__global__ void __launch_bounds__(kRowThreads)
    gather_rows(const T* __restrict__ x, const int64_t* __restrict__ order, int64_t rows, int dim, int k,
                T* __restrict__ out) {
  const int lane = threadIdx.x % kWarp;
  const int64_t r = static_cast<int64_t>(blockIdx.x) * kRowWarps + threadIdx.x / kWarp;
  if (r >= rows) return;
  const T* from = x + static_cast<int64_t>(static_cast<unsigned>(order[r]) / static_cast<unsigned>(k)) * dim;
  T* into = out + r * dim;
#pragma unroll 4
  for (int turn = 0; turn * kWarp * 8 < dim; turn++) {
    const Columns<kVector> columns(lane, kWarp, turn);
    Raw8<T, kVector> raw;
    raw.load(from, columns, dim);
    raw.store(into, columns, dim);
  }
}

template <class T>
struct SumRowsInputs {
  const T* rows;
  const int64_t* position;
  const float* gates;   // the rest may be null
  const T *add, *residual, *ada_gate;
  int64_t ada_stride, tokens_per_image;
};

// See dsmoe_sum_rows: a warp for each token. The k terms are added in slot order, then `add`, in float32.
template <class T, class Out, int kChoices, bool kVector>
__global__ void __launch_bounds__(kRowThreads)
    sum_rows(SumRowsInputs<T> in, int64_t tokens, int dim, Out* __restrict__ out, T* __restrict__ branch) {
  const int lane = threadIdx.x % kWarp;
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kRowWarps + threadIdx.x / kWarp;
  if (n >= tokens) return;
  const T* row[kChoices];
  float gate[kChoices];
#pragma unroll
  for (int j = 0; j < kChoices; j++) {
    row[j] = in.rows + in.position[n * kChoices + j] * dim;
    gate[j] = in.gates ? in.gates[n * kChoices + j] : 1.f;
  }
  const unsigned image = static_cast<unsigned>(n) / static_cast<unsigned>(in.tokens_per_image);
  const T* ada_gate = in.ada_gate ? in.ada_gate + image * in.ada_stride : nullptr;
#pragma unroll 2
  for (int turn = 0; turn * kWarp * 8 < dim; turn++) {
    const Columns<kVector> columns(lane, kWarp, turn);
    Raw8<T, kVector> raw[kChoices], raw_add, raw_residual;
#pragma unroll
    for (int j = 0; j < kChoices; j++) raw[j].load(row[j], columns, dim);
    if (in.add) raw_add.load(in.add + n * dim, columns, dim);
    if (in.residual) raw_residual.load(in.residual + n * dim, columns, dim);
    float sum[8] = {}, v[8];
#pragma unroll
    for (int j = 0; j < kChoices; j++) {
      raw[j].get(v);
#pragma unroll
      for (int i = 0; i < 8; i++) sum[i] = fmaf(gate[j], v[i], sum[i]);
    }
    if (in.add) {
      raw_add.get(v);
#pragma unroll
      for (int i = 0; i < 8; i++) sum[i] += v[i];
    }
    if (branch) store8<T, kVector>(branch + n * dim, columns, dim, sum);
    if (ada_gate) {
      load8<T, kVector>(ada_gate, columns, dim, v);
#pragma unroll
      for (int i = 0; i < 8; i++) sum[i] *= v[i];
    }
    if (in.residual) {
      raw_residual.get(v);
#pragma unroll
      for (int i = 0; i < 8; i++) sum[i] += v[i];
    }
    store8<Out, kVector>(out + n * dim, columns, dim, sum);
  }
}

constexpr int kSumChunk = 16;    // tokens of a block of the backward
constexpr int kMaxBlockWarps = 32;

template <class T, class Grad>
struct SumRowsGradients {
  const Grad* dout;
  const T* rows;
  const int64_t* position;
  const float* gates;
  const T *branch, *ada_gate;
  int64_t ada_stride, tokens_per_image;
  T* drows;
  float* dgates;
  T* dbranch;
  float* ada_partial;  // [images, chunks, dim]
};

// See dsmoe_sum_rows_backward. A block has kSumChunk tokens of one image, a thread 8 columns of all of them: so the sum
// over tokens (gradient of ada_gate) stays in registers, and the sums over columns (gradients of the gates) wait in
// shared memory for a single barrier at the end.
template <class T, class Grad, int kChoices, bool kVector>
__global__ void __launch_bounds__(1024)
    sum_rows_backward(SumRowsGradients<T, Grad> g, int dim, int chunks) {
  DSMOE_SHARED(float, warp_dot, [kSumChunk][kChoices][kMaxBlockWarps]);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const int64_t image = blockIdx.x / chunks, chunk = blockIdx.x % chunks;
  const int64_t in_image = chunk * kSumChunk, left = g.tokens_per_image - in_image;
  const int count = left < kSumChunk ? static_cast<int>(left) : kSumChunk;
  const int64_t first = image * g.tokens_per_image + in_image;
  const Columns<kVector> columns(threadIdx.x, blockDim.x, 0);
  float ada[8], ada_sum[8] = {};
  if (g.ada_gate) load8<T, kVector>(g.ada_gate + image * g.ada_stride, columns, dim, ada);
  for (int t = 0; t < count; t++) {
    const int64_t n = first + t;
    float d[8], v[8];
    load8<Grad, kVector>(g.dout + n * dim, columns, dim, d);
    if (g.ada_partial) {
      load8<T, kVector>(g.branch + n * dim, columns, dim, v);
#pragma unroll
      for (int i = 0; i < 8; i++) ada_sum[i] = fmaf(d[i], v[i], ada_sum[i]);
    }
    if (g.ada_gate) {
#pragma unroll
      for (int i = 0; i < 8; i++) d[i] *= ada[i];
    }
    if (g.dbranch) store8<T, kVector>(g.dbranch + n * dim, columns, dim, d);
#pragma unroll
    for (int j = 0; j < kChoices; j++) {
      const int64_t row = g.position[n * kChoices + j] * dim;
      const float gate = g.gates ? g.gates[n * kChoices + j] : 1.f;
      if (g.dgates) {
        load8<T, kVector>(g.rows + row, columns, dim, v);
        float dot = 0.f;
#pragma unroll
        for (int i = 0; i < 8; i++) dot = fmaf(d[i], v[i], dot);
        dot = warp_sum(dot);
        if (lane == 0) warp_dot[t][j][warp] = dot;
      }
      if (g.drows) {
#pragma unroll
        for (int i = 0; i < 8; i++) v[i] = gate * d[i];
        store8<T, kVector>(g.drows + row, columns, dim, v);
      }
    }
  }
  if (g.ada_partial)
    store8<float, kVector>(g.ada_partial + (image * chunks + chunk) * dim, columns, dim, ada_sum);
  if (!g.dgates) return;
  __syncthreads();
  for (int i = threadIdx.x; i < count * kChoices; i += blockDim.x) {
    float dot = 0.f;
    for (int w = 0; w < warps; w++) dot += warp_dot[i / kChoices][i % kChoices][w];
    g.dgates[first * kChoices + i] = dot;
  }
}

}  // namespace dsmoe
