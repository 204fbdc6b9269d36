// Gradient of the router's logits from everything that depends on them, in one pass over the probabilities.
#pragma once
#include "reduce.cuh"
#include "route_choose.cuh"

namespace dsmoe {

struct RouteGradients {  // of what dsmoe_route gave; any may be null
  const float *probs, *gates, *logsumexp, *prob_sum;
};

// With p the probabilities of a token and S the sum of the chosen ones:
//   dp[e]   = dprobs[e] + dprob_sum[e] + (the gate's share, for a chosen e)
//   share_j = dgate_j, or (dgate_j - sum_l dgate_l gate_l) / S when the gates were divided by S
//   dlogit  = p * (dp - <p, dp> + dlogsumexp)
template <int kPadded>
__global__ void __launch_bounds__(kRouteWarps* kWarp)
    route_backward(const float* __restrict__ probs, const float* __restrict__ gates,
                   const int64_t* __restrict__ indices, RouteGradients d, RouteShape shape,
                   float* __restrict__ dlogits) {
  using S = Segments<kPadded>;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const S at(lane);
  const int64_t token = (static_cast<int64_t>(blockIdx.x) * kRouteWarps + warp) * S::tokens + at.segment;
  const bool active = token < shape.tokens;
  int chosen[kMaxChoices] = {};
  float share[kMaxChoices] = {};
  if (active && d.gates) {
    float chosen_sum = 0.f, projected = 0.f;
#pragma unroll
    for (int j = 0; j < kMaxChoices; j++) {
      if (j >= shape.k) break;
      chosen[j] = static_cast<int>(indices[token * shape.k + j]);
      share[j] = d.gates[token * shape.k + j];
      if (shape.renormalize) {
        chosen_sum += probs[token * shape.experts + chosen[j]];
        projected += share[j] * gates[token * shape.k + j];
      }
    }
    if (shape.renormalize) {
#pragma unroll
      for (int j = 0; j < kMaxChoices; j++)
        if (j < shape.k) share[j] = (share[j] - projected) / chosen_sum;
    }
  }
  float p[S::values] = {}, dp[S::values] = {}, product = 0.f;
#pragma unroll
  for (int v = 0; v < S::values; v++) {
    const int e = at.expert(v);
    if (!active || e >= shape.experts) continue;
    p[v] = probs[token * shape.experts + e];
    if (d.probs) dp[v] += d.probs[token * shape.experts + e];
    if (d.prob_sum) dp[v] += d.prob_sum[e];
#pragma unroll
    for (int j = 0; j < kMaxChoices; j++)
      if (j < shape.k && d.gates && chosen[j] == e) dp[v] += share[j];
    product += p[v] * dp[v];
  }
  product = S::sum(product);
  if (!active) return;
  const float dlogsumexp = d.logsumexp ? d.logsumexp[token] : 0.f;
#pragma unroll
  for (int v = 0; v < S::values; v++) {
    const int e = at.expert(v);
    if (e < shape.experts) dlogits[token * shape.experts + e] = p[v] * (dp[v] - product + dlogsumexp);
  }
}

}  // namespace dsmoe
