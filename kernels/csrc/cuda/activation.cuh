// What lies between the two expert products: activation, bias and gate, forward and backward.
#pragma once
#include "numbers.cuh"
#include "reduce.cuh"

namespace dsmoe {

constexpr int kActThreads = 256;  // forward: a warp for each row
constexpr int kActWarps = kActThreads / kWarp;
constexpr int kActChunk = 32;     // backward: rows of a block
constexpr int kActMaxWarps = 32;

// The logistic function and its slope value * (1 - value). From q = exp(-|x|): no overflow, and no 1 - value, which
// would lose all digits where the value is near 1. The hardware's approximations are good to about 2^-21; float32 rows
// get the exact forms.
struct Logistic {
  float value, slope;
};
template <class T>
__device__ __forceinline__ Logistic logistic(float x) {
  constexpr bool exact = std::is_same_v<T, float>;
  const float q = exact ? expf(-fabsf(x)) : __expf(-fabsf(x));
  const float right = exact ? 1.f / (1.f + q) : __fdividef(1.f, 1.f + q);
  return {x < 0.f ? q * right : right, q * right * right};
}

// gelu_tanh(x) = x sigmoid(2 u), u = sqrt(2/pi) (x + 0.044715 x^3): the same as x (1 + tanh u) / 2.
constexpr float kGeluScale = 0.7978845608028654f, kGeluCube = 0.044715f;

struct Activated {
  float value, d_first, d_second;  // d_first by h, d_second by up
};
template <class T, int kKind>
__device__ __forceinline__ Activated activate(float h, float up) {
  if constexpr (kKind == DSMOE_SWIGLU) {
    const Logistic s = logistic<T>(h);
    return {h * s.value * up, up * (s.value + h * s.slope), h * s.value};
  } else {
    const Logistic s = logistic<T>(2.f * kGeluScale * (h + kGeluCube * h * h * h));
    const float inner = 2.f * kGeluScale * (1.f + 3.f * kGeluCube * h * h);
    return {h * s.value, s.value + h * s.slope * inner, 0.f};
  }
}

template <class T>
struct ActInputs {
  const T *h, *up, *bias;  // bias may be null
  int64_t bias_stride;
  const int32_t* ends;
  const float* gate;       // may be null
  int experts;
};

// The number of ends <= row, found by a whole warp at once; equal to `experts` for rows past the last expert.
__device__ __forceinline__ int expert_of_row(const int32_t* ends, int experts, int64_t row, int lane) {
  int before = 0;
  for (int first = 0; first < experts; first += kWarp) {
    const int e = first + lane;
    before += __popc(__ballot_sync(kAllLanes, e < experts && ends[e] <= row));
  }
  return before;
}

template <class T, int kKind, bool kVector>
__global__ void __launch_bounds__(kActThreads)
    expert_act(ActInputs<T> in, int64_t rows, int width, T* __restrict__ a) {
  const int lane = threadIdx.x % kWarp;
  const int64_t r = static_cast<int64_t>(blockIdx.x) * kActWarps + threadIdx.x / kWarp;
  if (r >= rows) return;  // the whole warp
  const T* bias = nullptr;
  bool past = false;
  if (kKind == DSMOE_GELU && in.bias) {
    const int e = expert_of_row(in.ends, in.experts, r, lane);
    past = e == in.experts;
    if (!past) bias = in.bias + e * in.bias_stride;
  }
  const float gate = past ? 0.f : in.gate ? in.gate[r] : 1.f;
#pragma unroll 2
  for (int turn = 0; turn * kWarp * 8 < width; turn++) {
    const Columns<kVector> columns(lane, kWarp, turn);
    float h[8], second[8] = {};
    load8<T, kVector>(in.h + r * width, columns, width, h);
    if (kKind == DSMOE_SWIGLU) load8<T, kVector>(in.up + r * width, columns, width, second);
    if (kKind == DSMOE_GELU && bias) {
      load8<T, kVector>(bias, columns, width, second);
#pragma unroll
      for (int i = 0; i < 8; i++) h[i] += second[i];
    }
#pragma unroll
    for (int i = 0; i < 8; i++) h[i] = past ? 0.f : gate * activate<T, kKind>(h[i], second[i]).value;
    store8<T, kVector>(a + r * width, columns, width, h);
  }
}

template <class T>
struct ActGradients {
  const T* da;
  T *dh, *dup;          // dup with DSMOE_SWIGLU
  T* a;                 // may be null
  float* dgate;         // may be null
  float* bias_partial;  // may be null; [blocks + experts, width]
};

// The columns of a thread summed over a run of rows of one expert. Block b keeps its part of expert e in partial row
// b + e: rows are sorted by expert, so from run to run b, e or both grow, and no two runs share a row.
template <bool kVector>
struct BiasRun {
  float sum[8] = {};
  int expert = 0;
  bool open = false;

  __device__ __forceinline__ void close(float* partial, Columns<kVector> columns, int width) {
    if (open && partial)
      store8<float, kVector>(partial + (static_cast<int64_t>(blockIdx.x) + expert) * width, columns, width, sum);
#pragma unroll
    for (int i = 0; i < 8; i++) sum[i] = 0.f;
    open = false;
  }
};

// A block has kActChunk rows, a thread 8 columns of all of them: the bias gradient is summed in registers, and the gate
// gradients (sums over columns) wait in shared memory for a single barrier at the end.
template <class T, int kKind, bool kVector>
__global__ void __launch_bounds__(1024)
    expert_act_backward(ActInputs<T> in, ActGradients<T> g, int64_t rows, int width) {
  DSMOE_SHARED(float, warp_dot, [kActChunk][kActMaxWarps]);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kActChunk, left = rows - first;
  const int count = left < kActChunk ? static_cast<int>(left) : kActChunk;
  const Columns<kVector> columns(threadIdx.x, blockDim.x, 0);
  const bool biased = kKind == DSMOE_GELU && in.bias;
  BiasRun<kVector> run;
  float bias[8] = {};
  if (biased) run.expert = expert_of_row(in.ends, in.experts, first, lane);
  for (int t = 0; t < count; t++) {
    const int64_t r = first + t;
    float da[8], h[8], up[8] = {};
    load8<T, kVector>(g.da + r * width, columns, width, da);
    load8<T, kVector>(in.h + r * width, columns, width, h);
    if (kKind == DSMOE_SWIGLU) load8<T, kVector>(in.up + r * width, columns, width, up);
    bool past = false;
    if (biased) {
      while (run.expert < in.experts && in.ends[run.expert] <= r) {
        run.close(g.bias_partial, columns, width);
        run.expert++;
      }
      past = run.expert == in.experts;
      if (!past && !run.open) {
        load8<T, kVector>(in.bias + run.expert * in.bias_stride, columns, width, bias);
        run.open = true;
      }
    }
    const float gate = past ? 0.f : in.gate ? in.gate[r] : 1.f;
    float dot = 0.f, a[8];
#pragma unroll
    for (int i = 0; i < 8; i++) {
      const Activated act = activate<T, kKind>(h[i] + bias[i], up[i]);
      dot = fmaf(da[i], act.value, dot);
      const float d = gate * da[i];
      h[i] = past ? 0.f : d * act.d_first;
      up[i] = d * act.d_second;
      a[i] = past ? 0.f : gate * act.value;
      run.sum[i] += h[i];
    }
    store8<T, kVector>(g.dh + r * width, columns, width, h);
    if (kKind == DSMOE_SWIGLU) store8<T, kVector>(g.dup + r * width, columns, width, up);
    if (g.a) store8<T, kVector>(g.a + r * width, columns, width, a);
    if (g.dgate) {
      dot = warp_sum(past ? 0.f : dot);
      if (lane == 0) warp_dot[t][warp] = dot;
    }
  }
  run.close(g.bias_partial, columns, width);
  if (!g.dgate) return;
  __syncthreads();
  for (int t = threadIdx.x; t < count; t += blockDim.x) {
    float dot = 0.f;
    for (int w = 0; w < warps; w++) dot += warp_dot[t][w];
    g.dgate[first + t] = dot;
  }
}

constexpr int kBiasStrips = 8;  // partial rows of an expert that are added side by side

// partial as left by BiasRun -> dbias [E, width] T. Block (32 columns, expert).
template <class T>
__global__ void __launch_bounds__(kWarp* kBiasStrips)
    add_bias_partials(const float* __restrict__ partial, const int32_t* __restrict__ ends, int width,
                      T* __restrict__ dbias) {
  DSMOE_SHARED(float, strip_sum, [kBiasStrips][kWarp]);
  const int lane = threadIdx.x % kWarp, strip = threadIdx.x / kWarp, e = blockIdx.y;
  const int column = blockIdx.x * kWarp + lane;
  const int start = e ? ends[e - 1] : 0, end = ends[e];
  float sum = 0.f;
  if (start < end && column < width) {
    for (int64_t chunk = start / kActChunk + strip; chunk <= (end - 1) / kActChunk; chunk += kBiasStrips)
      sum += partial[(chunk + e) * width + column];
  }
  strip_sum[strip][lane] = sum;
  __syncthreads();
  if (strip != 0 || column >= width) return;
  for (int s = 1; s < kBiasStrips; s++) sum += strip_sum[s][lane];
  dbias[static_cast<int64_t>(e) * width + column] = from_float<T>(sum);
}

}  // namespace dsmoe
