#include "sinkhorn/sinkhorn.h"

#define SPARSEMOE_THIS_FILE "sinkhorn/sinkhorn_cpu.cpp"
#include "common/for_each_isa.h"

#ifndef SPARSEMOE_DISPATCH
#include "common/lanes_cpu.h"
#include "sinkhorn/sinkhorn_blocks_cpu.h"
#include "sinkhorn/sinkhorn_small_cpu.h"
#include "sinkhorn/sinkhorn_solve_cpu.h"

namespace sparsemoe {
namespace SPARSEMOE_ISA {

template <class T>
void solve(const SinkhornParams& p, int64_t i, bool parallel) {
  using Real = acc_t<T>;
  const int64_t n_rows = p.in.n_rows, n = p.in.n_columns;
  Solution<Real> out{};
  out.plan = static_cast<Real*>(p.plan) + i * n_rows * n;
  if (p.measures) {
    out.log_u = static_cast<Real*>(p.log_u) + i * n_rows;
    out.log_v = static_cast<Real*>(p.log_v) + i * n;
    out.error = static_cast<Real*>(p.error) + i;
  }
  out.state = p.state + 2 * i;
  out.history = p.history ? p.history + i * p.in.n_iters * n : nullptr;
  const SinkhornProblems one = one_of(p.in, i);
  const Problem<T> problem(one, parallel);
  Solver<T>(problem, out).run();
}

// Problems first .. first + count - 1, side by side.
template <class T>
void solve_small(const SinkhornParams& p, int64_t first, int64_t count, SmallProblems<T>* all) {
  using Real = acc_t<T>;
  const int64_t n_rows = p.in.n_rows, n = p.in.n_columns;
  if (p.history) std::fill_n(p.history + first * p.in.n_iters * n, count * p.in.n_iters * n, 0.0);
  const int64_t done = all->run(first, count, p.measures, p.history);
  const Real *u = all->u(done), *v = all->v(done);
  for (int64_t t = 0; t < n_rows; ++t) {
    for (int64_t e = 0; e < n; ++e) {
      Real* k = &all->k[(t * n + e) * kLanes];
      SPARSEMOE_LANES(i) k[i] *= u[t * kLanes + i] * v[e * kLanes + i];
    }
  }
  store_lanes(all->k.data(), n_rows * n, count, static_cast<Real*>(p.plan) + first * n_rows * n,
              n_rows * n);
  if (p.measures) {
    Real *log_u = all->shift.data(), *log_v = all->column.data();
    for (int64_t t = 0; t < n_rows; ++t) {
      SPARSEMOE_LANES(i) {
        log_u[t * kLanes + i] = log_(u[t * kLanes + i]) - log_u[t * kLanes + i];
      }
    }
    for (int64_t e = 0; e < n; ++e) {
      SPARSEMOE_LANES(i) log_v[e * kLanes + i] = log_(v[e * kLanes + i]);
    }
    store_lanes(log_u, n_rows, count, static_cast<Real*>(p.log_u) + first * n_rows, n_rows);
    store_lanes(log_v, n, count, static_cast<Real*>(p.log_v) + first * n, n);
    std::copy_n(all->error, count, static_cast<Real*>(p.error) + first);
  }
  for (int64_t i = 0; i < count; ++i) {
    p.state[2 * (first + i)] = all->iterations[i];
    p.state[2 * (first + i) + 1] = kInRange;
    if (all->lost[i]) solve<T>(p, first + i, false);
  }
}

template <class T>
void solve_all(const SinkhornParams& p) {
  const SinkhornProblems& in = p.in;
  const int64_t work = in.n_rows * in.n_columns * (in.n_iters + 4) * 4;  // in bytes
  if (fits_lanes(in)) {
    const int64_t n_groups = (in.n_problems + kLanes - 1) / kLanes;
    parallel_for(0, n_groups, grain_for(kLanes * work), [&](int64_t begin, int64_t end) {
      SmallProblems<T> all(in, false);
      for (int64_t first = begin * kLanes; first < std::min(end * kLanes, in.n_problems);
           first += kLanes) {
        solve_small(p, first, std::min<int64_t>(kLanes, in.n_problems - first), &all);
      }
    });
  } else {
    for_each_problem(in, grain_for(work),
                     [&](int64_t i, bool parallel) { solve<T>(p, i, parallel); });
  }
}

void sinkhorn(const SinkhornParams& p) {
  with_dtype(p.in.dtype, [&](auto* type) { solve_all<std::remove_pointer_t<decltype(type)>>(p); });
}

}  // namespace SPARSEMOE_ISA
}  // namespace sparsemoe

#else
namespace sparsemoe {

void sinkhorn_cpu(const SinkhornParams& p) { SPARSEMOE_BEST_ISA(sinkhorn, p); }

}  // namespace sparsemoe
#endif
