// Sums over tokens in two steps: kLossBlocks blocks add up their share of the tokens, and one block
// adds the shares in order. Which thread adds what depends on the sizes alone.
#include "common/cuda.cuh"
#include "moe/losses.h"

namespace sparsemoe {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

// The sum of `value` over the block, the same in every thread.
template <class Value>
__device__ Value block_sum(Value value) {
  __shared__ Value of_warp[32];
#pragma unroll
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(kFullWarp, value, step);
  __syncthreads();
  if (lane_id() == 0) of_warp[warp_id()] = value;
  __syncthreads();
  Value total = 0;
  for (int w = 0; w < int(blockDim.x / 32); ++w) total += of_warp[w];
  return total;
}

template <int V>
__device__ void softmax_lanes(float (&x)[V]) {
  float top = -kInfinity, sum = 0;
#pragma unroll
  for (int i = 0; i < V; ++i) top = fmaxf(top, x[i]);
  top = warp_max(top);
#pragma unroll
  for (int i = 0; i < V; ++i) {
    x[i] = expf(x[i] - top);
    sum += x[i];
  }
  const float inverse = 1 / warp_sum(sum);
#pragma unroll
  for (int i = 0; i < V; ++i) x[i] *= inverse;
}

// workspace[block, e] = sum of probabilities; workspace[kLossBlocks * n + block] = tokens counted.
template <class T, int V>
__global__ void __launch_bounds__(kThreads)
    balance_sums_kernel(const LoadBalanceParams p, int64_t per_block, bool aligned) {
  __shared__ float share[kWarps][32 * V < 1024 ? 32 * V : 1024];
  const int n = int(p.n_experts);
  const int64_t first = blockIdx.x * per_block;
  const int64_t last = min(first + per_block, p.n_tokens);
  float sum[V] = {};
  int tokens = 0;
  for (int64_t t = first + warp_id(); t < last; t += kWarps) {
    if (p.mask && !p.mask[t]) continue;
    float probability[V];
    load_row<V>(static_cast<const T*>(p.logits) + t * p.logits_stride, n, aligned, -kInfinity,
                probability);
    softmax_lanes<V>(probability);
#pragma unroll
    for (int i = 0; i < V; ++i) sum[i] += probability[i];
    ++tokens;
  }
#pragma unroll
  for (int i = 0; i < V; ++i) share[warp_id()][lane_id() * V + i] = sum[i];
  const int counted = block_sum(lane_id() == 0 ? tokens : 0);
  __syncthreads();
  float* out = static_cast<float*>(p.workspace);
  for (int e = threadIdx.x; e < n; e += kThreads) {
    float total = 0;
    for (int w = 0; w < kWarps; ++w) total += share[w][e];
    out[blockIdx.x * n + e] = total;
  }
  if (threadIdx.x == 0) out[kLossBlocks * n + blockIdx.x] = float(counted);
}

__global__ void __launch_bounds__(1024) balance_total_kernel(const LoadBalanceParams p) {
  const float* sums = static_cast<const float*>(p.workspace);
  const int n = int(p.n_experts);
  // Fewer experts than threads: several threads share an expert's blocks.
  const int parts = max(1, 1024 / n);
  float weighted = 0;
  for (int i = threadIdx.x; i < parts * n; i += 1024) {
    float sum = 0;
#pragma unroll 16
    for (int block = i / n; block < kLossBlocks; block += parts) sum += sums[block * n + i % n];
    weighted += sum * float(p.counts[i % n]);
  }
  int pairs = 0;
  for (int e = threadIdx.x; e < n; e += 1024) pairs += p.counts[e];
  const float tokens =
      block_sum(threadIdx.x < kLossBlocks ? sums[kLossBlocks * n + threadIdx.x] : 0.0f);
  const float total = block_sum(weighted);
  const int all_pairs = block_sum(pairs);
  if (threadIdx.x == 0) {
    *static_cast<float*>(p.loss) =
        total * float(n) / (fmaxf(tokens, 1.0f) * float(max(all_pairs, 1)));
  }
}

// workspace = unmasked tokens; one block.
__global__ void __launch_bounds__(1024)
    count_mask_kernel(const bool* mask, int64_t n_tokens, float* out) {
  int count = 0;
  for (int64_t t = threadIdx.x; t < n_tokens; t += 1024) count += mask[t];
  count = block_sum(count);
  if (threadIdx.x == 0) *out = float(count);
}

template <class T, int V>
__global__ void __launch_bounds__(kThreads)
    balance_backward_kernel(const LoadBalanceBackwardParams p, bool aligned, bool aligned_out) {
  __shared__ float counts[32 * V];
  const int n = int(p.n_experts);
  int pairs = 0;
  for (int e = threadIdx.x; e < n; e += kThreads) {
    counts[e] = float(p.counts[e]);
    pairs += p.counts[e];
  }
  pairs = block_sum(pairs);
  __syncthreads();
  const float tokens = p.mask ? *static_cast<const float*>(p.workspace) : float(p.n_tokens);
  const float factor =
      *static_cast<const float*>(p.grad) * float(n) / (fmaxf(tokens, 1.0f) * float(max(pairs, 1)));
  const int64_t step = int64_t(gridDim.x) * kWarps;
  for (int64_t t = blockIdx.x * int64_t(kWarps) + warp_id(); t < p.n_tokens; t += step) {
    float grad[V] = {};
    if (!p.mask || p.mask[t]) {
      load_row<V>(static_cast<const T*>(p.logits) + t * p.logits_stride, n, aligned, -kInfinity,
                  grad);
      softmax_lanes<V>(grad);
      float inner = 0;
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const int e = lane_id() * V + i;
        inner += e < n ? grad[i] * counts[e] : 0.0f;
      }
      inner = warp_sum(inner);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const int e = lane_id() * V + i;
        grad[i] = e < n ? factor * grad[i] * (counts[e] - inner) : 0.0f;
      }
    }
    store_row<V>(static_cast<T*>(p.grad_logits) + t * n, n, aligned_out, grad);
  }
}

__global__ void __launch_bounds__(kThreads) z_sums_kernel(const ZLossParams p, int64_t per_block) {
  const float* logsumexp = static_cast<const float*>(p.logsumexp);
  const int64_t first = blockIdx.x * per_block;
  const int64_t last = min(first + per_block, p.n_tokens);
  float sum = 0;
  int tokens = 0;
  for (int64_t t = first + threadIdx.x; t < last; t += kThreads) {
    if (p.mask && !p.mask[t]) continue;
    sum += logsumexp[t] * logsumexp[t];
    ++tokens;
  }
  sum = block_sum(sum);
  tokens = block_sum(tokens);
  if (threadIdx.x == 0) {
    static_cast<float*>(p.workspace)[2 * blockIdx.x] = sum;
    static_cast<float*>(p.workspace)[2 * blockIdx.x + 1] = float(tokens);
  }
}

__global__ void __launch_bounds__(kLossBlocks) z_total_kernel(const ZLossParams p) {
  const float* sums = static_cast<const float*>(p.workspace);
  const float sum = block_sum(sums[2 * threadIdx.x]);
  const float tokens = block_sum(sums[2 * threadIdx.x + 1]);
  if (threadIdx.x == 0) *static_cast<float*>(p.loss) = sum / fmaxf(tokens, 1.0f);
}

__global__ void __launch_bounds__(1024) z_backward_kernel(const ZLossBackwardParams p) {
  float tokens = float(p.n_tokens);
  if (p.mask) {
    int count = 0;
    for (int64_t t = threadIdx.x; t < p.n_tokens; t += 1024) count += p.mask[t];
    tokens = float(block_sum(count));
  }
  const float factor = 2 * *static_cast<const float*>(p.grad) / fmaxf(tokens, 1.0f);
  const float* logsumexp = static_cast<const float*>(p.logsumexp);
  float* out = static_cast<float*>(p.grad_logsumexp);
  const int64_t step = int64_t(gridDim.x) * 1024;
  for (int64_t t = blockIdx.x * int64_t(1024) + threadIdx.x; t < p.n_tokens; t += step) {
    out[t] = !p.mask || p.mask[t] ? factor * logsumexp[t] : 0.0f;
  }
}

__global__ void __launch_bounds__(1024) update_bias_kernel(const UpdateBiasParams p) {
  const int e = threadIdx.x;
  const int count = e < p.n_experts ? p.counts[e] : 0;
  const long long pairs = block_sum(static_cast<long long>(count));
  if (e < p.n_experts) {
    const long long below = pairs - p.n_experts * count;
    static_cast<float*>(p.bias)[e] += float(p.rate) * float((below > 0) - (below < 0));
  }
}

}  // namespace

int load_balance_loss_cuda(const LoadBalanceParams& p, void* stream_) {
  const cudaStream_t stream = cudaStream_t(stream_);
  const int error = with_cuda_dtype(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    return with_lane_width(p.n_experts, [&](auto width) {
      constexpr int V = decltype(width)::value;
      balance_sums_kernel<T, V><<<kLossBlocks, kThreads, 0, stream>>>(
          p, ceil_div(p.n_tokens, kLossBlocks),
          rows_aligned<V, T>(p.logits, p.n_experts, p.logits_stride));
      return int(cudaGetLastError());
    });
  });
  if (error) return error;
  balance_total_kernel<<<1, 1024, 0, stream>>>(p);
  return int(cudaGetLastError());
}

int load_balance_loss_backward_cuda(const LoadBalanceBackwardParams& p, void* stream_) {
  const cudaStream_t stream = cudaStream_t(stream_);
  if (p.mask) {
    count_mask_kernel<<<1, 1024, 0, stream>>>(p.mask, p.n_tokens, static_cast<float*>(p.workspace));
  }
  const unsigned blocks = unsigned(std::min<int64_t>(ceil_div(p.n_tokens, kWarps), 1056));
  return with_cuda_dtype(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    return with_lane_width(p.n_experts, [&](auto width) {
      constexpr int V = decltype(width)::value;
      balance_backward_kernel<T, V><<<blocks, kThreads, 0, stream>>>(
          p, rows_aligned<V, T>(p.logits, p.n_experts, p.logits_stride),
          rows_aligned<V, T>(p.grad_logits, p.n_experts, p.n_experts));
      return int(cudaGetLastError());
    });
  });
}

int router_z_loss_cuda(const ZLossParams& p, void* stream_) {
  const cudaStream_t stream = cudaStream_t(stream_);
  z_sums_kernel<<<kLossBlocks, kThreads, 0, stream>>>(p, ceil_div(p.n_tokens, kLossBlocks));
  z_total_kernel<<<1, kLossBlocks, 0, stream>>>(p);
  return int(cudaGetLastError());
}

int router_z_loss_backward_cuda(const ZLossBackwardParams& p, void* stream) {
  const unsigned blocks = unsigned(std::min<int64_t>(ceil_div(p.n_tokens, 1024), 132));
  z_backward_kernel<<<blocks, 1024, 0, cudaStream_t(stream)>>>(p);
  return int(cudaGetLastError());
}

int update_expert_bias_cuda(const UpdateBiasParams& p, void* stream) {
  update_bias_kernel<<<1, 1024, 0, cudaStream_t(stream)>>>(p);
  return int(cudaGetLastError());
}

}  // namespace sparsemoe
