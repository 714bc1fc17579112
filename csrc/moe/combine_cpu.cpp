#include "moe/combine.h"

#define SPARSEMOE_THIS_FILE "moe/combine_cpu.cpp"
#include "common/for_each_isa.h"

#ifndef SPARSEMOE_DISPATCH
namespace sparsemoe {
namespace SPARSEMOE_ISA {

constexpr int kRowsAtOnce = 4;

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
  const RowMap& map = p.map;
  parallel_for(0, map.n_tokens, grain_for(p.width * 16), [&](int64_t begin, int64_t end) {
    std::vector<Real> sum(p.width);
    for (int64_t t = begin; t < end; ++t) {
      const int64_t stop = map.token_offsets ? map.token_offsets[t + 1] : (t + 1) * map.top_k;
      int64_t i = map.token_offsets ? map.token_offsets[t] : t * map.top_k;
      T* y = static_cast<T*>(p.y) + t * p.width;
      const T* row[kRowsAtOnce];
      Real weight[kRowsAtOnce];
      for (bool first = true, last = false; !last; first = false) {
        int held = 0;
        for (; i < stop && held < kRowsAtOnce; ++i) {
          const int64_t r = uint32_t(map.token_rows[i]);
          if (r >= map.n_rows) continue;
          row[held] = rows + r * p.rows_stride;
          weight[held++] = weights ? weights[map.token_offsets ? map.row_pair[r] : i] : Real(1);
        }
        last = i == stop;
        switch (held) {
          case 4:
            add_rows<4>(row, weight, first, last, p.width, sum.data(), y);
            break;
          case 3:
            add_rows<3>(row, weight, first, last, p.width, sum.data(), y);
            break;
          case 2:
            add_rows<2>(row, weight, first, last, p.width, sum.data(), y);
            break;
          case 1:
            add_rows<1>(row, weight, first, last, p.width, sum.data(), y);
            break;
          default:
            add_rows<0>(row, weight, first, last, p.width, sum.data(), y);
        }
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
