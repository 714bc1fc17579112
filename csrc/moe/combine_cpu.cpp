#include "moe/combine.h"

#define SPARSEMOE_THIS_FILE "moe/combine_cpu.cpp"
#include "common/for_each_isa.h"

#ifndef SPARSEMOE_DISPATCH
namespace sparsemoe {
namespace SPARSEMOE_ISA {

template <class T>
void sum_rows(const CombineParams& p) {
  using Real = acc_t<T>;
  constexpr int64_t kColumns = 512;
  const T* rows = static_cast<const T*>(p.rows);
  const Real* weights = static_cast<const Real*>(p.weights);
  const RowMap& map = p.map;
  parallel_for(0, map.n_tokens, grain_for(p.width * 16), [&](int64_t begin, int64_t end) {
    alignas(64) Real sum[kColumns];
    for (int64_t t = begin; t < end; ++t) {
      const int64_t first = map.token_offsets ? map.token_offsets[t] : t * map.top_k;
      const int64_t last = map.token_offsets ? map.token_offsets[t + 1] : first + map.top_k;
      for (int64_t column = 0; column < p.width; column += kColumns) {
        const int64_t n = std::min(kColumns, p.width - column);
        std::fill(sum, sum + n, Real(0));
        for (int64_t i = first; i < last; ++i) {
          const int64_t row = uint32_t(map.token_rows[i]);
          if (row >= map.n_rows) continue;
          const Real weight =
              weights ? weights[map.token_offsets ? map.row_pair[row] : i] : Real(1);
          const T* from = rows + row * p.rows_stride + column;
          for (int64_t c = 0; c < n; ++c) sum[c] += weight * load(from[c]);
        }
        T* to = static_cast<T*>(p.y) + t * p.width + column;
        for (int64_t c = 0; c < n; ++c) store(to + c, sum[c]);
      }
    }
  });
}

template <class T>
void sum_rows_backward(const CombineBackwardParams& p) {
  using Real = acc_t<T>;
  const Real* weights = static_cast<const Real*>(p.weights);
  Real* grad_weights = static_cast<Real*>(p.grad_weights);
  std::fill(grad_weights, grad_weights + p.n_pairs, Real(0));
  parallel_for(0, p.map.n_rows, grain_for(p.width * 16), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t token = uint32_t(p.map.row_token[row]), pair = uint32_t(p.map.row_pair[row]);
      T* grad_row = static_cast<T*>(p.grad_rows) + row * p.width;
      if (token >= p.map.n_tokens || pair >= p.n_pairs) {
        std::memset(static_cast<void*>(grad_row), 0, p.width * sizeof(T));
        continue;
      }
      const T* grad = static_cast<const T*>(p.grad) + token * p.grad_stride;
      const T* values = static_cast<const T*>(p.rows) + row * p.rows_stride;
      const Real weight = weights[pair];
      Real inner = 0;
#pragma omp simd reduction(+ : inner)
      for (int64_t c = 0; c < p.width; ++c) {
        const Real g = load(grad[c]);
        inner += g * load(values[c]);
        store(grad_row + c, weight * g);
      }
      grad_weights[pair] = inner;
    }
  });
}

void combine(const CombineParams& p) {
  with_dtype(p.dtype, [&](auto* type) { sum_rows<std::remove_pointer_t<decltype(type)>>(p); });
}

void combine_backward(const CombineBackwardParams& p) {
  with_dtype(p.dtype,
             [&](auto* type) { sum_rows_backward<std::remove_pointer_t<decltype(type)>>(p); });
}

}  // namespace SPARSEMOE_ISA
}  // namespace sparsemoe

#else
namespace sparsemoe {

void combine_cpu(const CombineParams& p) { SPARSEMOE_BEST_ISA(combine, p); }
void combine_backward_cpu(const CombineBackwardParams& p) {
  SPARSEMOE_BEST_ISA(combine_backward, p);
}

}  // namespace sparsemoe
#endif
