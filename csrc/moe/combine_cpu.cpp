#include "moe/combine.h"

#define SPARSEMOE_THIS_FILE "moe/combine_cpu.cpp"
#include "common/for_each_isa.h"

#ifndef SPARSEMOE_DISPATCH
#include "moe/rows_cpu.h"

namespace sparsemoe {
namespace SPARSEMOE_ISA {

// y = sum + weight[0] * row[0] + ... of M rows, in this order; sum starts at zero where kFirst, and
// is kept where not kLast.
template <bool kFirst, bool kLast, int M, class T, class Real>
void add_rows(const T* const* rows, const Real* weights, int64_t n, Real* sum, T* y) {
  const T* row[M + 1];  // copies, which no store below can change: then the loop is vector code
  Real weight[M + 1];
  for (int m = 0; m < M; ++m) row[m] = rows[m], weight[m] = weights[m];
  const int64_t words = n / Words<T>::kParts;
  for (int64_t w = 0; w < words; ++w) {
    const auto part = [&](int i) {
      Real value = kFirst ? Real(0) : sum[i * words + w];
      for (int m = 0; m < M; ++m) value += weight[m] * Words<T>::load_part(row[m], w, i);
      return value;
    };
    if constexpr (kLast) {
      Words<T>::store_parts(y, w, part);
    } else {
      for (int i = 0; i < Words<T>::kParts; ++i) sum[i * words + w] = part(i);
    }
  }
  for (int64_t c = words * Words<T>::kParts; c < n; ++c) {
    Real value = kFirst ? Real(0) : sum[c];
    for (int m = 0; m < M; ++m) value += weight[m] * load(row[m][c]);
    sum[c] = value;
    if (kLast) store(y + c, value);
  }
}

template <class T>
void sum_rows(const CombineParams& p) {
  using Real = acc_t<T>;
  const T* rows = static_cast<const T*>(p.rows);
  const Real* weights = static_cast<const Real*>(p.weights);
  const int64_t y_stride = p.y_stride ? p.y_stride : p.width;
  parallel_for(0, p.map.n_tokens, grain_for(p.width * 16), [&](int64_t begin, int64_t end) {
    std::vector<Real> sum(p.width);
    for (int64_t t = begin; t < end; ++t) {
      T* y = static_cast<T*>(p.y) + t * y_stride;
      Entries entries = entries_of(p.map, t);
      for (bool first = true, last = false; !last; first = false) {
        int64_t index[kRowsAtOnce], entry[kRowsAtOnce];
        const int held = take_rows(p.map, &entries, index, entry);
        last = entries.next >= entries.stop;
        const T* row[kRowsAtOnce];
        Real weight[kRowsAtOnce];
        for (int m = 0; m < held; ++m) {
          row[m] = rows + index[m] * p.rows_stride;
          const int64_t pair = weights ? pair_of(p.map, entry[m], index[m]) : -1;
          weight[m] = !weights ? Real(1) : pair < 0 ? Real(0) : weights[pair];
        }
        with_count(held, [&](auto count) {
          const auto add = first ? (last ? add_rows<true, true, count, T, Real>
                                         : add_rows<true, false, count, T, Real>)
                                 : (last ? add_rows<false, true, count, T, Real>
                                         : add_rows<false, false, count, T, Real>);
          add(row, weight, p.width, sum.data(), y);
        });
      }
    }
  });
}

template <class T>
void sum_rows_backward(const CombineBackwardParams& p) {
  using Real = acc_t<T>;
  const RowMap& map = p.map;
  T* grad_rows = static_cast<T*>(p.grad_rows);
  const Real* weights = static_cast<const Real*>(p.weights);
  Real* grad_weights = static_cast<Real*>(p.grad_weights);
  std::fill(grad_weights, grad_weights + p.n_pairs, Real(0));
  clear_unused(map, grad_rows, p.width * sizeof(T));
  const auto gradient = [&](int64_t token, int held, const int64_t* row, const int64_t* entry) {
    const T* grad = static_cast<const T*>(p.grad) + token * p.grad_stride;
    for (int m = 0; m < held; ++m) {
      const T* values = static_cast<const T*>(p.rows) + row[m] * p.rows_stride;
      T* grad_row = grad_rows + row[m] * p.width;
      const int64_t pair = pair_of(map, entry[m], row[m]);
      const Real weight = pair < 0 ? Real(0) : weights[pair];
      const int64_t words = p.width / Words<T>::kParts;
      Real inner = 0;
#pragma omp simd reduction(+ : inner)
      for (int64_t w = 0; w < words; ++w) {
        Real g[Words<T>::kParts];
        for (int i = 0; i < Words<T>::kParts; ++i) {
          g[i] = Words<T>::load_part(grad, w, i);
          inner += g[i] * Words<T>::load_part(values, w, i);
        }
        Words<T>::store_parts(grad_row, w, [&](int i) { return weight * g[i]; });
      }
      for (int64_t c = words * Words<T>::kParts; c < p.width; ++c) {
        const Real g = load(grad[c]);
        inner += g * load(values[c]);
        store(grad_row + c, weight * g);
      }
      if (pair >= 0) grad_weights[pair] = inner;
    }
  };
  for_each_token(map, p.width * 16, gradient);
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
