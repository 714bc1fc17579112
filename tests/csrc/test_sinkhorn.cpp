// The CPU kernels of the sinkhorn family, called as another host would call them.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "check.h"
#include "sinkhorn/sinkhorn.h"

using namespace sparsemoe;

namespace {

template <class Real>
struct Balanced {
  std::vector<Real> plan, log_u, log_v, error;
  std::vector<int32_t> state;
  std::vector<double> history;
};

template <class Real>
SinkhornProblems problems(const std::vector<Real>& logits, int64_t n_rows, int64_t n_columns,
                          int64_t n_iters) {
  SinkhornProblems in{};
  in.n_problems = int64_t(logits.size()) / (n_rows * n_columns);
  in.n_rows = n_rows;
  in.n_columns = n_columns;
  in.logits = logits.data();
  in.dtype = sizeof(Real) == 8 ? DType::f64 : DType::f32;
  in.temperature = 1;
  in.n_iters = n_iters;
  in.tolerance = -1;
  return in;
}

template <class Real>
Balanced<Real> balance(const SinkhornProblems& in, bool measures = true) {
  const int64_t n = in.n_problems;
  Balanced<Real> out{std::vector<Real>(n * in.n_rows * in.n_columns),
                     std::vector<Real>(n * in.n_rows),
                     std::vector<Real>(n * in.n_columns),
                     std::vector<Real>(n),
                     std::vector<int32_t>(2 * n),
                     std::vector<double>(n * in.n_iters * in.n_columns, -123)};
  SinkhornParams p{};
  p.in = in;
  p.measures = measures;
  p.plan = out.plan.data();
  if (measures) {
    p.log_u = out.log_u.data();
    p.log_v = out.log_v.data();
    p.error = out.error.data();
  }
  p.state = out.state.data();
  p.history = out.history.data();
  sinkhorn_cpu(p);
  return out;
}

template <class Real>
std::vector<Real> gradient(const SinkhornProblems& in, const std::vector<Real>& grad,
                           const Balanced<Real>& of, bool kept = true) {
  std::vector<Real> out(grad.size(), -123);
  SinkhornBackwardParams p{};
  p.in = in;
  p.grad = grad.data();
  p.state = of.state.data();
  p.history = kept ? of.history.data() : nullptr;
  p.grad_logits = out.data();
  sinkhorn_backward_cpu(p);
  return out;
}

// Numbers from -scale to scale without a pattern.
template <class Real>
std::vector<Real> scattered(int64_t n, double scale) {
  std::vector<Real> out(n);
  uint32_t state = 12345;
  for (Real& x : out) {
    state = state * 1664525u + 1013904223u;
    x = Real(scale * (double(state >> 8) / (1 << 23) - 1));
  }
  return out;
}

constexpr double kInfinity = std::numeric_limits<double>::infinity();

}  // namespace

TEST(two_by_two_is_known) {
  // P11 P22 / (P12 P21) is that of exp(logits), 3 * 12 / (2 * 2) = 9: P11 = P22 = 3/4.
  const std::vector<float> logits = {std::log(3.0f), std::log(2.0f), std::log(2.0f),
                                     std::log(12.0f)};
  const auto out = balance<float>(problems(logits, 2, 2, 50));
  const double wanted[] = {0.75, 0.25, 0.25, 0.75};
  for (int i = 0; i < 4; ++i) CHECK_NEAR(out.plan[i], wanted[i], 1e-6);
  CHECK(out.state[0] == 50);
  CHECK_NEAR(out.error[0], 0, 1e-6);
}

TEST(scalings_give_the_plan) {
  for (int64_t n_rows : {3, 100}) {
    const auto logits = scattered<float>(3 * n_rows * 7, 3);
    const auto out = balance<float>(problems(logits, n_rows, 7, 5));
    for (int64_t p = 0; p < 3; ++p) {
      for (int64_t t = 0; t < n_rows; ++t) {
        double sum = 0;
        for (int64_t e = 0; e < 7; ++e) {
          const int64_t at = (p * n_rows + t) * 7 + e;
          sum += out.plan[at];
          const double log = logits[at] + out.log_u[p * n_rows + t] + out.log_v[p * 7 + e];
          CHECK_NEAR(out.plan[at], std::exp(log), 1e-5);
        }
        CHECK_NEAR(sum, 1, 1e-6);
      }
    }
  }
}

TEST(side_by_side_or_by_rows_is_the_same) {
  // Twelve rows go side by side with other problems; one more, masked, has rows side by side.
  const auto few = scattered<double>(12 * 8, 2);
  std::vector<double> more = few;
  more.resize(13 * 8, 5.0);
  bool mask[13];
  for (int t = 0; t < 13; ++t) mask[t] = t < 12;
  const auto a = balance<double>(problems(few, 12, 8, 6));
  SinkhornProblems in = problems(more, 13, 8, 6);
  in.mask = mask;
  const auto b = balance<double>(in);
  for (int64_t i = 0; i < 12 * 8; ++i) CHECK_NEAR(b.plan[i], a.plan[i], 1e-14);
  for (int64_t i = 12 * 8; i < 13 * 8; ++i) CHECK(b.plan[i] == 0);
  CHECK(b.log_u[12] == -kInfinity);
  for (int64_t i = 0; i < 6 * 8; ++i) CHECK_NEAR(b.history[i], a.history[i], 1e-13);
  const auto grad = scattered<double>(12 * 8, 1);
  std::vector<double> more_grad = grad;
  more_grad.resize(13 * 8, 1.0);
  const auto da = gradient(problems(few, 12, 8, 6), grad, a);
  const auto db = gradient(in, more_grad, b), again = gradient(in, more_grad, b, false);
  for (int64_t i = 0; i < 13 * 8; ++i) CHECK_NEAR(db[i], i < 12 * 8 ? da[i] : 0, 1e-14);
  CHECK(db == again);
}

TEST(logits_far_apart_stay_exact) {
  // A column a thousand below the others: float cannot hold its share in one step.
  for (int64_t n_rows : {6, 40}) {
    auto logits = scattered<float>(n_rows * 3, 1);
    for (int64_t t = 0; t < n_rows; ++t) logits[t * 3 + 1] -= 1000;
    const auto out = balance<float>(problems(logits, n_rows, 3, 20));
    CHECK(out.error[0] < 1e-4);
    double column = 0;
    for (int64_t t = 0; t < n_rows; ++t) column += out.plan[t * 3 + 1];
    CHECK_NEAR(column, n_rows / 3.0, 1e-4);
  }
}

TEST(nan_spreads_and_ends) {
  for (int64_t n_rows : {6, 40}) {
    auto logits = scattered<float>(n_rows * 4, 1);
    logits[5] = std::numeric_limits<float>::quiet_NaN();
    SinkhornProblems in = problems(logits, n_rows, 4, 20);
    in.tolerance = 0;
    const auto out = balance<float>(in);
    for (const float x : out.plan) CHECK(std::isnan(x));
    CHECK(out.state[0] == 20);
  }
}

TEST(a_tolerance_ends_each_problem) {
  for (int64_t n_rows : {5, 50}) {
    auto logits = scattered<float>(2 * n_rows * 4, 4);
    std::fill(logits.begin(), logits.begin() + n_rows * 4, 0.0f);
    SinkhornProblems in = problems(logits, n_rows, 4, 100);
    in.tolerance = 1e-3;
    const auto out = balance<float>(in);
    CHECK(out.state[0] == 0);
    CHECK(out.state[2] > 0 && out.state[2] < 100);
    CHECK(out.error[1] <= 1e-3);
    // What did not run is zero in the history.
    for (int64_t i = 0; i < 100 * 4; ++i) CHECK(out.history[i] == 0);
    for (int64_t i = 100 * 4; i < 200 * 4; ++i) {
      CHECK((out.history[i] == 0) == (i - 100 * 4 >= out.state[2] * 4));
    }
  }
}

TEST(what_is_not_measured_is_not_written) {
  for (int64_t n_rows : {5, 50}) {
    auto logits = scattered<float>(2 * n_rows * 4, 4);
    for (int64_t t = 0; t < n_rows; ++t) logits[t * 4] += 200;  // one problem with logarithms
    const SinkhornProblems in = problems(logits, n_rows, 4, 6);
    const auto measured = balance<float>(in), plain = balance<float>(in, false);
    CHECK(plain.plan == measured.plan && plain.history == measured.history);
    for (const float x : plain.log_u) CHECK(x == 0);
  }
}

TEST(gradient_is_that_of_differences) {
  for (int64_t n_rows : {4, 20}) {
    for (double scale : {2.0, 2000.0}) {  // in range, and with logarithms
      const int64_t n = 3, size = n_rows * n;
      auto logits = scattered<double>(size, 2);
      for (int64_t t = 0; t < n_rows; ++t) logits[t * n] += scale - 2;
      const auto grad = scattered<double>(size, 1);
      const SinkhornProblems in = problems(logits, n_rows, n, 3);
      const auto value = [&] {
        const auto out = balance<double>(in);
        double sum = 0;
        for (int64_t i = 0; i < size; ++i) sum += out.plan[i] * grad[i];
        return sum;
      };
      const auto found = gradient(in, grad, balance<double>(in));
      for (int64_t i = 0; i < size; ++i) {
        const double before = logits[i], step = 1e-4;
        logits[i] = before + step;
        const double above = value();
        logits[i] = before - step;
        const double below = value();
        logits[i] = before;
        CHECK_NEAR(found[i], (above - below) / (2 * step), 1e-7);
      }
    }
  }
}
