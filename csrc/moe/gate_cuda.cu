// One warp a token; lane l holds the logits of V adjacent experts, so that of equal scores the
// lowest lane, and in it the lowest slot, is the lowest expert.
#include "common/cuda.cuh"
#include "moe/gate.h"

namespace sparsemoe {
namespace {

constexpr int kThreads = 128;

// Slots of a lane that may still be chosen, as order keys (0: not), with its best at hand.
template <int V>
struct Candidates {
  uint32_t key[V];
  uint32_t best;
  int slot;

  __device__ void find_best() {
    best = 0;
    slot = 0;
#pragma unroll
    for (int i = 0; i < V; ++i) {
      if (key[i] > best) {
        best = key[i];
        slot = i;
      }
    }
  }
  // The best expert of the warp, or -1; it cannot be taken again.
  __device__ int take() {
    const uint32_t top = __reduce_max_sync(kFullWarp, best);
    const int winner = __ffs(__ballot_sync(kFullWarp, best == top)) - 1;
    const int expert = __shfl_sync(kFullWarp, lane_id() * V + slot, winner);
    if (top == 0) return -1;
    if (lane_id() == winner) {
#pragma unroll
      for (int i = 0; i < V; ++i) {
        if (i == slot) key[i] = 0;
      }
      find_best();
    }
    return expert;
  }
};

// Excludes the experts outside the topk_group groups whose two best choices sum highest.
template <int V>
__device__ void limit_groups(const GateParams& p, uint32_t (&key)[V]) {
  const int size = int(p.n_experts / p.n_group);
  int group[V];
#pragma unroll
  for (int i = 0; i < V; ++i) group[i] = (lane_id() * V + i) / size;
  uint32_t group_key = 0;  // of group number lane_id()
  for (int g = 0; g < p.n_group; ++g) {
    uint32_t first = 0, second = 0;
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const uint32_t k = group[i] == g ? key[i] : 0;
      second = k > first ? first : max(second, k);
      first = max(first, k);
    }
    const uint32_t best = __reduce_max_sync(kFullWarp, first);
    const int winner = __ffs(__ballot_sync(kFullWarp, first == best)) - 1;
    if (lane_id() == winner) first = second;
    const uint32_t next = __reduce_max_sync(kFullWarp, first);
    float sum = key_to_float(best);
    if (size > 1) sum += key_to_float(next);
    if (lane_id() == g) group_key = order_key(sum != sum ? -kInfinity : sum);
  }
  uint32_t kept = 0;
  for (int i = 0; i < p.topk_group; ++i) {
    const uint32_t best = __reduce_max_sync(kFullWarp, group_key);
    const int g = __ffs(__ballot_sync(kFullWarp, group_key == best)) - 1;
    if (lane_id() == g) group_key = 0;
    kept |= 1u << g;
  }
#pragma unroll
  for (int i = 0; i < V; ++i) {
    if (group[i] >= 32 || !((kept >> group[i]) & 1)) key[i] = 0;
  }
}

template <class T, int V>
__global__ void __launch_bounds__(kThreads) gate_kernel(const GateParams p, bool aligned) {
  const int64_t t = blockIdx.x * int64_t(kThreads / 32) + warp_id();
  if (t >= p.n_tokens) return;
  const int lane = lane_id(), n = int(p.n_experts), k = int(p.top_k);
  float* weights = static_cast<float*>(p.weights) + t * k;
  int32_t* experts = p.experts + t * k;
  float* logsumexp = static_cast<float*>(p.logsumexp) + t;
  if (p.mask && !p.mask[t]) {
    if (lane < k) {
      weights[lane] = 0;
      experts[lane] = -1;
    }
    if (lane == 0) *logsumexp = 0;
    return;
  }

  const T* row = static_cast<const T*>(p.logits) + t * p.logits_stride;
  float logit[V];
  load_row<V>(row, n, aligned, -kInfinity, logit);

  // log-sum-exp, with the shift of torch.logsumexp: none where the largest is infinite.
  float top = -kInfinity;
#pragma unroll
  for (int i = 0; i < V; ++i) top = fmaxf(top, logit[i]);
  top = warp_max(top);
  const float shift = isinf(top) ? 0.0f : top;
  float sum = 0;
#pragma unroll
  for (int i = 0; i < V; ++i) sum += expf(logit[i] - shift);
  const float lse = shift + logf(warp_sum(sum));
  if (lane == 0) *logsumexp = lse;

  const float* bias = static_cast<const float*>(p.bias);
  const float* threshold = static_cast<const float*>(p.threshold);
  const bool softmax = p.scoring == Scoring::softmax, sigmoid = p.scoring == Scoring::sigmoid;
  Candidates<V> candidates;
#pragma unroll
  for (int i = 0; i < V; ++i) {
    candidates.key[i] = lane * V + i < n ? order_key(logit[i]) : 0;
  }
  if (bias || p.n_group > 1 || threshold) {
    uint32_t below = 0;
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const int e = lane * V + i;
      if (e >= n) continue;
      float score = logit[i];
      if (softmax) score = expf(logit[i] - lse);
      if (sigmoid) score = 1 / (1 + expf(-logit[i]));
      if (threshold && !(score >= threshold[e])) below |= 1u << i;
      if (bias || p.n_group > 1) {
        const float choice = bias ? score + bias[e] : score;
        candidates.key[i] = order_key(choice != choice ? -kInfinity : choice);
      }
    }
    if (p.n_group > 1) limit_groups<V>(p, candidates.key);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      if ((below >> i) & 1) candidates.key[i] = 0;
    }
  }

  // Choose; then lane j weighs choice j.
  candidates.find_best();
  int expert = -1;
  for (int j = 0; j < k; ++j) {
    const int chosen = candidates.take();
    if (lane == j) expert = chosen;
  }
  const bool over_chosen = !sigmoid && (!softmax || p.renormalize);
  const float chosen_logit = expert >= 0 ? to_float(row[expert]) : -kInfinity;
  const float base = over_chosen ? warp_max(chosen_logit) : lse;
  float weight = 0;
  if (expert >= 0) {
    weight = sigmoid ? 1 / (1 + expf(-chosen_logit)) : expf(chosen_logit - base);
  }
  if (over_chosen || (sigmoid && p.renormalize)) {
    const float total = warp_sum(weight);
    if (expert >= 0) weight /= sigmoid ? total + 1e-20f : total;
  }
  if (lane < k) {
    weights[lane] = weight * float(p.scale);
    experts[lane] = expert;
  }
}

template <class T, int V>
__global__ void __launch_bounds__(kThreads)
    gate_backward_kernel(const GateBackwardParams p, bool aligned, bool aligned_out) {
  const int64_t t = blockIdx.x * int64_t(kThreads / 32) + warp_id();
  if (t >= p.n_tokens) return;
  const int lane = lane_id(), n = int(p.n_experts), k = int(p.top_k);
  T* out = static_cast<T*>(p.grad_logits) + t * n;
  float grad[V];
  if (p.mask && !p.mask[t]) {
#pragma unroll
    for (int i = 0; i < V; ++i) grad[i] = 0;
    store_row<V>(out, n, aligned_out, grad);
    return;
  }
  const T* row = static_cast<const T*>(p.logits) + t * p.logits_stride;
  const bool softmax = p.scoring == Scoring::softmax, sigmoid = p.scoring == Scoring::sigmoid;
  const bool over_chosen = !sigmoid && (!softmax || p.renormalize);

  int expert = -1;
  float grad_weight = 0, weight = 0;
  if (lane < k) {
    expert = p.experts[t * k + lane];
    grad_weight = static_cast<const float*>(p.grad_weights)[t * k + lane];
    weight = static_cast<const float*>(p.weights)[t * k + lane];
  }
  if (expert >= n) expert = -1;
  const float inner = warp_sum(expert >= 0 ? grad_weight * weight : 0.0f);
  const float lse = static_cast<const float*>(p.logsumexp)[t];
  const float grad_lse = static_cast<const float*>(p.grad_logsumexp)[t];
  // d logsumexp / d logit is the probability; so is the dense part of an unnormalised softmax.
  const float dense = grad_lse - (softmax && !p.renormalize ? inner : 0.0f);
  if (dense == 0) {
#pragma unroll
    for (int i = 0; i < V; ++i) grad[i] = 0;
  } else {
    load_row<V>(row, n, aligned, -kInfinity, grad);
#pragma unroll
    for (int i = 0; i < V; ++i) grad[i] = dense * expf(grad[i] - lse);
  }
  const float mean =
      over_chosen || (sigmoid && p.renormalize) ? inner / float(p.scale) : 0.0f;
  float sparse = 0;
  if (expert >= 0) {
    sparse = weight * (grad_weight - mean);
    if (sigmoid) sparse *= 1 - 1 / (1 + expf(-to_float(row[expert])));
  }
  for (int j = 0; j < k; ++j) {
    const int e = __shfl_sync(kFullWarp, expert, j);
    const float g = __shfl_sync(kFullWarp, sparse, j);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      if (e == lane * V + i) grad[i] += g;
    }
  }
  store_row<V>(out, n, aligned_out, grad);
}

}  // namespace

int gate_cuda(const GateParams& p, void* stream) {
  const unsigned blocks = unsigned(ceil_div(p.n_tokens, kThreads / 32));
  return with_cuda_dtype(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    return with_lane_width(p.n_experts, [&](auto width) {
      constexpr int V = decltype(width)::value;
      gate_kernel<T, V><<<blocks, kThreads, 0, cudaStream_t(stream)>>>(
          p, rows_aligned<V, T>(p.logits, p.n_experts, p.logits_stride));
      return int(cudaGetLastError());
    });
  });
}

int gate_backward_cuda(const GateBackwardParams& p, void* stream) {
  const unsigned blocks = unsigned(ceil_div(p.n_tokens, kThreads / 32));
  return with_cuda_dtype(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    return with_lane_width(p.n_experts, [&](auto width) {
      constexpr int V = decltype(width)::value;
      gate_backward_kernel<T, V><<<blocks, kThreads, 0, cudaStream_t(stream)>>>(
          p, rows_aligned<V, T>(p.logits, p.n_experts, p.logits_stride),
          rows_aligned<V, T>(p.grad_logits, p.n_experts, p.n_experts));
      return int(cudaGetLastError());
    });
  });
}

}  // namespace sparsemoe
