// One warp a token; lane l holds the logits of V adjacent experts, so that of equal scores the
// lowest lane, and in it the lowest slot, is the lowest expert.
#include "common/cuda.cuh"
#include "moe/gate.h"

namespace sparsemoe {
namespace {

constexpr int kThreads = 128;

// exp(x) for x <= 0 or so to 2^-22 of itself and 1e-38, in three instructions: these kernels are
// bound by the instructions they issue.
__device__ float quick_exp(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x * 1.4426950408889634f));
  return result;
}
__device__ float quick_sigmoid(float x) { return __fdividef(1.0f, 1.0f + quick_exp(-x)); }

// The experts of a lane that may still be chosen, as order keys (0: none). The best lies in slot 0:
// few slots are kept sorted, of many only the best is brought forward.
template <int V>
struct Candidates {
  uint32_t key[V];
  int expert[V];

  __device__ void order(int i, int j) {  // so that slot i comes before slot j
    const bool swap = key[j] > key[i] || (key[j] == key[i] && expert[j] < expert[i]);
    const uint32_t k = key[i];
    const int e = expert[i];
    key[i] = swap ? key[j] : k;
    expert[i] = swap ? expert[j] : e;
    key[j] = swap ? k : key[j];
    expert[j] = swap ? e : expert[j];
  }
  __device__ void prepare() {
    if constexpr (V == 4) {
      order(0, 1);
      order(2, 3);
      order(0, 2);
      order(1, 3);
      order(1, 2);
    } else {
#pragma unroll
      for (int i = 1; i < V; ++i) order(0, i);
    }
  }
  __device__ void drop_best() {
    if constexpr (V <= 4) {
#pragma unroll
      for (int i = 0; i + 1 < V; ++i) {
        key[i] = key[i + 1];
        expert[i] = expert[i + 1];
      }
      key[V - 1] = 0;
    } else {
      key[0] = 0;
      prepare();
    }
  }
  // Takes the warp's best expert, writes it to *chosen and returns its key; 0 if none is left.
  // `lane_bit` is 1 << lane.
  __device__ uint32_t take(int* chosen, unsigned lane_bit) {
    const uint32_t top = __reduce_max_sync(kFullWarp, key[0]);
    const unsigned best = __ballot_sync(kFullWarp, key[0] == top);
    if ((best & (0 - best)) == lane_bit) {  // the lowest lane of those
      *chosen = expert[0];
      drop_best();
    }
    return top;
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
__global__ void __launch_bounds__(kThreads)
    gate_kernel(const GateParams p, float scale, bool aligned) {
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

  Candidates<V> candidates;
  uint32_t top_key = 0;
#pragma unroll
  for (int i = 0; i < V; ++i) {
    const int e = lane * V + i;
    candidates.key[i] = e < n ? order_key(fmaxf(logit[i], -kInfinity)) : 0;  // NaN as -infinity
    candidates.expert[i] = e;
    top_key = max(top_key, candidates.key[i]);
  }

  // log-sum-exp, with the shift of torch.logsumexp: none where the largest is infinite.
  top_key = __reduce_max_sync(kFullWarp, top_key);
  const float top = key_to_float(top_key);
  const float shift = isinf(top) ? 0.0f : top;
  float sum = 0;
#pragma unroll
  for (int i = 0; i < V; ++i) sum += quick_exp(logit[i] - shift);
  const float lse = shift + __logf(warp_sum(sum));
  if (lane == 0) *logsumexp = lse;

  const float* bias = static_cast<const float*>(p.bias);
  const float* threshold = static_cast<const float*>(p.threshold);
  const bool softmax = p.scoring == Scoring::softmax, sigmoid = p.scoring == Scoring::sigmoid;
  const bool by_logit = !bias && p.n_group == 1;
  const bool nan = lse != lse;  // then keys do not tell the logits
  if (!by_logit || threshold) {
    uint32_t below = 0;
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const int e = lane * V + i;
      if (e >= n) continue;
      float score = logit[i];
      if (softmax) score = quick_exp(logit[i] - lse);
      if (sigmoid) score = quick_sigmoid(logit[i]);
      if (threshold && !(score >= threshold[e])) below |= 1u << i;
      if (!by_logit) {
        const float choice = bias ? score + bias[e] : score;
        candidates.key[i] = order_key(fmaxf(choice, -kInfinity));
      }
    }
    if (p.n_group > 1) limit_groups<V>(p, candidates.key);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      if ((below >> i) & 1) candidates.key[i] = 0;
    }
  }

  // Choose; then lane j weighs choice j.
  candidates.prepare();
  __shared__ int chosen[kThreads / 32][kMaxTopK];
  uint32_t key = 0;
#pragma unroll 4
  for (int j = 0; j < k; ++j) {
    const uint32_t taken = candidates.take(&chosen[warp_id()][j], 1u << lane);
    if (lane == j) key = taken;
  }
  __syncwarp();
  const int expert = key ? chosen[warp_id()][lane] : -1;
  const bool over_chosen = !sigmoid && (!softmax || p.renormalize);
  float chosen_logit = -kInfinity;
  if (expert >= 0) chosen_logit = by_logit && !nan ? key_to_float(key) : to_float(row[expert]);
  float base = lse;
  if (over_chosen) base = by_logit && !threshold ? top : warp_max(chosen_logit);
  float weight = 0;
  if (expert >= 0) {
    weight = sigmoid ? quick_sigmoid(chosen_logit) : quick_exp(chosen_logit - base);
  }
  if (over_chosen || (sigmoid && p.renormalize)) {
    const float total = warp_sum(weight);
    if (expert >= 0) weight = __fdividef(weight, sigmoid ? total + 1e-20f : total);
  }
  if (lane < k) {
    weights[lane] = weight * scale;
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
  const float mean = over_chosen || (sigmoid && p.renormalize) ? inner / float(p.scale) : 0.0f;
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
          p, float(p.scale), rows_aligned<V, T>(p.logits, p.n_experts, p.logits_stride));
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
