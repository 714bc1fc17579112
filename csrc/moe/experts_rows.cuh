// How the kernels of the experts find rows.
#pragma once

#include "common/cuda.cuh"
#include "moe/experts.h"

namespace sparsemoe {

// The first row of expert e; of e = n_experts, the end of the last.
__device__ inline int expert_begin(const ExpertRows& experts, int64_t e) {
  return int(min(max(int64_t(__ldg(experts.offsets + e)), int64_t(0)), experts.n_rows));
}

// Row r, or null where it is a row of zeros.
template <class T>
__device__ const T* row_or_null(const Rows& rows, int64_t r) {
  const int64_t at = rows.index ? __ldg(rows.index + r) : r;
  return uint64_t(at) < uint64_t(rows.n) ? static_cast<const T*>(rows.data) + at * rows.stride
                                         : nullptr;
}

// The weight of row r, and whether it has one: it is zero without.
struct RowWeight {
  float weight;
  bool there;
};
__device__ inline RowWeight row_weight(const float* weights, const int32_t* row_pair,
                                       int64_t n_pairs, int64_t r) {
  if (!weights) return {1, true};
  const int64_t pair = __ldg(row_pair + r);
  const bool there = uint64_t(pair) < uint64_t(n_pairs);
  return {there ? __ldg(weights + pair) : 0.0f, there};
}

}  // namespace sparsemoe
