#include "rvq/decode.h"

#define SPARSEMOE_THIS_FILE "rvq/decode_cpu.cpp"
#include "common/for_each_isa.h"

#ifndef SPARSEMOE_DISPATCH
#include "rvq/rows_cpu.h"

namespace sparsemoe {
namespace SPARSEMOE_ISA {

constexpr int kRowsAtOnce = 4;
constexpr int64_t kAhead = 4;  // vectors for which codes are fetched early

// sum = sum + row[0] + ... of M rows, in this order; sum starts at zero where kFirst.
template <int M, bool kFirst, class T, class Real>
void add_rows(const T* const* rows, int64_t width, Real* sum) {
  const T* row[M];  // copies, which no store below can change: then the loop is vector code
  for (int m = 0; m < M; ++m) row[m] = rows[m];
  for (int64_t c = 0; c < width; ++c) {
    Real value = kFirst ? Real(0) : sum[c];
    for (int m = 0; m < M; ++m) value += load(row[m][c]);
    sum[c] = value;
  }
}

template <bool kFirst, class T, class Real>
void add_rows(int held, const T* const* rows, int64_t width, Real* sum) {
  switch (held) {
    case 0:
      if (kFirst) std::fill_n(sum, width, Real(0));
      return;
    case 1:
      return add_rows<1, kFirst>(rows, width, sum);
    case 2:
      return add_rows<2, kFirst>(rows, width, sum);
    case 3:
      return add_rows<3, kFirst>(rows, width, sum);
    default:
      return add_rows<kRowsAtOnce, kFirst>(rows, width, sum);
  }
}

template <class T>
void decode_rows(const RvqDecodeParams& p) {
  using Real = acc_t<T>;
  const int64_t width = p.width;
  const auto row_of = [&](int64_t n, int64_t q) {
    const int32_t code = p.codes[n * p.n_stages + q];
    return is_code(code, p.n_codes)
               ? static_cast<const T*>(p.codebooks) + (q * p.n_codes + code) * width
               : nullptr;
  };
  parallel_for(0, p.n, grain_for((p.n_stages + 1) * width * 4), [&](int64_t begin, int64_t end) {
    std::vector<Real> space(width);
    for (int64_t n = begin; n < end; ++n) {
      T* y = static_cast<T*>(p.y) + n * width;
      Real* sum = space.data();
      if constexpr (std::is_same_v<T, Real>) sum = y;
      bool first = true;
      for (int64_t q = 0; q < p.n_stages || first;) {
        const T* rows[kRowsAtOnce];
        int held = 0;
        for (; q < p.n_stages && held < kRowsAtOnce; ++q) {
          if (const T* ahead = row_of(std::min(n + kAhead, end - 1), q)) prefetch_row(ahead, width);
          if ((rows[held] = row_of(n, q))) ++held;
        }
        if (first) {
          add_rows<true>(held, rows, width, sum);
        } else {
          add_rows<false>(held, rows, width, sum);
        }
        first = false;
      }
      if constexpr (!std::is_same_v<T, Real>) store_row(sum, width, y);
    }
  });
}

void decode(const RvqDecodeParams& p) {
  with_dtype(p.dtype, [&](auto* type) { decode_rows<std::remove_pointer_t<decltype(type)>>(p); });
}

}  // namespace SPARSEMOE_ISA
}  // namespace sparsemoe

#else
namespace sparsemoe {

void rvq_decode_cpu(const RvqDecodeParams& p) { SPARSEMOE_BEST_ISA(decode, p); }

}  // namespace sparsemoe
#endif
