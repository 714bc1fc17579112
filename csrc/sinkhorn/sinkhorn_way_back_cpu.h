// The way back through Sinkhorn's iterations on one problem of any size. With G = dL/dP,
// A_i = diag(1/r) P_i and B_i = diag(u_{i-1}) K diag(v_i / c), P_i = diag(u_i) K diag(v_i), and
// k iterations that ran:
//
//   df_k = (P_k o G) 1,  dg_k = (P_k o G)^T 1 - A_k^T df_k
//   df_{i-1} = -B_i dg_i,  dg_{i-1} = -A_{i-1}^T df_{i-1}     for i = k .. 1
//   dlogits = (P_k o G - sum_i diag(df_i) A_i - sum_i B_i diag(dg_i)) / temperature
//
// Included once for each instruction set: no include guard.

namespace sparsemoe {
namespace SPARSEMOE_ISA {

// Memory that is not cleared.
template <class Real>
class Space {
 public:
  explicit Space(int64_t n) : numbers(n > 0 ? new Real[n] : nullptr) {
    prefer_huge_pages(numbers.get(), n * sizeof(Real));
  }
  Real* data() { return numbers.get(); }

 private:
  std::unique_ptr<Real[]> numbers;
};

template <class T>
class WayBack {
  using Real = acc_t<T>;
  static constexpr double kForbidden = -std::numeric_limits<double>::infinity();

 public:
  // history: log v_1 .. log v_k
  WayBack(const Problem<T>& problem, const Real* grad, const int32_t* state, const double* history,
          T* out)
      : in(problem),
        n(problem.n),
        grad(grad),
        k(state[0]),
        out(out),
        log_v((k + 1) * n),
        c(n),
        column(n),
        partial(in.n_shares * n),
        blocks(kInPlace ? 0 : in.n_blocks * kLanes * n),
        tail(kInPlace && in.n_rows % kLanes ? n * kLanes : 0) {
    std::copy_n(history, k * n, log_v.begin() + n);
    for (int64_t e = 0; e < n; ++e) c[e] = in.column_marginal(e);
    // Memory for each row and iteration pays while there are few iterations.
    state[1] & kOutOfRange || k > 64 ? with_logarithms() : in_range();
  }

 private:
  const Problem<T>& in;
  const int64_t n;
  const Real* grad;
  const int64_t k;
  T* out;
  std::vector<double> log_v, c, column, partial;
  // Of each block [columns][lanes], in the place of its gradient where that is of the same type.
  static constexpr bool kInPlace = std::is_same<T, Real>::value;
  Space<Real> blocks;
  std::vector<Real> tail;

  Real* block(int64_t b) {
    if constexpr (kInPlace) {
      return b < in.n_rows / kLanes ? out + b * kLanes * n : tail.data();
    } else {
      return blocks.data() + b * kLanes * n;
    }
  }

  // Calls f(block, r, scratch, sum) for every block, with room for three blocks, and leaves in
  // `column` what it adds to sum[e][lane].
  template <class F>
  void for_blocks(F f) {
    const int64_t size = n * kLanes;
    in.for_shares(4 * size, [&](int64_t share, int64_t first, int64_t stop, Real* scratch) {
      Real* sum = scratch + 3 * size;
      std::fill(sum, sum + size, Real(0));
      for (int64_t b = first; b < stop; ++b) {
        Real r[kLanes];
        in.row_marginals(b, r);
        f(b, r, scratch, sum);
      }
      sum_lanes(sum, n, &partial[share * n]);
    });
    std::fill(column.begin(), column.end(), 0.0);
    for (int64_t share = 0; share < in.n_shares; ++share) {
      for (int64_t e = 0; e < n; ++e) column[e] += partial[share * n + e];
    }
  }

  void load_grad(int64_t b, Real* x) const {
    load_lanes(grad + b * kLanes * n, n, n, in.count(b), x);
  }

  void store_block(int64_t b, Real* x) const {
    const Real factor = Real(in.factor);
    for (int64_t e = 0; e < n; ++e) {
      SPARSEMOE_LANES(i) x[e * kLanes + i] *= factor;
    }
    store_lanes(x, n, in.count(b), out + b * kLanes * n, n);
  }

  // With K' = exp(logits / temperature - shift), y_i = v_i dg_i / c and alpha_i = u_i df_i / r:
  // df_{i-1} = -u_{i-1} (K' y_i), dg_i = -v_i (K'^T alpha_i), and dlogits is K' times a matrix of
  // rank 2k + 1, which is evaluated at the end.
  void in_range() {
    // Of each iteration, [k + 1][columns]; of each block, [k + 1][lanes].
    std::vector<Real> v((k + 1) * n), y((k + 1) * n);
    Space<Real> rows(2 * in.n_blocks * (k + 1) * kLanes);
    Real *us = rows.data(), *alphas = us + in.n_blocks * (k + 1) * kLanes;
    for (int64_t j = 0; j < (k + 1) * n; ++j) v[j] = exp_(Real(log_v[j]));

    const auto finish = [&](int64_t b, const Real* matrix, Real* x) {
      const Real *u = &us[b * (k + 1) * kLanes], *alpha = &alphas[b * (k + 1) * kLanes];
      load_grad(b, x);
      int64_t e = 0;
      for (; e + 4 <= n; e += 4) combine<4>(e, matrix, u, alpha, v.data(), y.data(), x);
      for (; e < n; ++e) combine<1>(e, matrix, u, alpha, v.data(), y.data(), x);
      store_block(b, x);
    };

    for_blocks([&](int64_t b, const Real* r, Real* x, Real* sum) {
      Real *matrix = block(b), *u = &us[b * (k + 1) * kLanes];
      Real *last_u = u + k * kLanes, *alpha = &alphas[(b * (k + 1) + k) * kLanes];
      Real shift[kLanes], inner[kLanes] = {};
      in.load_block(b, r, matrix);
      exp_lanes(matrix, n, in.factor, shift);
      const Real* vectors[4];
      for (int64_t i = 0; i <= k; i += 4) {
        const int64_t count = std::min<int64_t>(4, k + 1 - i);
        for (int64_t j = 0; j < count; ++j) vectors[j] = &v[(i + j) * n];
        if (count == 4) {
          dots<4>(matrix, n, vectors, u + i * kLanes);
        } else {
          for (int64_t j = 0; j < count; ++j) dot(matrix, n, vectors[j], u + (i + j) * kLanes);
        }
        for (int64_t j = i; j < i + count; ++j) {
          SPARSEMOE_LANES(l) {
            const Real s = u[j * kLanes + l];
            u[j * kLanes + l] = s == 0 ? Real(0) : r[l] / s;
          }
        }
      }
      load_grad(b, x);
      for (int64_t e = 0; e < n; ++e) {
        const Real by = v[k * n + e];
        SPARSEMOE_LANES(i) {
          x[e * kLanes + i] *= matrix[e * kLanes + i];
          inner[i] += x[e * kLanes + i] * by;
        }
      }
      SPARSEMOE_LANES(i) {
        alpha[i] = r[i] == 0 ? Real(0) : last_u[i] * inner[i] * (last_u[i] / r[i]);
      }
      for (int64_t e = 0; e < n; ++e) {
        SPARSEMOE_LANES(i) {
          sum[e * kLanes + i] += last_u[i] * x[e * kLanes + i] - matrix[e * kLanes + i] * alpha[i];
        }
      }
      if (k == 0) finish(b, matrix, x);
    });
    for (int64_t step = k; step > 0; --step) {
      Real* by = &y[step * n];
      for (int64_t e = 0; e < n; ++e) {
        const double dg = (step == k ? v[step * n + e] : -v[step * n + e]) * column[e];
        by[e] = c[e] == 0 ? Real(0) : Real(v[step * n + e] * dg / c[e]);
      }
      for_blocks([&](int64_t b, const Real* r, Real* x, Real* sum) {
        const Real *matrix = block(b), *u = &us[(b * (k + 1) + step - 1) * kLanes];
        Real *alpha = &alphas[(b * (k + 1) + step - 1) * kLanes], inner[kLanes];
        dot(matrix, n, by, inner);
        SPARSEMOE_LANES(i) alpha[i] = r[i] == 0 ? Real(0) : -u[i] * inner[i] * (u[i] / r[i]);
        if (step == 1) return finish(b, matrix, x);
        for (int64_t e = 0; e < n; ++e) {
          SPARSEMOE_LANES(i) sum[e * kLanes + i] += matrix[e * kLanes + i] * alpha[i];
        }
      });
    }
  }

  // x[e], the gradient of the plan, becomes that of the logits, from column e on.
  template <int kCount>
  void combine(int64_t e, const Real* matrix, const Real* u, const Real* alpha, const Real* v,
               const Real* y, Real* x) const {
    const Real *last_u = u + k * kLanes, *last_alpha = alpha + k * kLanes;
    Real d[kCount][kLanes];
    for (int c = 0; c < kCount; ++c) {
      const Real* of = x + (e + c) * kLanes;
      const Real by = v[k * n + e + c];
      SPARSEMOE_LANES(i) d[c][i] = (last_u[i] * of[i] - last_alpha[i]) * by;
    }
    for (int64_t j = 0; j < k; ++j) {
      const Real *of_u = u + j * kLanes, *of_alpha = alpha + j * kLanes;
      const Real *by_u = y + (j + 1) * n + e, *by_alpha = v + j * n + e;
      for (int c = 0; c < kCount; ++c) {
        const Real left = by_u[c], right = by_alpha[c];
        SPARSEMOE_LANES(i) d[c][i] -= of_u[i] * left + of_alpha[i] * right;
      }
    }
    for (int c = 0; c < kCount; ++c) {
      SPARSEMOE_LANES(i) { x[(e + c) * kLanes + i] = matrix[(e + c) * kLanes + i] * d[c][i]; }
    }
  }

  // The same with A_i and B_i as exponentials of sums in double, and dlogits added up on the way.
  void with_logarithms() {
    const auto finish = [&](int64_t b, const Real* from, Real* x) {
      std::copy_n(from, n * kLanes, x);  // it may stand where the gradient goes
      store_block(b, x);
    };
    std::vector<Real> dg(n);
    std::vector<double> add(n);  // log(v_i / c)

    for_blocks([&](int64_t b, const Real* r, Real* x, Real* sum) {
      Real *grads = x + n * kLanes, *to = block(b), df[kLanes] = {};
      double log_u[kLanes];
      rows(b, r, k, x, log_u);
      load_grad(b, grads);
      for (int64_t e = 0; e < n; ++e) {
        SPARSEMOE_LANES(i) {
          grads[e * kLanes + i] *= r[i];
          df[i] += x[e * kLanes + i] * grads[e * kLanes + i];
        }
      }
      for (int64_t e = 0; e < n; ++e) {
        SPARSEMOE_LANES(i) {
          to[e * kLanes + i] = x[e * kLanes + i] * (grads[e * kLanes + i] - df[i]);
          sum[e * kLanes + i] += to[e * kLanes + i];
        }
      }
      if (k == 0) finish(b, to, x);
    });
    for (int64_t step = k; step > 0; --step) {
      for (int64_t e = 0; e < n; ++e) {
        dg[e] = Real(step == k ? column[e] : -column[e]);
        add[e] = c[e] == 0 ? kForbidden : log_v[step * n + e] - std::log(c[e]);
      }
      for_blocks([&](int64_t b, const Real* r, Real* x, Real* sum) {
        Real *logits = x + n * kLanes, *to = block(b), df[kLanes] = {};
        double log_u[kLanes];
        rows(b, r, step - 1, x, log_u);
        in.load_block(b, r, logits);
        for (int64_t e = 0; e < n; ++e) {
          SPARSEMOE_LANES(i) {
            const double exponent = logits[e * kLanes + i] * in.factor + log_u[i] + add[e];
            const Real change = exp_(Real(exponent)) * dg[e];
            to[e * kLanes + i] -= change;
            df[i] -= change;
          }
        }
        for (int64_t e = 0; e < n; ++e) {
          SPARSEMOE_LANES(i) {
            const Real change = x[e * kLanes + i] * df[i];
            to[e * kLanes + i] -= change;
            sum[e * kLanes + i] += change;
          }
        }
        if (step == 1) finish(b, to, x);
      });
    }
  }

  // x = A_i and log u_i of a block.
  void rows(int64_t b, const Real* r, int64_t i, Real* x, double* log_u) const {
    double shift[kLanes];
    Real sum[kLanes] = {};
    in.load_block(b, r, x);
    exp_lanes(x, n, in.factor, &log_v[i * n], shift);
    for (int64_t e = 0; e < n; ++e) {
      SPARSEMOE_LANES(l) sum[l] += x[e * kLanes + l];
    }
    for (int32_t l = 0; l < kLanes; ++l) {
      log_u[l] = sum[l] == 0 ? kForbidden : std::log(double(r[l]) / sum[l]) - shift[l];
      sum[l] = sum[l] == 0 ? Real(0) : 1 / sum[l];
    }
    for (int64_t e = 0; e < n; ++e) {
      SPARSEMOE_LANES(l) x[e * kLanes + l] *= sum[l];
    }
  }
};

}  // namespace SPARSEMOE_ISA
}  // namespace sparsemoe
