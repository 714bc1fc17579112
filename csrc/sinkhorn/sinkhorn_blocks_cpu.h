// One problem on the CPU: its rows in blocks of kLanes, side by side, and the blocks in shares
// whose sums are added in order, so that any number of threads gives the same bits. Included once
// for each instruction set: no include guard.

namespace sparsemoe {
namespace SPARSEMOE_ISA {

// What is computed with K' = exp(logits / temperature - the row's largest) is right to rounding
// while the columns' scalings stay between kLeast and kMost and K'^T u does not come below kMass:
// what K' then loses to underflow is too small to count.
template <class Real>
struct Range;
template <>
struct Range<float> {
  static constexpr float kLeast = 0x1p-40f, kMost = 0x1p40f, kMass = 0x1p-100f;
};
template <>
struct Range<double> {
  static constexpr double kLeast = 0x1p-300, kMost = 0x1p300, kMass = 0x1p-700;
};

// log to 2 ulp in code that vectorises; zero, infinity and NaN as std::log's.
inline float log_(float x) {
  const float scaled = x < 0x1p-100f ? x * 0x1p64f : x;
  const uint32_t bits = float_to_bits(scaled) - 0x3f3504f3u;  // sqrt(1/2)
  float n = float(int32_t(bits) >> 23);
  const float m = bits_to_float((bits & 0x007fffffu) + 0x3f3504f3u) - 1;
  float p = 7.0376836292e-2f;
  p = p * m - 1.1514610310e-1f;
  p = p * m + 1.1676998740e-1f;
  p = p * m - 1.2420140846e-1f;
  p = p * m + 1.4249322787e-1f;
  p = p * m - 1.6668057665e-1f;
  p = p * m + 2.0000714765e-1f;
  p = p * m - 2.4999993993e-1f;
  p = p * m + 3.3333331174e-1f;
  n = x < 0x1p-100f ? n - 64 : n;
  const float log = m + (m * m * (p * m - 0.5f) + n * -2.12194440e-4f) + n * 0.693359375f;
  const float infinity = std::numeric_limits<float>::infinity();
  return x > 0 && x < infinity ? log : x == 0 ? -infinity : x < 0 ? x - x + NAN : x;
}
inline double log_(double x) { return std::log(x); }

// in[i] alone.
inline SinkhornProblems one_of(const SinkhornProblems& in, int64_t i) {
  const auto at = [](const void* from, int64_t bytes) -> const void* {
    return from ? static_cast<const char*>(from) + bytes : nullptr;
  };
  const int64_t real = in.dtype == DType::f64 ? 8 : 4;
  SinkhornProblems one = in;
  one.n_problems = 1;
  one.logits = at(in.logits, i * in.n_rows * in.n_columns * element_size(in.dtype));
  one.row_marginals = at(in.row_marginals, i * in.n_rows * real);
  one.col_marginals = at(in.col_marginals, i * in.n_columns * real);
  if (in.mask) one.mask = in.mask + i * in.n_rows;
  return one;
}

template <class T>
struct Problem {
  using Real = acc_t<T>;

  int64_t n_rows, n;  // n: columns
  const T* logits;
  const Real *rows, *columns;  // marginals
  const bool* mask;
  double factor;  // 1 / temperature
  int64_t n_iters;
  double tolerance;
  int64_t n_blocks, per_share, n_shares;
  bool parallel;
  double total = 0;  // of the rows

  // `in` holds one problem.
  Problem(const SinkhornProblems& in, bool parallel)
      : n_rows(in.n_rows),
        n(in.n_columns),
        logits(static_cast<const T*>(in.logits)),
        rows(static_cast<const Real*>(in.row_marginals)),
        columns(static_cast<const Real*>(in.col_marginals)),
        mask(in.mask),
        factor(std::min<double>(1 / in.temperature, std::numeric_limits<Real>::max())),
        n_iters(in.n_iters),
        tolerance(in.tolerance),
        n_blocks((n_rows + kLanes - 1) / kLanes),
        per_share(std::max<int64_t>((n_blocks + 63) / 64, 8)),
        n_shares((n_blocks + per_share - 1) / per_share),
        parallel(parallel) {
    double sum[kLanes] = {};
    for (int64_t b = 0; b < n_blocks; ++b) {
      Real r[kLanes];
      row_marginals(b, r);
      SPARSEMOE_LANES(i) sum[i] += r[i];
    }
    for (int32_t i = 0; i < kLanes; ++i) total += sum[i];
  }

  int64_t count(int64_t block) const { return std::min<int64_t>(kLanes, n_rows - block * kLanes); }

  // Of the rows of a block; 0 for those that take no part.
  void row_marginals(int64_t block, Real* r) const {
    const int64_t first = block * kLanes, there = count(block);
    if (!rows && !mask && there == kLanes) {
      SPARSEMOE_LANES(i) r[i] = 1;
      return;
    }
    for (int64_t i = 0; i < kLanes; ++i) {
      const bool used = i < there && (!mask || mask[first + i]);
      r[i] = !used ? Real(0) : rows ? rows[first + i] : Real(1);
    }
  }

  double column_marginal(int64_t e) const {
    return columns ? double(columns[e]) : total / double(n);
  }

  // Whether anything in column e is allowed.
  bool column_lives(int64_t e) const {
    for (int64_t b = 0; b < n_blocks; ++b) {
      Real r[kLanes];
      row_marginals(b, r);
      for (int64_t i = 0; i < count(b); ++i) {
        const Real logit = load(logits[(b * kLanes + i) * n + e]);
        if (r[i] != 0 && !(logit == -std::numeric_limits<Real>::infinity())) return true;
      }
    }
    return false;
  }

  // x[e][lane] = the logits of a block; -infinity in rows whose r is 0.
  void load_block(int64_t block, const Real* r, Real* x) const {
    load_lanes(logits + block * kLanes * n, n, n, count(block), x);
    bool all = true;
    for (int32_t i = 0; i < kLanes; ++i) all &= r[i] != 0;
    const Real forbidden = -std::numeric_limits<Real>::infinity();
    for (int64_t e = 0; !all && e < n; ++e) {
      SPARSEMOE_LANES(i) x[e * kLanes + i] = r[i] != 0 ? x[e * kLanes + i] : forbidden;
    }
  }

  // Calls f(share, first block, block after the last, scratch) for each share; scratch holds
  // `n_scratch` numbers.
  template <class F>
  void for_shares(int64_t n_scratch, F f) const {
    const auto body = [&](int64_t begin, int64_t end) {
      std::vector<Real> scratch(n_scratch);
      for (int64_t s = begin; s < end; ++s) {
        f(s, s * per_share, std::min((s + 1) * per_share, n_blocks), scratch.data());
      }
    };
    const int64_t bytes = per_share * kLanes * n * int64_t(sizeof(Real));
    parallel ? parallel_for(0, n_shares, grain_for(bytes), body) : body(0, n_shares);
  }
};

// Calls f(problem, whether to share out its rows): large problems one after the other, or many at a
// time.
template <class F>
void for_each_problem(const SinkhornProblems& in, int64_t grain, F f) {
  const bool large = in.n_rows * in.n_columns >= int64_t(1) << 15;
  if (in.n_problems == 1 || (large && in.n_problems < 64)) {
    for (int64_t i = 0; i < in.n_problems; ++i) f(i, true);
    return;
  }
  parallel_for(0, in.n_problems, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(i, false);
  });
}

// x[e][lane], logits, becomes exp(x / temperature - shift), shift being the row's largest of
// x / temperature, or 0 where that is -infinity.
template <class Real>
void exp_lanes(Real* x, int64_t n, double factor, Real* shift) {
  const Real scale = Real(factor), lowest = -std::numeric_limits<Real>::infinity();
  Real most[kLanes];
  SPARSEMOE_LANES(i) most[i] = lowest;
  for (int64_t e = 0; e < n; ++e) {
    SPARSEMOE_LANES(i) most[i] = x[e * kLanes + i] > most[i] ? x[e * kLanes + i] : most[i];
  }
  SPARSEMOE_LANES(i) most[i] = most[i] == lowest ? Real(0) : most[i];
  for (int64_t e = 0; e < n; ++e) {
    SPARSEMOE_LANES(i) x[e * kLanes + i] = exp_((x[e * kLanes + i] - most[i]) * scale);
  }
  SPARSEMOE_LANES(i) shift[i] = Real(most[i] * factor);
}

// The same of x / temperature + g[e].
template <class Real>
void exp_lanes(Real* x, int64_t n, double factor, const double* g, double* shift) {
  const double lowest = -std::numeric_limits<double>::infinity();
  double most[kLanes];
  SPARSEMOE_LANES(i) most[i] = lowest;
  for (int64_t e = 0; e < n; ++e) {
    SPARSEMOE_LANES(i) {
      const double value = x[e * kLanes + i] * factor + g[e];
      most[i] = value > most[i] ? value : most[i];
    }
  }
  SPARSEMOE_LANES(i) shift[i] = most[i] == lowest ? 0 : most[i];
  for (int64_t e = 0; e < n; ++e) {
    SPARSEMOE_LANES(i) {
      x[e * kLanes + i] = exp_(Real(x[e * kLanes + i] * factor + g[e] - shift[i]));
    }
  }
}

// out[j][lane] = sum_e k[e][lane] v[j][e], for kCount vectors.
template <int kCount, class Real>
void dots(const Real* k, int64_t n, const Real* const* v, Real* out) {
  Real sum[kCount][kLanes] = {};
  for (int64_t e = 0; e < n; ++e) {
    for (int j = 0; j < kCount; ++j) {
      const Real factor = v[j][e];
      SPARSEMOE_LANES(i) sum[j][i] += k[e * kLanes + i] * factor;
    }
  }
  for (int j = 0; j < kCount; ++j) {
    SPARSEMOE_LANES(i) out[j * kLanes + i] = sum[j][i];
  }
}

// One vector: four sums, so that none waits for the one before.
template <class Real>
void dot(const Real* k, int64_t n, const Real* v, Real* out) {
  Real sum[4][kLanes] = {};
  int64_t e = 0;
  for (; e + 4 <= n; e += 4) {
    for (int j = 0; j < 4; ++j) {
      SPARSEMOE_LANES(i) sum[j][i] += k[(e + j) * kLanes + i] * v[e + j];
    }
  }
  for (; e < n; ++e) {
    SPARSEMOE_LANES(i) sum[0][i] += k[e * kLanes + i] * v[e];
  }
  SPARSEMOE_LANES(i) out[i] = (sum[0][i] + sum[1][i]) + (sum[2][i] + sum[3][i]);
}

// sum[e] += k[e] u for kCount blocks k, each with its own u.
template <int kCount, class Real>
void add_columns(const Real* const* k, const Real (*u)[kLanes], int64_t n, Real* sum) {
  for (int64_t e = 0; e < n; ++e) {
    SPARSEMOE_LANES(i) {
      Real add = k[0][e * kLanes + i] * u[0][i];
      for (int j = 1; j < kCount; ++j) add += k[j][e * kLanes + i] * u[j][i];
      sum[e * kLanes + i] += add;
    }
  }
}

// out[e] = the sum of x[e] over the lanes.
template <class Real>
void sum_lanes(const Real* x, int64_t n, double* out) {
  static_assert(kLanes == 16, "halved twice, four are left");
  for (int64_t first = 0; first < n; first += 4) {
    Real quarters[4][4], parts[4][4];
    const Real* rows[4];
    for (int64_t j = 0; j < 4; ++j) {
      const Real* of = x + std::min(first + j, n - 1) * kLanes;
      Real half[8];
      _Pragma("omp simd") for (int i = 0; i < 8; ++i) half[i] = of[i] + of[i + 8];
      _Pragma("omp simd") for (int i = 0; i < 4; ++i) quarters[j][i] = half[i] + half[i + 4];
      rows[j] = quarters[j];
    }
    transpose4(rows, 0, parts[0], 4);
    for (int64_t j = 0; j < std::min<int64_t>(4, n - first); ++j) {
      out[first + j] = (parts[0][j] + parts[1][j]) + (parts[2][j] + parts[3][j]);
    }
  }
}

}  // namespace SPARSEMOE_ISA
}  // namespace sparsemoe
