#include "moe/combine.h"
#include "moe/rows.cuh"

namespace sparsemoe {
namespace {

// Rows whose loads are in flight before the first is used. More, or more blocks on a
// multiprocessor, and the memory serves them more slowly.
constexpr int kRowsAhead = 4;

// Elements of a pack: 16 bytes where widths, strides and addresses allow, else one element.
template <class T>
constexpr int kWide = 16 / sizeof(T);

template <class T>
bool wide_enough(int64_t width, int64_t stride_a, int64_t stride_b, const void* a, const void* b,
                 const void* c) {
  const uintptr_t addresses = uintptr_t(a) | uintptr_t(b) | uintptr_t(c);
  return (width | stride_a | stride_b) % kWide<T> == 0 && addresses % 16 == 0;
}

// One warp a token and piece of 32 packs.
template <class T, int N>
__global__ void __launch_bounds__(kRowThreads)
    combine_kernel(const RowMap map, const T* rows, int64_t rows_stride, const float* weights, T* y,
                   int64_t y_stride, int64_t width, int64_t pieces) {
  using P = Pack<T, N>;
  const int64_t warp = blockIdx.x * int64_t(kRowWarps) + warp_id();
  if (warp >= map.n_tokens * pieces) return;
  const int64_t token = warp / pieces;
  const int64_t column = ((warp - token * pieces) * 32 + lane_id()) * N;
  const bool inside = column < width;
  // Lanes past the end load what the last one loads, so that no load is conditional.
  const T* from = rows + (inside ? column : width - N);
  const Entries entries = entries_of(map, token);

  float sum[N] = {};
  for (int first = 0; first < entries.count; first += 32) {
    int lane_row = -1;
    float lane_weight = 0;
    if (first + lane_id() < entries.count) {
      const int64_t entry = entries.first + first + lane_id();
      lane_row = row_of(map, entry);
      lane_weight = 1;
      if (weights && lane_row >= 0) {
        const int64_t pair = pair_of(map, entry, lane_row);
        lane_weight = pair < 0 ? 0.0f : weights[pair];
      }
    }
    const int count = min(32, entries.count - first);
    for (int j = 0; j < count; j += kRowsAhead) {
      P pack[kRowsAhead];
#pragma unroll
      for (int i = 0; i < kRowsAhead; ++i) {
        const int row = __shfl_sync(kFullWarp, lane_row, j + i);
        if (row >= 0) pack[i] = load(reinterpret_cast<const P*>(from + row * rows_stride));
      }
#pragma unroll
      for (int i = 0; i < kRowsAhead; ++i) {
        const int row = __shfl_sync(kFullWarp, lane_row, j + i);
        const float weight = __shfl_sync(kFullWarp, lane_weight, j + i);
        if (row >= 0) {
          float value[N];
          pack[i].unpack(value);
#pragma unroll
          for (int c = 0; c < N; ++c) sum[c] += weight * value[c];
        }
      }
    }
  }
  if (inside) *reinterpret_cast<P*>(y + token * y_stride + column) = P::of(sum);
}

// One block a token, a thread a pack of its gradient. The inner products <rows[r], grad> are summed
// over the block in a fixed order. Each block also clears the unused ones of its share of all rows.
template <class T, int N>
__global__ void __launch_bounds__(kRowThreads, 4)
    combine_backward_kernel(const RowMap map, const T* grad, int64_t grad_stride, const T* rows,
                            int64_t rows_stride, const float* weights, T* grad_rows,
                            float* grad_weights, int64_t width) {
  using P = Pack<T, N>;
  __shared__ float of_warp[kRowsAhead][kRowWarps];
  const int64_t token = blockIdx.x, packs = width / N;
  const int n_warps = blockDim.x / 32;
  if (warp_id() == 0 && !all_rows_used(map)) {
    clear_unused(map, token, gridDim.x, reinterpret_cast<P*>(grad_rows), packs);
  }
  const Entries entries = entries_of(map, token);
  const P* from_grad = reinterpret_cast<const P*>(grad + token * grad_stride);
  for (int first = 0; first < entries.count; first += kRowsAhead) {
    int row[kRowsAhead];
    float weight[kRowsAhead], inner[kRowsAhead];
#pragma unroll
    for (int i = 0; i < kRowsAhead; ++i) {
      const int64_t entry = entries.first + first + i;
      row[i] = first + i < entries.count ? row_of(map, entry) : -1;
      const int64_t pair = pair_of(map, entry, row[i]);
      weight[i] = row[i] >= 0 && pair >= 0 ? weights[pair] : 0.0f;
      inner[i] = 0;
    }
    for (int64_t column = threadIdx.x; column < packs; column += blockDim.x) {
      P pack[kRowsAhead];
#pragma unroll
      for (int i = 0; i < kRowsAhead; ++i) {
        if (row[i] >= 0) {
          pack[i] = load(reinterpret_cast<const P*>(rows + row[i] * rows_stride) + column);
        }
      }
      float gradient[N];
      load(from_grad + column).unpack(gradient);
#pragma unroll
      for (int i = 0; i < kRowsAhead; ++i) {
        if (row[i] < 0) continue;
        float value[N], scaled[N];
        pack[i].unpack(value);
#pragma unroll
        for (int c = 0; c < N; ++c) {
          inner[i] += gradient[c] * value[c];
          scaled[c] = weight[i] * gradient[c];
        }
        reinterpret_cast<P*>(grad_rows + row[i] * width)[column] = P::of(scaled);
      }
    }
    __syncthreads();  // of_warp has been read
#pragma unroll
    for (int i = 0; i < kRowsAhead; ++i) {
      const float sum = warp_sum(inner[i]);
      if (lane_id() == 0) of_warp[i][warp_id()] = sum;
    }
    __syncthreads();
    const int i = threadIdx.x;
    if (i < kRowsAhead && first + i < entries.count) {
      float sum = 0;
      for (int w = 0; w < n_warps; ++w) sum += of_warp[i][w];
      const int64_t entry = entries.first + first + i;
      const int r = row_of(map, entry);
      const int64_t pair = pair_of(map, entry, r);
      if (pair >= 0) grad_weights[pair] = r >= 0 ? sum : 0.0f;
    }
  }
}

}  // namespace

int combine_cuda(const CombineParams& p, void* stream) {
  const int64_t y_stride = p.y_stride ? p.y_stride : p.width;
  return with_cuda_dtype(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto launch = [&](auto n) {
      constexpr int N = decltype(n)::value;
      const int64_t pieces = ceil_div(p.width, 32 * N);
      combine_kernel<T, N><<<unsigned(ceil_div(p.map.n_tokens * pieces, kRowWarps)), kRowThreads, 0,
                             cudaStream_t(stream)>>>(
          p.map, static_cast<const T*>(p.rows), p.rows_stride, static_cast<const float*>(p.weights),
          static_cast<T*>(p.y), y_stride, p.width, pieces);
      return int(cudaGetLastError());
    };
    return wide_enough<T>(p.width, p.rows_stride, y_stride, p.rows, p.y, nullptr)
               ? launch(LaneWidth<kWide<T>>())
               : launch(LaneWidth<1>());
  });
}

int combine_backward_cuda(const CombineBackwardParams& p, void* stream) {
  if (p.map.token_offsets) {  // the kernel writes the pairs that have a row
    const cudaError_t error =
        cudaMemsetAsync(p.grad_weights, 0, p.n_pairs * sizeof(float), cudaStream_t(stream));
    if (error != cudaSuccess) return int(error);
  }
  return with_cuda_dtype(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto launch = [&](auto n) {
      constexpr int N = decltype(n)::value;
      const int threads = int(std::min<int64_t>(kRowThreads, ceil_div(p.width / N, 32) * 32));
      combine_backward_kernel<T, N><<<unsigned(p.map.n_tokens), threads, 0, cudaStream_t(stream)>>>(
          p.map, static_cast<const T*>(p.grad), p.grad_stride, static_cast<const T*>(p.rows),
          p.rows_stride, static_cast<const float*>(p.weights), static_cast<T*>(p.grad_rows),
          static_cast<float*>(p.grad_weights), p.width);
      return int(cudaGetLastError());
    };
    return wide_enough<T>(p.width, p.rows_stride, p.grad_stride, p.rows, p.grad, p.grad_rows)
               ? launch(LaneWidth<kWide<T>>())
               : launch(LaneWidth<1>());
  });
}

}  // namespace sparsemoe
