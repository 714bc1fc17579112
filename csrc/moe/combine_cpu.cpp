#include "moe/combine.h"

#define SPARSEMOE_THIS_FILE "moe/combine_cpu.cpp"
#include "common/for_each_isa.h"

#ifndef SPARSEMOE_DISPATCH
#include "moe/rows_cpu.h"

namespace sparsemoe {
namespace SPARSEMOE_ISA {

// y = sum + weight[0] * row[0] + ... of M rows, in this order; sum starts at zero where `first`,
// and is kept where not `last`.
template <int M, class T, class Real>
void add_rows(const T* const* row, const Real* weight, bool first, bool last, int64_t n, Real* sum,
              T* y) {
  const auto value = [&](int64_t c, Real start) {
    for (int m = 0; m < M; ++m) start += weight[m] * load(row[m][c]);
    return start;
  };
  if (first && last) {
    for (int64_t c = 0; c < n; ++c) store(y + c, value(c, Real(0)));
  } else if (first) {
    for (int64_t c = 0; c < n; ++c) sum[c] = value(c, Real(0));
  } else if (last) {
    for (int64_t c = 0; c < n; ++c) store(y + c, value(c, sum[c]));
  } else {
    for (int64_t c = 0; c < n; ++c) sum[c] = value(c, sum[c]);
  }
}

template <class T>
void sum_rows(const CombineParams& p) {
  using Real = acc_t<T>;
  const T* rows = static_cast<const T*>(p.rows);
  const Real* weights = static_cast<const Real*>(p.weights);
  parallel_for(0, p.map.n_tokens, grain_for(p.width * 16), [&](int64_t begin, int64_t end) {
    std::vector<Real> sum(p.width);
    for (int64_t t = begin; t < end; ++t) {
      T* y = static_cast<T*>(p.y) + t * p.width;
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
          add_rows<count>(row, weight, first, last, p.width, sum.data(), y);
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
      Real inner = 0;
#pragma omp simd reduction(+ : inner)
      for (int64_t c = 0; c < p.width; ++c) {
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
