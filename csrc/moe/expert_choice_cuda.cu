#include "common/cuda.cuh"
#include "common/select.cuh"
#include "moe/expert_choice.h"

namespace sparsemoe {
namespace {

constexpr int kRowThreads = 128;
constexpr int kTile = 32;

// scores[e, t] = softmax(logits[t])[e]. A block takes kTile tokens, a warp each.
template <class T, int V>
__global__ void __launch_bounds__(kTile * 32)
    scores_kernel(int64_t n_tokens, int n, const T* logits, int64_t stride, bool aligned,
                  float* scores) {
  __shared__ float tile[kTile][kTile + 1];
  const int64_t first = blockIdx.x * int64_t(kTile), t = first + warp_id();
  const T* row = logits + t * stride;
  float logsumexp = 0;
  if (t < n_tokens) {
    float logit[V];
    load_row<V>(row, n, aligned, -kInfinity, logit);
    float top = -kInfinity, sum = 0;
#pragma unroll
    for (int i = 0; i < V; ++i) top = fmaxf(top, logit[i]);
    top = warp_max(top);
    const float shift = isinf(top) ? 0.0f : top;
#pragma unroll
    for (int i = 0; i < V; ++i) sum += expf(logit[i] - shift);
    logsumexp = shift + logf(warp_sum(sum));
  }
  for (int first_expert = 0; first_expert < n; first_expert += kTile) {
    int e = first_expert + lane_id();
    if (t < n_tokens && e < n) tile[warp_id()][lane_id()] = expf(to_float(row[e]) - logsumexp);
    __syncthreads();
    e = first_expert + warp_id();
    if (first + lane_id() < n_tokens && e < n) {
      scores[e * n_tokens + first + lane_id()] = tile[lane_id()][warp_id()];
    }
    __syncthreads();
  }
}

// One block an expert and group.
__global__ void __launch_bounds__(1024, 1) choose_kernel(const ExpertChoiceParams p) {
  __shared__ int bins[kSelectBins];
  const int64_t expert = blockIdx.x / p.n_groups, group = blockIdx.x % p.n_groups;
  const int per_group = int(p.n_tokens / p.n_groups), capacity = int(p.capacity);
  const int64_t first = group * per_group;
  const float* score = static_cast<const float*>(p.workspace) + expert * p.n_tokens + first;
  const bool* mask = p.mask ? p.mask + first : nullptr;
  float* weights = static_cast<float*>(p.weights) + blockIdx.x * p.capacity;
  int32_t* tokens = p.tokens + blockIdx.x * p.capacity;
  const auto key = [=](int i) { return mask && !mask[i] ? 0u : order_key(score[i]); };
  const Selection selection = select_largest(key, per_group, capacity, bins);
  for_each_selected(
      key, per_group, selection,
      [=](int i, int rank, uint32_t k) {
        weights[rank] = key_to_float(k);
        tokens[rank] = int32_t(first + i);
      },
      [](int) {});
  for (unsigned i = selection.n_chosen + threadIdx.x; i < unsigned(capacity); i += blockDim.x) {
    weights[i] = 0;
    tokens[i] = -1;
  }
  if (threadIdx.x == 0) {
    // The lowest chosen score; where exactly all tokens were chosen, it is found below.
    float* lowest = static_cast<float*>(p.threshold) + group * p.n_experts + expert;
    if (selection.n_chosen < capacity || capacity == 0) {
      *lowest = 0;
    } else if (selection.key) {
      *lowest = key_to_float(selection.key);
    }
  }
  if (selection.key == 0 && selection.n_chosen == capacity && capacity > 0) {
    __shared__ uint32_t smallest;
    if (threadIdx.x == 0) smallest = 0xffffffffu;
    __syncthreads();
    for (unsigned i = threadIdx.x; i < unsigned(per_group); i += blockDim.x) {
      if (const uint32_t k = key(int(i))) atomicMin(&smallest, k);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      static_cast<float*>(p.threshold)[group * p.n_experts + expert] = key_to_float(smallest);
    }
  }
}

// A token is at most once among an expert's, so no two threads write one place.
__global__ void scatter_kernel(const ExpertChoiceBackwardParams p) {
  const int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
  if (i >= p.n_experts * p.n_chosen) return;
  const uint32_t token = p.tokens[i];
  if (token < uint64_t(p.n_tokens)) {
    static_cast<float*>(p.workspace)[token * p.n_experts + i / p.n_chosen] =
        static_cast<const float*>(p.grad_weights)[i];
  }
}

template <class T, int V>
__global__ void __launch_bounds__(kRowThreads)
    softmax_backward_kernel(const ExpertChoiceBackwardParams p, bool aligned, bool aligned_grad) {
  const int64_t t = blockIdx.x * int64_t(kRowThreads / 32) + warp_id();
  if (t >= p.n_tokens) return;
  const int n = int(p.n_experts);
  float score[V], grad[V];
  load_row<V>(static_cast<const float*>(p.workspace) + t * n, n, aligned_grad, 0.0f, grad);
  bool chosen = false;
#pragma unroll
  for (int i = 0; i < V; ++i) chosen |= grad[i] != 0;
  if (__any_sync(kFullWarp, chosen)) {
    load_row<V>(static_cast<const T*>(p.logits) + t * p.logits_stride, n, aligned, -kInfinity,
                score);
    float top = -kInfinity, sum = 0, inner = 0;
#pragma unroll
    for (int i = 0; i < V; ++i) top = fmaxf(top, score[i]);
    top = warp_max(top);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      score[i] = expf(score[i] - top);
      sum += score[i];
    }
    sum = warp_sum(sum);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      score[i] /= sum;
      inner += score[i] * grad[i];
    }
    inner = warp_sum(inner);
#pragma unroll
    for (int i = 0; i < V; ++i) grad[i] = score[i] * (grad[i] - inner);
  }
  store_row<V>(static_cast<T*>(p.grad_logits) + t * n, n, false, grad);
}

}  // namespace

int expert_choice_cuda(const ExpertChoiceParams& p, void* stream_) {
  const cudaStream_t stream = cudaStream_t(stream_);
  if (p.n_tokens > 0) {
    const int error = with_cuda_dtype(p.dtype, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      return with_lane_width(p.n_experts, [&](auto width) {
        constexpr int V = decltype(width)::value;
        scores_kernel<T, V><<<unsigned(ceil_div(p.n_tokens, kTile)), kTile * 32, 0, stream>>>(
            p.n_tokens, int(p.n_experts), static_cast<const T*>(p.logits), p.logits_stride,
            rows_aligned<V, T>(p.logits, p.n_experts, p.logits_stride),
            static_cast<float*>(p.workspace));
        return int(cudaGetLastError());
      });
    });
    if (error) return error;
  }
  // Threads of a small block wait less for each other.
  const int threads = p.n_tokens / p.n_groups <= 4096 ? 256 : 1024;
  choose_kernel<<<unsigned(p.n_experts * p.n_groups), threads, 0, stream>>>(p);
  return int(cudaGetLastError());
}

int expert_choice_backward_cuda(const ExpertChoiceBackwardParams& p, void* stream_) {
  const cudaStream_t stream = cudaStream_t(stream_);
  const cudaError_t cleared =
      cudaMemsetAsync(p.workspace, 0, p.n_tokens * p.n_experts * sizeof(float), stream);
  if (cleared != cudaSuccess) return int(cleared);
  if (p.n_chosen > 0) {
    scatter_kernel<<<unsigned(ceil_div(p.n_experts * p.n_chosen, 256)), 256, 0, stream>>>(p);
  }
  return with_cuda_dtype(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    return with_lane_width(p.n_experts, [&](auto width) {
      constexpr int V = decltype(width)::value;
      softmax_backward_kernel<T, V>
          <<<unsigned(ceil_div(p.n_tokens, kRowThreads / 32)), kRowThreads, 0, stream>>>(
              p, rows_aligned<V, T>(p.logits, p.n_experts, p.logits_stride),
              rows_aligned<V, float>(p.workspace, p.n_experts, p.n_experts));
      return int(cudaGetLastError());
    });
  });
}

}  // namespace sparsemoe
