// Sinkhorn's iterations on one problem of any size. Included once for each instruction set: no
// include guard.

namespace sparsemoe {
namespace SPARSEMOE_ISA {

// What solving one problem writes.
template <class Real>
struct Solution {
  Real* plan;
  Real *log_u, *log_v, *error;  // or null, all of them
  int32_t* state;
  double* history;  // or null
};

// state[1]: how the backward pass may go.
constexpr int32_t kInRange = 0;     // with K' and scalings, in Range
constexpr int32_t kOutOfRange = 1;  // with logarithms

// The plan is K' diag(v) with rows scaled to r, K' = exp(logits / temperature + g - shift), which
// stays in memory between iterations, in the plan's place. g, 0 at first, takes v over where v
// leaves its range; then K' is computed again.
template <class T>
class Solver {
  using Real = acc_t<T>;
  static constexpr double kForbidden = -std::numeric_limits<double>::infinity();

 public:
  Solver(const Problem<T>& problem, const Solution<Real>& out)
      : in(problem),
        n(problem.n),
        out(out),
        v(n, Real(1)),
        tail(in.n_rows % kLanes ? n * kLanes : 0),
        g(n),
        c(n),
        column(n),
        partial(in.n_shares * n),
        partial_u(in.n_shares),
        fixed(n) {
    for (int64_t e = 0; e < n; ++e) c[e] = in.column_marginal(e);
  }

  void run() {
    const bool may_stop = in.tolerance >= 0, measures = out.error;
    if (out.history) std::fill(out.history, out.history + in.n_iters * n, 0.0);
    double error = -1;
    int64_t done = 0;
    bool build = true;
    for (;; ++done) {
      const bool last = done == in.n_iters;
      if (last && !may_stop) break;  // the sweep that writes does the rest
      sweep(build, true, false);
      build = false;
      if (may_stop) {
        error = column_error();
        if (last || error <= in.tolerance) break;
      }
      build = update_columns(done == 0);
      for (int64_t e = 0; out.history && e < n; ++e) out.history[done * n + e] = log_v(e);
    }
    sweep(build, measures && !may_stop, true);
    if (measures && !may_stop) error = column_error();
    if (measures) {
      for (int64_t e = 0; e < n; ++e) out.log_v[e] = Real(log_v(e));
      *out.error = Real(error);
    }
    out.state[0] = int32_t(done);
    out.state[1] = based ? kOutOfRange : kInRange;
  }

 private:
  const Problem<T>& in;
  const int64_t n;
  const Solution<Real> out;
  std::vector<Real> v, tail;
  std::vector<double> g, c, column, partial, partial_u;
  std::vector<uint8_t> fixed;  // columns with nothing to scale: c is 0, or all is forbidden
  double sum_u = 0;
  bool based = false;  // on a g other than 0

  double log_v(int64_t e) const { return v[e] == 1 ? g[e] : g[e] + std::log(double(v[e])); }

  Real* block(int64_t b) {
    return b < in.n_rows / kLanes ? out.plan + b * kLanes * n : tail.data();
  }

  // Once over the rows: builds K' if need be and scales them. Then either the columns are added up
  // or the plan is written, or both.
  void sweep(bool build, bool add, bool write) {
    in.for_shares(2 * n * kLanes, [&](int64_t share, int64_t first, int64_t stop, Real* scratch) {
      Real *sum = scratch, *plan = scratch + n * kLanes, all_u[kLanes] = {}, u[2][kLanes];
      std::fill(sum, sum + n * kLanes, Real(0));
      for (int64_t b = first; b < stop; b += 2) {
        const Real* k[2];
        const int64_t count = std::min<int64_t>(2, stop - b);
        for (int64_t j = 0; j < count; ++j) k[j] = scale_block(b + j, build, u[j], all_u);
        if (add && count == 2) add_columns<2>(k, u, n, sum);
        if (add && count == 1) add_columns<1>(k, u, n, sum);
        for (int64_t j = 0; write && j < count; ++j) write_block(b + j, u[j], k[j], plan);
      }
      if (!add) return;
      sum_lanes(sum, n, &partial[share * n]);
      sum_lanes(all_u, 1, &partial_u[share]);
    });
    if (add) {
      add_partial();
      sum_u = 0;
      for (const double part : partial_u) sum_u += part;
    }
  }

  void add_partial() {
    std::fill(column.begin(), column.end(), 0.0);
    for (int64_t share = 0; share < in.n_shares; ++share) {
      for (int64_t e = 0; e < n; ++e) column[e] += partial[share * n + e];
    }
  }

  // u of a block, which is added to all_u too. Returns K'.
  const Real* scale_block(int64_t b, bool build, Real* u, Real* all_u) {
    Real *k = block(b), r[kLanes];
    in.row_marginals(b, r);
    if (build) build_block(b, r, k);
    dot(k, n, v.data(), u);
    SPARSEMOE_LANES(i) {
      u[i] = u[i] == 0 ? Real(0) : r[i] / u[i];
      all_u[i] += u[i];
    }
    return k;
  }

  // Keeps the rows' shifts in log_u, where that is wanted.
  void build_block(int64_t b, const Real* r, Real* k) {
    Real shift[kLanes];
    in.load_block(b, r, k);
    if (based) {
      double exact[kLanes];
      exp_lanes(k, n, in.factor, g.data(), exact);
      SPARSEMOE_LANES(i) shift[i] = Real(exact[i]);
    } else {
      exp_lanes(k, n, in.factor, shift);
    }
    if (out.log_u) std::copy_n(shift, in.count(b), out.log_u + b * kLanes);
  }

  void write_block(int64_t b, const Real* u, const Real* k, Real* plan) {
    if (out.log_u) {
      Real* log_u = out.log_u + b * kLanes;
      for (int64_t i = 0; i < in.count(b); ++i) log_u[i] = log_(u[i]) - log_u[i];
    }
    for (int64_t e = 0; e < n; ++e) {
      SPARSEMOE_LANES(i) plan[e * kLanes + i] = k[e * kLanes + i] * u[i] * v[e];
    }
    store_lanes(plan, n, in.count(b), out.plan + b * kLanes * n, n);
  }

  double column_error() const {
    double wrong = 0;
    for (int64_t e = 0; e < n; ++e) wrong += std::abs(column[e] * v[e] - c[e]);
    const double total = in.total;
    const double least = std::numeric_limits<Real>::min();
    return wrong / (total < least ? least : total);
  }

  // v = c / (K'^T u). Returns whether K' must be built anew.
  bool update_columns(bool first) {
    const double floor = Range<Real>::kMass * std::max(1.0, sum_u);
    bool exact = false, build = false;
    for (int64_t e = 0; e < n; ++e) {
      const bool lost = !(column[e] >= floor);
      if (first) fixed[e] = c[e] == 0 || (lost && !in.column_lives(e));
      exact |= lost && !fixed[e];
    }
    if (exact) {
      exact_columns();
      build = true;
    } else {
      for (int64_t e = 0; e < n; ++e) {
        if (fixed[e]) continue;
        v[e] = Real(c[e] / column[e]);
        build |= !(v[e] >= Range<Real>::kLeast && v[e] <= Range<Real>::kMost);
      }
    }
    for (int64_t e = 0; first && e < n; ++e) {
      if (c[e] == 0 && (column[e] >= floor || in.column_lives(e))) g[e] = kForbidden, build = true;
    }
    for (int64_t e = 0; build && e < n; ++e) g[e] = log_v(e), v[e] = 1;
    based |= build;
    return build;
  }

  // g = log(c / (K^T u)) from logarithms, v = 1: for columns whose sums underflow.
  void exact_columns() {
    std::vector<double> before(n), log_u(in.n_blocks * kLanes), most(n, kForbidden);
    for (int64_t e = 0; e < n; ++e) before[e] = log_v(e);
    in.for_shares(2 * n * kLanes, [&](int64_t share, int64_t first, int64_t stop, Real* x) {
      double* largest = &partial[share * n];
      std::fill(largest, largest + n, kForbidden);
      for (int64_t b = first; b < stop; ++b) {
        Real *k = x + n * kLanes, r[kLanes], sum[kLanes] = {};
        double shift[kLanes], *u = &log_u[b * kLanes];
        in.row_marginals(b, r);
        in.load_block(b, r, x);
        std::copy_n(x, n * kLanes, k);
        exp_lanes(k, n, in.factor, before.data(), shift);
        for (int64_t e = 0; e < n; ++e) {
          SPARSEMOE_LANES(i) sum[i] += k[e * kLanes + i];
        }
        for (int32_t i = 0; i < kLanes; ++i) {
          const bool none = sum[i] == 0;
          u[i] = none ? kForbidden : std::log(double(r[i])) - shift[i] - std::log(double(sum[i]));
        }
        for (int64_t e = 0; e < n; ++e) {
          double value = largest[e];
          _Pragma("omp simd reduction(max : value)") for (int32_t i = 0; i < kLanes; ++i) {
            const double here = x[e * kLanes + i] * in.factor + u[i];
            value = here > value ? here : value;
          }
          largest[e] = value;
        }
      }
    });
    for (int64_t share = 0; share < in.n_shares; ++share) {
      for (int64_t e = 0; e < n; ++e) most[e] = std::max(most[e], partial[share * n + e]);
    }
    for (int64_t e = 0; e < n; ++e) most[e] = most[e] == kForbidden ? 0 : most[e];
    in.for_shares(2 * n * kLanes, [&](int64_t share, int64_t first, int64_t stop, Real* x) {
      Real* sum = x + n * kLanes;
      std::fill(sum, sum + n * kLanes, Real(0));
      for (int64_t b = first; b < stop; ++b) {
        Real r[kLanes];
        const double* u = &log_u[b * kLanes];
        in.row_marginals(b, r);
        in.load_block(b, r, x);
        for (int64_t e = 0; e < n; ++e) {
          SPARSEMOE_LANES(i) {
            sum[e * kLanes + i] += exp_(Real(x[e * kLanes + i] * in.factor + u[i] - most[e]));
          }
        }
      }
      sum_lanes(sum, n, &partial[share * n]);
    });
    add_partial();
    for (int64_t e = 0; e < n; ++e) {
      if (!fixed[e]) g[e] = std::log(c[e]) - most[e] - std::log(column[e]);
      v[e] = 1;
    }
  }
};

}  // namespace SPARSEMOE_ISA
}  // namespace sparsemoe
