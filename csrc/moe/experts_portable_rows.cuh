// Products of the rows of experts: forward, and back through the activation.
#pragma once

#include "moe/activation.cuh"
#include "moe/experts_portable.cuh"

namespace sparsemoe {
namespace portable {

// The columns of b in a tile: 128 adjacent ones, or 64 of the gate and what they gate.
struct Columns {
  int64_t first, width;  // of the hidden columns
  bool gated;
  __device__ int64_t hidden(int i) const { return first + (gated ? i % (kTile / 2) : i); }
  __device__ int64_t column(int i) const {
    return hidden(i) + (gated && i >= kTile / 2 ? width : 0);
  }
};

template <Activation A, class T>
__device__ void finish_rows(const RowsProductParams& p, const RowTile& tile, const Columns& columns,
                            const float* sums, bool aligned) {
  constexpr int N = kPack<T>, kUp = kTile / 2, kAcross = (kGated<A> ? kUp : kTile) / N;
  const int c = threadIdx.x % kAcross * N;
  const int64_t column = columns.first + c;
  const int valid = int(min(columns.width - column, int64_t(N)));
  if (valid <= 0) return;
  float bias[N] = {}, bias_up[N] = {};
  if (p.bias) {
    const T* of_expert = static_cast<const T*>(p.bias) + tile.expert * p.bias_stride + column;
    load_some(of_expert, bias, valid, false);
    if (kGated<A>) load_some(of_expert + columns.width, bias_up, valid, false);
  }
  for (int row = threadIdx.x / kAcross; row < tile.rows; row += kThreads / kAcross) {
    float v[N], up[N];
    load_sums(sums, row, c, v);
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] += bias[i];
    if constexpr (kGated<A>) {
      load_sums(sums, row, kUp + c, up);
#pragma unroll
      for (int i = 0; i < N; ++i) up[i] += bias_up[i];
    }
    const int64_t r = tile.first + row;
    if (p.pre) {
      T* pre = static_cast<T*>(p.pre) + r * p.n + column;
      store_some(pre, v, valid, aligned);
      if constexpr (kGated<A>) store_some(pre + columns.width, up, valid, aligned);
    }
#pragma unroll
    for (int i = 0; i < N; ++i) {
      v[i] = act_value<A>(v[i]);
      if constexpr (kGated<A>) v[i] *= up[i];
    }
    store_some(static_cast<T*>(p.out) + r * p.out_stride + column, v, valid, aligned);
  }
}

template <class T, bool kAligned, bool kByColumn>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor<T>)
    rows_product_kernel(const RowsProductParams p, bool gated, int row_tiles, int column_tiles,
                        bool aligned_out) {
  extern __shared__ __align__(128) char memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  const Place place = place_of(blockIdx.x, row_tiles, column_tiles);
  const RowTile tile = row_tile(p.experts, place.row);
  if (tile.rows == 0) return;
  const Columns columns{int64_t(place.column) * (gated ? kTile / 2 : kTile), gated ? p.n / 2 : p.n,
                        gated};
  AlongK<T, kAligned> a(int(p.k), [&](int i) -> const T* {
    return i < tile.rows ? row_or_null<T>(p.a, tile.first + i) : nullptr;
  });
  const T* b = static_cast<const T*>(p.b.data) + tile.expert * p.b.expert_stride;
  if constexpr (kByColumn) {
    AlongK<T, kAligned> columns_of_b(int(p.k), [&](int i) -> const T* {
      return columns.hidden(i) < columns.width ? b + columns.column(i) * p.b.stride : nullptr;
    });
    multiply<T>(shared, a, columns_of_b, int(p.k), tile.rows);
  } else {
    AcrossK<T, kAligned, false> rows_of_b(
        Rows{b, p.b.stride, p.k, nullptr}, 0, int(p.k), [&](int i) { return columns.column(i); },
        [&](int i) { return columns.width - columns.hidden(i); });
    multiply<T>(shared, a, rows_of_b, int(p.k), tile.rows);
  }
  with_activation(p.activation, [&](auto activation) {
    finish_rows<decltype(activation)::value, T>(p, tile, columns, shared.sums, aligned_out);
  });
}

template <class T>
int rows_product(const RowsProductParams& p, void* stream) {
  const bool gated = columns_per_hidden(p.activation) == 2;
  const int64_t width = gated ? p.n / 2 : p.n;  // of out
  const int64_t row_tiles = row_tiles_at_most(p.experts);
  const int64_t column_tiles = ceil_div(width, gated ? kTile / 2 : kTile);
  const bool aligned_out =
      in_chunks<T>(p.out, p.out_stride, width) && in_chunks<T>(p.pre, p.n, width);
  const bool aligned = in_chunks<T>(p.a.data, p.a.stride, p.k) && in_chunks<T>(p.b, p.k, width);
  return with_bool(aligned, [&](auto is_aligned) {
    return with_bool(p.b.by_column, [&](auto by_column) {
      return launch(rows_product_kernel<T, decltype(is_aligned)::value, decltype(by_column)::value>,
                    row_tiles * column_tiles, stream, p, gated, int(row_tiles), int(column_tiles),
                    aligned_out);
    });
  });
}

// --- hidden_backward ---

// Also leaves the inner products of the rows in `inner`, or adds to them.
template <Activation A, class T>
__device__ void finish_hidden(const HiddenBackwardParams& p, const RowTile& tile, int64_t first,
                              const float* sums, float* inner, bool adds, bool aligned) {
  constexpr int N = kPack<T>, kAcross = kTile / N, kRows = kThreads / kAcross;
  const int c = threadIdx.x % kAcross * N;
  const int64_t column = first + c, width = kGated<A> ? 2 * p.f : p.f;
  const int valid = int(max(min(p.f - column, int64_t(N)), int64_t(0)));
  for (int base = 0; base < tile.rows; base += kRows) {
    const int row = base + int(threadIdx.x) / kAcross;
    const bool inside = row < tile.rows && valid > 0;
    float product = 0;
    if (inside) {
      const int64_t r = tile.first + row;
      const float weight = row_weight(p.weights, p.row_pair, p.n_pairs, r).weight;
      float d[N], v[N], up[N], grad_up[N];
      load_sums(sums, row, c, d);
      const T* pre = static_cast<const T*>(p.pre) + r * width + column;
      load_some(pre, v, valid, aligned);
      if constexpr (kGated<A>) load_some(pre + p.f, up, valid, aligned);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        float value, slope, hidden;
        act_value_slope<A>(v[i], value, slope);
        const float weighted = weight * d[i];
        if constexpr (kGated<A>) {
          hidden = value * up[i];
          grad_up[i] = weighted * value;
          slope *= up[i];
        } else {
          hidden = value;
        }
        if (i < valid) product += d[i] * hidden;
        v[i] = weight * hidden;
        d[i] = weighted * slope;
      }
      T* grad_pre = static_cast<T*>(p.grad_pre) + r * width + column;
      store_some(grad_pre, d, valid, aligned);
      if constexpr (kGated<A>) store_some(grad_pre + p.f, grad_up, valid, aligned);
      store_some(static_cast<T*>(p.hidden) + r * p.f + column, v, valid, aligned);
    }
    if (p.inner) {
#pragma unroll
      for (int step = kAcross / 2; step > 0; step /= 2) {
        product += __shfl_xor_sync(kFullWarp, product, step);
      }
      if (c == 0 && inside) inner[row] = adds ? inner[row] + product : product;
    }
  }
}

// A block has kInnerColumns columns, one tile after the other.
template <class T, bool kAligned, bool kByColumn>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor<T>)
    hidden_backward_kernel(const HiddenBackwardParams p, int row_tiles, int parts,
                           bool aligned_out) {
  extern __shared__ __align__(128) char memory[];
  __shared__ float inner[kTile];
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  const Place place = place_of(blockIdx.x, row_tiles, parts);
  const RowTile tile = row_tile(p.experts, place.row);
  if (tile.rows == 0) return;
  const T* down = static_cast<const T*>(p.down.data) + tile.expert * p.down.expert_stride;
  const int64_t begin = place.column * kInnerColumns, end = min(begin + kInnerColumns, p.f);
  for (int64_t first = begin; first < end; first += kTile) {
    AlongK<T, kAligned> a(int(p.h), [&](int i) -> const T* {
      return i < tile.rows ? row_or_null<T>(p.grad, tile.first + i) : nullptr;
    });
    if constexpr (kByColumn) {
      AlongK<T, kAligned> b(int(p.h), [&](int i) -> const T* {
        return first + i < p.f ? down + (first + i) * p.down.stride : nullptr;
      });
      multiply<T>(shared, a, b, int(p.h), tile.rows);
    } else {
      AcrossK<T, kAligned, false> b(
          Rows{down, p.down.stride, p.h, nullptr}, 0, int(p.h), [&](int i) { return first + i; },
          [&](int i) { return p.f - first - i; });
      multiply<T>(shared, a, b, int(p.h), tile.rows);
    }
    with_activation(p.activation, [&](auto activation) {
      finish_hidden<decltype(activation)::value, T>(p, tile, first, shared.sums, inner,
                                                    first > begin, aligned_out);
    });
    __syncthreads();
  }
  if (p.inner && int(threadIdx.x) < tile.rows) {
    p.inner[place.column * p.experts.n_rows + tile.first + threadIdx.x] = inner[threadIdx.x];
  }
}

template <class T>
int hidden_backward(const HiddenBackwardParams& p, void* stream) {
  const int64_t row_tiles = row_tiles_at_most(p.experts), parts = inner_parts(p.f);
  const bool aligned_out = in_chunks<T>(p.pre, p.f, p.f) && in_chunks<T>(p.grad_pre, p.f, p.f) &&
                           in_chunks<T>(p.hidden, p.f, p.f);
  const bool aligned =
      in_chunks<T>(p.grad.data, p.grad.stride, p.h) && in_chunks<T>(p.down, p.h, p.f);
  return with_bool(aligned, [&](auto is_aligned) {
    return with_bool(p.down.by_column, [&](auto by_column) {
      return launch(
          hidden_backward_kernel<T, decltype(is_aligned)::value, decltype(by_column)::value>,
          row_tiles * parts, stream, p, int(row_tiles), int(parts), aligned_out);
    });
  });
}

}  // namespace portable
}  // namespace sparsemoe
