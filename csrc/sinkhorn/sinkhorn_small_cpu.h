// Sinkhorn's iterations on up to kLanes small problems side by side, a lane each. Included once for
// each instruction set: no include guard.

namespace sparsemoe {
namespace SPARSEMOE_ISA {

// Of larger problems the rows fill the lanes.
inline bool fits_lanes(const SinkhornProblems& in) {
  return in.n_rows <= 12 && in.n_rows * in.n_columns <= 512;
}

// Everything is [..][lane]. With K' = exp(logits / temperature - the row's largest) as in Range;
// `lost` tells of lanes in which that does not do, and what they hold is then worth nothing.
template <class T>
class SmallProblems {
 public:
  using Real = acc_t<T>;

  SmallProblems(const SinkhornProblems& in, bool keep)
      : n_rows(in.n_rows),
        n(in.n_columns),
        k(n_rows * n * kLanes),
        r(n_rows * kLanes),
        c(n * kLanes),
        shift(n_rows * kLanes),
        column(n * kLanes),
        in(in),
        stride(keep),
        us((stride * in.n_iters + 1) * n_rows * kLanes),
        vs((stride * in.n_iters + 1) * n * kLanes) {}

  const int64_t n_rows, n;
  std::vector<Real> k, r, c, shift, column;
  Real total[kLanes], error[kLanes];
  int32_t iterations[kLanes], lost[kLanes];

  // After iteration i; the last ones that ran if they are not kept.
  Real* u(int64_t i) { return &us[stride * i * n_rows * kLanes]; }
  Real* v(int64_t i) { return &vs[stride * i * n * kLanes]; }

  // Problems first .. first + count - 1. Lanes past them repeat the last. Returns the iterations
  // that ran in some lane.
  int64_t run(int64_t first, int64_t count, bool measures, double* history) {
    load_problems(first, count);
    const bool may_stop = in.tolerance >= 0;
    int32_t going[kLanes];
    SPARSEMOE_LANES(i) {
      iterations[i] = lost[i] = 0;
      going[i] = 1;
      error[i] = -1;
    }
    std::fill_n(v(0), n * kLanes, Real(1));
    rows(0);
    int64_t done = 0;
    for (; done < in.n_iters; ++done) {
      add_columns(done);
      if (may_stop) {
        measure(v(done));
        int32_t any = 0;
        for (int32_t i = 0; i < kLanes; ++i) {
          going[i] &= !(double(error[i]) <= in.tolerance);
          any |= going[i];
        }
        if (!any) break;
      }
      columns(done, going);
      rows(done + 1);
      SPARSEMOE_LANES(i) iterations[i] += going[i];
      if (history) write_history(first, count, done, history);
    }
    if (measures && !may_stop) add_columns(done), measure(v(done));
    if (may_stop && done == in.n_iters) add_columns(done), measure(v(done));
    return done;
  }

 private:
  const SinkhornProblems& in;
  const int64_t stride;
  std::vector<Real> us, vs;

  void load_problems(int64_t first, int64_t count) {
    load_lanes(static_cast<const T*>(in.logits) + first * n_rows * n, n_rows * n, n_rows * n, count,
               k.data());
    std::fill(r.begin(), r.end(), Real(1));
    if (in.row_marginals) {
      load_lanes(static_cast<const Real*>(in.row_marginals) + first * n_rows, n_rows, n_rows, count,
                 r.data());
    }
    for (int64_t t = 0; in.mask && t < n_rows; ++t) {
      for (int64_t i = 0; i < kLanes; ++i) {
        const bool used = in.mask[(first + std::min(i, count - 1)) * n_rows + t];
        r[t * kLanes + i] = used ? r[t * kLanes + i] : Real(0);
      }
    }
    SPARSEMOE_LANES(i) total[i] = 0;
    for (int64_t t = 0; t < n_rows; ++t) {
      SPARSEMOE_LANES(i) total[i] += r[t * kLanes + i];
    }
    if (in.col_marginals) {
      load_lanes(static_cast<const Real*>(in.col_marginals) + first * n, n, n, count, c.data());
    } else {
      for (int64_t e = 0; e < n; ++e) {
        SPARSEMOE_LANES(i) c[e * kLanes + i] = total[i] / Real(n);
      }
    }
    const double factor = std::min<double>(1 / in.temperature, std::numeric_limits<Real>::max());
    const Real forbidden = -std::numeric_limits<Real>::infinity();
    for (int64_t t = 0; t < n_rows; ++t) {
      Real *row = &k[t * n * kLanes], *of = &r[t * kLanes];
      if (in.mask || in.row_marginals) {
        for (int64_t e = 0; e < n; ++e) {
          SPARSEMOE_LANES(i) row[e * kLanes + i] = of[i] != 0 ? row[e * kLanes + i] : forbidden;
        }
      }
      exp_lanes(row, n, factor, &shift[t * kLanes]);
    }
  }

  // u_i = r / (K' v_i)
  void rows(int64_t i) {
    const Real* scaling = v(i);
    for (int64_t t = 0; t < n_rows; ++t) {
      const Real* row = &k[t * n * kLanes];
      Real sum[kLanes] = {};
      for (int64_t e = 0; e < n; ++e) {
        SPARSEMOE_LANES(l) sum[l] += row[e * kLanes + l] * scaling[e * kLanes + l];
      }
      Real* out = u(i) + t * kLanes;
      const Real* of = &r[t * kLanes];
      SPARSEMOE_LANES(l) out[l] = sum[l] == 0 ? Real(0) : of[l] / sum[l];
    }
  }

  // column = K'^T u_i
  void add_columns(int64_t i) {
    const Real* scaling = u(i);
    for (int64_t e = 0; e < n; ++e) {
      Real sum[kLanes] = {};
      for (int64_t t = 0; t < n_rows; ++t) {
        const Real* of = &k[(t * n + e) * kLanes];
        SPARSEMOE_LANES(l) sum[l] += of[l] * scaling[t * kLanes + l];
      }
      SPARSEMOE_LANES(l) column[e * kLanes + l] = sum[l];
    }
  }

  // v_{i+1} = c / column in the lanes that go on.
  void columns(int64_t i, const int32_t* going) {
    Real floor[kLanes];
    SPARSEMOE_LANES(l) floor[l] = 0;
    for (int64_t t = 0; t < n_rows; ++t) {
      const Real* of = u(i) + t * kLanes;
      SPARSEMOE_LANES(l) floor[l] += of[l];
    }
    SPARSEMOE_LANES(l) floor[l] = Range<Real>::kMass * (floor[l] > 1 ? floor[l] : Real(1));
    for (int64_t e = 0; e < n; ++e) {
      const Real *sum = &column[e * kLanes], *of = &c[e * kLanes], *old = v(i) + e * kLanes;
      Real* out = v(i + 1) + e * kLanes;
      SPARSEMOE_LANES(l) {
        const Real found = of[l] / sum[l];
        const bool inside =
            sum[l] >= floor[l] && found >= Range<Real>::kLeast && found <= Range<Real>::kMost;
        lost[l] |= going[l] && !inside;
        out[l] = going[l] ? found : old[l];
      }
    }
  }

  void measure(const Real* scaling) {
    SPARSEMOE_LANES(l) error[l] = 0;
    for (int64_t e = 0; e < n; ++e) {
      const Real *sum = &column[e * kLanes], *of = &c[e * kLanes], *by = scaling + e * kLanes;
      SPARSEMOE_LANES(l) error[l] += std::abs(sum[l] * by[l] - of[l]);
    }
    const Real least = std::numeric_limits<Real>::min();
    SPARSEMOE_LANES(l) error[l] /= total[l] < least ? least : total[l];
  }

  void write_history(int64_t first, int64_t count, int64_t done, double* history) {
    for (int64_t i = 0; i < count; ++i) {
      double* to = history + ((first + i) * in.n_iters + done) * n;
      for (int64_t e = 0; e < n; ++e) {
        to[e] = iterations[i] > done ? std::log(double(v(done + 1)[e * kLanes + i])) : 0;
      }
    }
  }
};

}  // namespace SPARSEMOE_ISA
}  // namespace sparsemoe
