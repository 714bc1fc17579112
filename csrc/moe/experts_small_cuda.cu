// Gradients of the biases and of the weights: sums that read each row once.
#include "moe/experts_rows.cuh"

namespace sparsemoe {
namespace {

// Elements of a pack: 16 bytes where widths, strides and addresses allow, else one element.
template <class T>
constexpr int kWide = 16 / sizeof(T);
template <class T>
bool wide_enough(const Rows& rows, int64_t width, const void* other) {
  const uintptr_t addresses = uintptr_t(rows.data) | uintptr_t(other);
  return (width | rows.stride) % kWide<T> == 0 && addresses % 16 == 0;
}

// --- biases ---

constexpr int kBiasThreads = 512;
constexpr int kRowsAhead = 4;  // rows of a thread whose loads are in flight together

// A block sums kAcross packs of an expert's rows; a thread every kGroups-th row of one.
template <class T, int N>
__global__ void __launch_bounds__(kBiasThreads)
    bias_grad_kernel(const BiasGradParams p, int64_t pieces) {
  using P = Pack<T, N>;
  constexpr int kAcross = N == 1 ? 32 : 8;
  constexpr int kGroups = kBiasThreads / kAcross, kWarps = kBiasThreads / 32;
  __shared__ float of_warp[kWarps][kAcross * N];
  const int64_t expert = blockIdx.x / pieces, first_column = blockIdx.x % pieces * kAcross * N;
  const int lane = threadIdx.x % kAcross, group = threadIdx.x / kAcross;
  const int64_t column = first_column + lane * N;
  const int64_t begin = expert_begin(p.experts, expert), end = expert_begin(p.experts, expert + 1);
  float sum[N] = {};
  for (int64_t first = begin + group; first < end; first += kGroups * kRowsAhead) {
    P pack[kRowsAhead];
    float weight[kRowsAhead];
#pragma unroll
    for (int i = 0; i < kRowsAhead; ++i) {
      const int64_t r = first + i * kGroups;
      pack[i] = P{};
      weight[i] = 0;
      if (r >= end || column >= p.n) continue;
      const T* row = row_or_null<T>(p.a, r);
      const RowWeight found = row_weight(p.weights, p.row_pair, p.n_pairs, r);
      weight[i] = found.weight;
      // A row without a pair is left out, not multiplied by zero.
      if (row && found.there) pack[i] = load(reinterpret_cast<const P*>(row + column));
    }
#pragma unroll
    for (int i = 0; i < kRowsAhead; ++i) {
      float value[N];
      pack[i].unpack(value);
#pragma unroll
      for (int c = 0; c < N; ++c) sum[c] += weight[i] * value[c];
    }
  }
#pragma unroll
  for (int c = 0; c < N; ++c) {
#pragma unroll
    for (int step = kAcross; step < 32; step *= 2) {
      sum[c] += __shfl_xor_sync(kFullWarp, sum[c], step);
    }
    if (lane_id() < kAcross) of_warp[warp_id()][lane * N + c] = sum[c];
  }
  __syncthreads();
  const int c = threadIdx.x;
  if (c >= kAcross * N || first_column + c >= p.n) return;
  float total = 0;
  for (int w = 0; w < kWarps; ++w) total += of_warp[w][c];
  static_cast<T*>(p.out)[expert * p.n + first_column + c] = from_float<T>(total);
}

// --- weights ---

constexpr int kPairThreads = 256;

__device__ inline bool of_an_expert(const ExpertRows& experts, int64_t r) {
  return r >= expert_begin(experts, 0) && r < expert_begin(experts, experts.n_experts);
}

// Without a bias; a thread a row.
__global__ void __launch_bounds__(kPairThreads) pair_sums_kernel(const PairGradParams p) {
  const int64_t r = blockIdx.x * int64_t(kPairThreads) + threadIdx.x;
  if (r >= p.experts.n_rows || !of_an_expert(p.experts, r)) return;
  const int64_t pair = p.row_pair[r];
  if (uint64_t(pair) >= uint64_t(p.n_pairs)) return;
  float sum = 0;
#pragma unroll 4
  for (int64_t i = 0; i < p.n_parts; ++i) sum += p.inner[i * p.experts.n_rows + r];
  p.grad_weights[pair] = sum;
}

// A warp a row.
template <class T, int N>
__global__ void __launch_bounds__(kPairThreads) pair_grad_kernel(const PairGradParams p) {
  using P = Pack<T, N>;
  const int64_t r = blockIdx.x * int64_t(kPairThreads / 32) + warp_id();
  if (r >= p.experts.n_rows || !of_an_expert(p.experts, r)) return;
  const int64_t pair = p.row_pair[r];
  if (uint64_t(pair) >= uint64_t(p.n_pairs)) return;
  float sum = 0;
  for (int64_t i = lane_id(); i < p.n_parts; i += 32) sum += p.inner[i * p.experts.n_rows + r];
  if (const T* row = row_or_null<T>(p.grad, r)) {
    int64_t expert = 0, above = p.experts.n_experts;  // its end is the first above r
    while (expert < above) {
      const int64_t middle = (expert + above) / 2;
      if (__ldg(p.experts.offsets + middle + 1) > r) {
        above = middle;
      } else {
        expert = middle + 1;
      }
    }
    const T* bias = static_cast<const T*>(p.down_bias) + expert * p.h;
#pragma unroll 4
    for (int64_t c = lane_id() * N; c < p.h; c += 32 * N) {
      float gradient[N], value[N];
      load(reinterpret_cast<const P*>(row + c)).unpack(gradient);
      load(reinterpret_cast<const P*>(bias + c)).unpack(value);
#pragma unroll
      for (int j = 0; j < N; ++j) sum += gradient[j] * value[j];
    }
  }
  sum = warp_sum(sum);
  if (lane_id() == 0) p.grad_weights[pair] = sum;
}

template <class Kernel, class... Arguments>
int launch(Kernel* kernel, int64_t blocks, int threads, void* stream, Arguments... arguments) {
  if (blocks == 0) return 0;
  if (blocks > INT32_MAX) return int(cudaErrorInvalidConfiguration);
  kernel<<<unsigned(blocks), threads, 0, cudaStream_t(stream)>>>(arguments...);
  return int(cudaGetLastError());
}

}  // namespace

int bias_grad_cuda(const BiasGradParams& p, void* stream) {
  return with_cuda_dtype(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto launch_packs = [&](auto n) {
      constexpr int N = decltype(n)::value;
      const int64_t pieces = ceil_div(p.n, N == 1 ? 32 : 8 * N);
      return launch(bias_grad_kernel<T, N>, p.experts.n_experts * pieces, kBiasThreads, stream, p,
                    pieces);
    };
    return wide_enough<T>(p.a, p.n, nullptr) ? launch_packs(LaneWidth<kWide<T>>())
                                             : launch_packs(LaneWidth<1>());
  });
}

int pair_grad_cuda(const PairGradParams& p, void* stream) {
  if (p.n_pairs == 0) return 0;
  const cudaError_t error =
      cudaMemsetAsync(p.grad_weights, 0, p.n_pairs * sizeof(float), cudaStream_t(stream));
  if (error != cudaSuccess) return int(error);
  if (!p.down_bias) {
    return launch(pair_sums_kernel, ceil_div(p.experts.n_rows, kPairThreads), kPairThreads, stream,
                  p);
  }
  return with_cuda_dtype(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto launch_packs = [&](auto n) {
      return launch(pair_grad_kernel<T, decltype(n)::value>,
                    ceil_div(p.experts.n_rows, kPairThreads / 32), kPairThreads, stream, p);
    };
    return wide_enough<T>(p.grad, p.h, p.down_bias) ? launch_packs(LaneWidth<kWide<T>>())
                                                    : launch_packs(LaneWidth<1>());
  });
}

}  // namespace sparsemoe
