#include "rvq/code_sums.h"

#define SPARSEMOE_THIS_FILE "rvq/code_sums_cpu.cpp"
#include "common/for_each_isa.h"

#ifndef SPARSEMOE_DISPATCH
#include "rvq/rows_cpu.h"

namespace sparsemoe {
namespace SPARSEMOE_ISA {

// The columns from `begin` to `end` of the sums of one stage. Threads share out columns, never
// rows, so that the order of a sum does not depend on how many there are.
template <class T>
void sum_columns(const RvqCodeSumsParams& p, int64_t stage, int64_t begin, int64_t end) {
  using Real = acc_t<T>;
  const int64_t width = end - begin;
  const Real* codebooks = static_cast<const Real*>(p.codebooks);
  const Real* weights = static_cast<const Real*>(p.weights);
  std::vector<Real> value(width);
  std::vector<double> sums(p.n_codes * width);  // double: a code may be that of very many rows
  const auto subtract = [&](int64_t q, int32_t code) {
    if (!codebooks || !is_code(code, p.n_codes)) return;
    subtract_row(codebooks + (q * p.n_codes + code) * p.width + begin, width, value.data());
  };
  for (int64_t n = 0; n < p.n; ++n) {
    const int32_t* codes = p.codes + n * p.n_stages;
    if (!is_code(codes[stage], p.n_codes)) continue;
    load_row(static_cast<const T*>(p.x) + n * p.x_stride + begin, width, value.data());
    for (int64_t q = 0; q < stage; ++q) subtract(q, codes[q]);
    if (p.after) subtract(stage, codes[stage]);
    const Real weight = weights ? weights[n * p.n_stages + stage] : Real(1);
    double* sum = sums.data() + codes[stage] * width;
    for (int64_t c = 0; c < width; ++c) sum[c] += weight * value[c];
  }
  Real* out = static_cast<Real*>(p.sums) + stage * p.n_codes * p.width + begin;
  for (int64_t j = 0; j < p.n_codes; ++j) {
    for (int64_t c = 0; c < width; ++c) out[j * p.width + c] = Real(sums[j * width + c]);
  }
}

template <class Real>
void count_codes(const RvqCodeSumsParams& p, int64_t stage) {
  std::vector<int64_t> counts(p.n_codes);
  for (int64_t n = 0; n < p.n; ++n) {
    const int32_t code = p.codes[n * p.n_stages + stage];
    if (is_code(code, p.n_codes)) ++counts[code];
  }
  Real* out = static_cast<Real*>(p.counts) + stage * p.n_codes;
  for (int64_t j = 0; j < p.n_codes; ++j) out[j] = Real(counts[j]);
}

template <class T>
void sum_codes(const RvqCodeSumsParams& p) {
  constexpr int64_t kColumns = 64;
  const int64_t slices = (p.width + kColumns - 1) / kColumns;
  parallel_for(0, p.n_stages * slices, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % slices * kColumns;
      sum_columns<T>(p, i / slices, first, std::min(p.width, first + kColumns));
    }
  });
  for (int64_t q = 0; q < p.n_stages; ++q) count_codes<acc_t<T>>(p, q);
}

// The new codes of one stage.
template <class Real>
void ema_stage(const RvqEmaParams& p, int64_t stage) {
  const double decay = p.decay, epsilon = p.epsilon;
  const int64_t first = stage * p.n_codes;
  Real* sizes = static_cast<Real*>(p.cluster_size) + first;
  const Real* counts = static_cast<const Real*>(p.counts) + first;
  double total = 0;
  for (int64_t j = 0; j < p.n_codes; ++j) {
    sizes[j] = Real(decay * sizes[j] + (1 - decay) * counts[j]);
    total += sizes[j];
  }
  const double factor = total / (total + p.n_codes * epsilon);
  parallel_for(0, p.n_codes, grain_for(p.width * 16), [&](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) {
      const int64_t row = (first + j) * p.width;
      Real* code = static_cast<Real*>(p.codebooks) + row;
      Real* mean = static_cast<Real*>(p.embed_sum) + row;
      const Real* sum = static_cast<const Real*>(p.sums) + row;
      const Real kept = Real(decay), added = Real(1 - decay);
      const Real size = Real((sizes[j] + epsilon) * factor);
      for (int64_t c = 0; c < p.width; ++c) {
        mean[c] = kept * mean[c] + added * sum[c];
        code[c] = mean[c] / size;
      }
    }
  });
}

void code_sums(const RvqCodeSumsParams& p) {
  with_dtype(p.dtype, [&](auto* type) { sum_codes<std::remove_pointer_t<decltype(type)>>(p); });
}

void ema(const RvqEmaParams& p) {
  for (int64_t q = 0; q < p.n_stages; ++q) {
    if (p.dtype == DType::f64) {
      ema_stage<double>(p, q);
    } else {
      ema_stage<float>(p, q);
    }
  }
}

}  // namespace SPARSEMOE_ISA
}  // namespace sparsemoe

#else
namespace sparsemoe {

void rvq_code_sums_cpu(const RvqCodeSumsParams& p) { SPARSEMOE_BEST_ISA(code_sums, p); }
void rvq_ema_cpu(const RvqEmaParams& p) { SPARSEMOE_BEST_ISA(ema, p); }

}  // namespace sparsemoe
#endif
