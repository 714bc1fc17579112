// Sums over the rows of experts of outer products.
#pragma once

#include "moe/experts_portable.cuh"

namespace sparsemoe {
namespace portable {

template <class T>
__device__ void finish_weight(const WeightGradParams& p, int64_t expert, int64_t first_row,
                              int64_t first_column, const float* sums, bool aligned) {
  constexpr int N = kPack<T>, kAcross = kTile / N;
  const int c = threadIdx.x % kAcross * N;
  const int64_t column = first_column + c;
  const int valid = int(min(p.n - column, int64_t(N)));
  if (valid <= 0) return;
  const int rows = int(min(p.m - first_row, int64_t(kTile)));
  for (int row = threadIdx.x / kAcross; row < rows; row += kThreads / kAcross) {
    float v[N];
    load_sums(sums, row, c, v);
    const int64_t at = (expert * p.m + first_row + row) * p.n + column;
    if (p.accumulate) {
      float* out = static_cast<float*>(p.out) + at;
      float before[N];
#pragma unroll
      for (int i = 0; i < N; ++i) before[i] = i < valid ? out[i] : 0.0f;
#pragma unroll
      for (int i = 0; i < N; ++i) v[i] += before[i];
      store_some(out, v, valid, aligned);
    } else {
      store_some(static_cast<T*>(p.out) + at, v, valid, aligned);
    }
  }
}

template <class T, bool kAligned, bool kGatherA, bool kGatherB>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor<T>)
    weight_grad_kernel(const WeightGradParams p, int row_tiles, int column_tiles,
                       bool aligned_out) {
  extern __shared__ __align__(128) char memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  const int64_t tiles = int64_t(row_tiles) * column_tiles, expert = blockIdx.x / tiles;
  const Place place = place_of(blockIdx.x - expert * tiles, row_tiles, column_tiles);
  const int begin = expert_begin(p.experts, expert);
  const int end = max(expert_begin(p.experts, expert + 1), begin);
  if (p.accumulate && begin == end) return;
  const int64_t row = int64_t(place.row) * kTile, column = int64_t(place.column) * kTile;
  // Rows past the end are cleared in both operands: nothing else is multiplied by zero.
  AcrossK<T, kAligned, kGatherA> a(
      p.a, begin, end, [&](int i) { return row + i; }, [&](int i) { return p.m - row - i; });
  AcrossK<T, kAligned, kGatherB> b(
      p.b, begin, end, [&](int i) { return column + i; }, [&](int i) { return p.n - column - i; });
  multiply<T>(shared, a, b, end - begin, int(min(p.m - row, int64_t(kTile))));
  finish_weight<T>(p, expert, row, column, shared.sums, aligned_out);
}

template <class T>
int weight_grad(const WeightGradParams& p, void* stream) {
  const int64_t row_tiles = ceil_div(p.m, kTile), column_tiles = ceil_div(p.n, kTile);
  const bool aligned_out =
      p.accumulate ? in_chunks<float>(p.out, p.n, p.n) : in_chunks<T>(p.out, p.n, p.n);
  const bool aligned =
      in_chunks<T>(p.a.data, p.a.stride, p.m) && in_chunks<T>(p.b.data, p.b.stride, p.n);
  return with_bool(aligned, [&](auto is_aligned) {
    return with_bool(p.a.index != nullptr, [&](auto gather_a) {
      return with_bool(p.b.index != nullptr, [&](auto gather_b) {
        return launch(weight_grad_kernel<T, decltype(is_aligned)::value, decltype(gather_a)::value,
                                         decltype(gather_b)::value>,
                      p.experts.n_experts * row_tiles * column_tiles, stream, p, int(row_tiles),
                      int(column_tiles), aligned_out);
      });
    });
  });
}

}  // namespace portable
}  // namespace sparsemoe
