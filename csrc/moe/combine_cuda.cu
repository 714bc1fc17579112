#include "moe/combine.h"

#include "moe/rows.cuh"

namespace sparsemoe {
namespace {

// Rows that a warp loads before it adds the first, to keep the memory busy.
constexpr int kRowsAhead = 8;

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
    combine_kernel(const RowMap map, const T* rows, int64_t rows_stride, const float* weights,
                   T* y, int64_t width, int64_t pieces) {
  using P = Pack<T, N>;
  const int64_t warp = blockIdx.x * int64_t(kRowWarps) + warp_id();
  if (warp >= map.n_tokens * pieces) return;
  const int64_t token = warp / pieces;
  const int64_t column = ((warp - token * pieces) * 32 + lane_id()) * N;
  const bool inside = column < width;
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
        lane_weight = weights[map.token_offsets ? map.row_pair[lane_row] : entry];
      }
    }
    const int count = min(32, entries.count - first);
    for (int j = 0; j < count; j += kRowsAhead) {
      P pack[kRowsAhead];
      int row[kRowsAhead];
#pragma unroll
      for (int i = 0; i < kRowsAhead; ++i) {
        row[i] = __shfl_sync(kFullWarp, lane_row, (j + i) % 32);
        if (j + i >= count) row[i] = -1;
        if (row[i] >= 0 && inside) {
          pack[i] = load_once(reinterpret_cast<const P*>(rows + row[i] * rows_stride + column));
        }
      }
#pragma unroll
      for (int i = 0; i < kRowsAhead; ++i) {
        const float weight = __shfl_sync(kFullWarp, lane_weight, (j + i) % 32);
        if (row[i] >= 0 && inside) {
#pragma unroll
          for (int c = 0; c < N; ++c) sum[c] += weight * to_float(pack[i].value[c]);
        }
      }
    }
  }
  if (inside) {
    P pack;
#pragma unroll
    for (int c = 0; c < N; ++c) pack.value[c] = from_float<T>(sum[c]);
    store_once(reinterpret_cast<P*>(y + token * width + column), pack);
  }
}

// One warp a token; then the clearing warps. The token's gradient is read again for each row, from
// the first-level cache.
template <class T, int N>
__global__ void __launch_bounds__(kRowThreads) combine_backward_kernel(
    const RowMap map, const T* grad, int64_t grad_stride, const T* rows, int64_t rows_stride,
    const float* weights, T* grad_rows, float* grad_weights, int64_t width) {
  using P = Pack<T, N>;
  constexpr int kAhead = 4;
  const int64_t token = blockIdx.x * int64_t(kRowWarps) + warp_id();
  const int64_t packs = width / N;
  if (token >= map.n_tokens) {
    clear_unused(map, token - map.n_tokens, reinterpret_cast<P*>(grad_rows), packs,
                 [=](int64_t row) {
                   if (map.token_offsets) grad_weights[row] = 0;
                 });
    return;
  }
  const Entries entries = entries_of(map, token);
  const P* from_grad = reinterpret_cast<const P*>(grad + token * grad_stride);
  for (int j = 0; j < entries.count; ++j) {
    const int64_t entry = entries.first + j;
    const int64_t row = row_of(map, entry);
    if (row < 0) {
      if (!map.token_offsets && lane_id() == 0) grad_weights[entry] = 0;
      continue;
    }
    const int64_t pair = map.token_offsets ? map.row_pair[row] : entry;
    const float weight = weights[pair];
    const P* from_row = reinterpret_cast<const P*>(rows + row * rows_stride);
    P* to_row = reinterpret_cast<P*>(grad_rows + row * width);
    float inner = 0;
    for (int64_t column = lane_id(); column < packs; column += 32 * kAhead) {
      P value[kAhead], g[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        if (column + 32 * i < packs) {
          value[i] = load_once(from_row + column + 32 * i);
          g[i] = from_grad[column + 32 * i];
        }
      }
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        if (column + 32 * i < packs) {
          P out;
#pragma unroll
          for (int c = 0; c < N; ++c) {
            const float gradient = to_float(g[i].value[c]);
            inner += gradient * to_float(value[i].value[c]);
            out.value[c] = from_float<T>(weight * gradient);
          }
          store_once(to_row + column + 32 * i, out);
        }
      }
    }
    inner = warp_sum(inner);
    if (lane_id() == 0) grad_weights[pair] = inner;
  }
}

}  // namespace

int combine_cuda(const CombineParams& p, void* stream) {
  return with_cuda_dtype(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto launch = [&](auto n) {
      constexpr int N = decltype(n)::value;
      const int64_t pieces = ceil_div(p.width, 32 * N);
      combine_kernel<T, N>
          <<<unsigned(ceil_div(p.map.n_tokens * pieces, kRowWarps)), kRowThreads, 0,
             cudaStream_t(stream)>>>(p.map, static_cast<const T*>(p.rows), p.rows_stride,
                                     static_cast<const float*>(p.weights), static_cast<T*>(p.y),
                                     p.width, pieces);
      return int(cudaGetLastError());
    };
    return wide_enough<T>(p.width, p.rows_stride, 0, p.rows, p.y, nullptr)
               ? launch(LaneWidth<kWide<T>>())
               : launch(LaneWidth<1>());
  });
}

int combine_backward_cuda(const CombineBackwardParams& p, void* stream) {
  return with_cuda_dtype(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto launch = [&](auto n) {
      constexpr int N = decltype(n)::value;
      combine_backward_kernel<T, N>
          <<<blocks_with_clearing(p.map.n_tokens, p.map.n_rows), kRowThreads, 0,
             cudaStream_t(stream)>>>(p.map, static_cast<const T*>(p.grad), p.grad_stride,
                                     static_cast<const T*>(p.rows), p.rows_stride,
                                     static_cast<const float*>(p.weights),
                                     static_cast<T*>(p.grad_rows),
                                     static_cast<float*>(p.grad_weights), p.width);
      return int(cudaGetLastError());
    };
    return wide_enough<T>(p.width, p.rows_stride, p.grad_stride, p.rows, p.grad, p.grad_rows)
               ? launch(LaneWidth<kWide<T>>())
               : launch(LaneWidth<1>());
  });
}

}  // namespace sparsemoe
