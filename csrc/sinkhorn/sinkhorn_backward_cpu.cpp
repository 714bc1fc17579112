#include <memory>

#include "common/huge_pages.h"
#include "sinkhorn/sinkhorn.h"

#define SPARSEMOE_THIS_FILE "sinkhorn/sinkhorn_backward_cpu.cpp"
#include "common/for_each_isa.h"

#ifndef SPARSEMOE_DISPATCH
#include "common/lanes_cpu.h"
#include "sinkhorn/sinkhorn_blocks_cpu.h"
#include "sinkhorn/sinkhorn_small_cpu.h"
#include "sinkhorn/sinkhorn_solve_cpu.h"
#include "sinkhorn/sinkhorn_way_back_cpu.h"

namespace sparsemoe {
namespace SPARSEMOE_ISA {

template <class T>
void walk_back(const SinkhornBackwardParams& p, int64_t i, bool parallel) {
  using Real = acc_t<T>;
  const int64_t n_rows = p.in.n_rows, n = p.in.n_columns, n_iters = p.in.n_iters;
  const SinkhornProblems one = one_of(p.in, i);
  const Problem<T> problem(one, parallel);
  const Real* grad = static_cast<const Real*>(p.grad) + i * n_rows * n;
  T* out = static_cast<T*>(p.grad_logits) + i * n_rows * n;
  if (p.history) {
    WayBack<T>(problem, grad, p.state + 2 * i, p.history + i * n_iters * n, out);
    return;
  }
  std::vector<Real> plan(n_rows * n);
  std::vector<double> history(n_iters * n);
  int32_t state[2];
  Solution<Real> again{};
  again.plan = plan.data(), again.state = state, again.history = history.data();
  Solver<T>(problem, again).run();
  WayBack<T>(problem, grad, state, history.data(), out);
}

// Problems first .. first + count - 1, side by side. As WayBack::in_range.
template <class T>
void walk_back_small(const SinkhornBackwardParams& p, int64_t first, int64_t count,
                     SmallProblems<T>* all, std::vector<acc_t<T>>* space) {
  using Real = acc_t<T>;
  const int64_t n_rows = p.in.n_rows, n = p.in.n_columns, size = n_rows * n;
  const int64_t ran = all->run(first, count, false, nullptr);
  space->resize((size + n_rows + 2 * n) * kLanes);
  Real *d = space->data(), *alpha = d + size * kLanes, *y = alpha + n_rows * kLanes;
  Real* dg = y + n * kLanes;
  const Real *k = all->k.data(), *r = all->r.data(), *c = all->c.data();

  load_lanes(static_cast<const Real*>(p.grad) + first * size, size, size, count, d);
  const Real *u = all->u(ran), *v = all->v(ran);
  std::fill(dg, dg + n * kLanes, Real(0));
  for (int64_t t = 0; t < n_rows; ++t) {
    const Real *of = u + t * kLanes, *by = r + t * kLanes;
    Real inner[kLanes] = {};
    for (int64_t e = 0; e < n; ++e) {
      SPARSEMOE_LANES(i) {
        Real& x = d[(t * n + e) * kLanes + i];
        x *= k[(t * n + e) * kLanes + i] * of[i] * v[e * kLanes + i];
        inner[i] += x;
      }
    }
    SPARSEMOE_LANES(i) inner[i] = by[i] == 0 ? Real(0) : inner[i] * of[i] / by[i];
    for (int64_t e = 0; e < n; ++e) {
      SPARSEMOE_LANES(i) {
        Real& x = d[(t * n + e) * kLanes + i];
        x -= k[(t * n + e) * kLanes + i] * inner[i] * v[e * kLanes + i];
        dg[e * kLanes + i] += x;
      }
    }
  }
  for (int64_t step = ran; step > 0; --step) {
    u = all->u(step - 1), v = all->v(step);
    const Real* before = all->v(step - 1);
    for (int64_t e = 0; e < n; ++e) {
      SPARSEMOE_LANES(i) {
        const int64_t at = e * kLanes + i;
        const bool went = all->iterations[i] >= step;
        y[at] = went ? v[at] * dg[at] / c[at] : Real(0);
        dg[at] = went ? Real(0) : dg[at];
      }
    }
    for (int64_t t = 0; t < n_rows; ++t) {
      const Real *of = u + t * kLanes, *by = r + t * kLanes;
      Real inner[kLanes] = {};
      for (int64_t e = 0; e < n; ++e) {
        SPARSEMOE_LANES(i) inner[i] += k[(t * n + e) * kLanes + i] * y[e * kLanes + i];
      }
      SPARSEMOE_LANES(i) inner[i] = by[i] == 0 ? Real(0) : -of[i] * inner[i] * (of[i] / by[i]);
      for (int64_t e = 0; e < n; ++e) {
        SPARSEMOE_LANES(i) {
          const Real x = k[(t * n + e) * kLanes + i];
          const Real change = x * inner[i] * before[e * kLanes + i];
          d[(t * n + e) * kLanes + i] -= x * of[i] * y[e * kLanes + i] + change;
          dg[e * kLanes + i] -= change;
        }
      }
    }
  }
  const double factor = std::min<double>(1 / p.in.temperature, std::numeric_limits<Real>::max());
  for (int64_t j = 0; j < size; ++j) {
    SPARSEMOE_LANES(i) d[j * kLanes + i] *= Real(factor);
  }
  store_lanes(d, size, count, static_cast<T*>(p.grad_logits) + first * size, size);
  for (int64_t i = 0; i < count; ++i) {
    if (all->lost[i]) walk_back<T>(p, first + i, false);
  }
}

template <class T>
void walk_back_all(const SinkhornBackwardParams& p) {
  const SinkhornProblems& in = p.in;
  const int64_t work = in.n_rows * in.n_columns * (in.n_iters + 4) * 12;  // in bytes
  if (fits_lanes(in)) {
    const int64_t n_groups = (in.n_problems + kLanes - 1) / kLanes;
    parallel_for(0, n_groups, grain_for(kLanes * work), [&](int64_t begin, int64_t end) {
      SmallProblems<T> all(in, true);
      std::vector<acc_t<T>> space;
      for (int64_t first = begin * kLanes; first < std::min(end * kLanes, in.n_problems);
           first += kLanes) {
        const int64_t count = std::min<int64_t>(kLanes, in.n_problems - first);
        walk_back_small(p, first, count, &all, &space);
      }
    });
  } else {
    for_each_problem(in, grain_for(work),
                     [&](int64_t i, bool parallel) { walk_back<T>(p, i, parallel); });
  }
}

void sinkhorn_backward(const SinkhornBackwardParams& p) {
  with_dtype(p.in.dtype,
             [&](auto* type) { walk_back_all<std::remove_pointer_t<decltype(type)>>(p); });
}

}  // namespace SPARSEMOE_ISA
}  // namespace sparsemoe

#else
namespace sparsemoe {

void sinkhorn_backward_cpu(const SinkhornBackwardParams& p) {
  SPARSEMOE_BEST_ISA(sinkhorn_backward, p);
}

}  // namespace sparsemoe
#endif
