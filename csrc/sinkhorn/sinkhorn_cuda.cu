// Balancing of large problems. A team of blocks shares a problem and keeps it on the chip; it
// exchanges one sum a column and iteration.
#include "sinkhorn/layout.h"
#include "sinkhorn/rows.cuh"
#include "sinkhorn/small.h"
#include "sinkhorn/team.cuh"

namespace sparsemoe {
namespace {

// Scalings may lie between these. What exp() lost to float32's range, below 2^-126, is then below
// 2^-46 in the plan.
constexpr float kLeastScaling = 0x1p-40f, kMostScaling = 0x1p40f;
// A column whose mass before the first iteration is less may have lost a part of it.
constexpr float kLeastMass = 0x1p-80f;

template <int kCluster, class Tile>
struct alignas(16) Shared {
  double g[Tile::kPadded];      // log2 of the columns' scalings, where float32 does not do
  float wanted[Tile::kPadded];  // the columns' marginals
  float v[Tile::kPadded];       // what is exchanged between threads on the way to float64
  TeamShared<kCluster, Tile> team;
};

template <int kCluster, class Tile>
class Balancing {
  using Rows = SinkhornRows<Tile>;
  static constexpr int kColumns = Tile::kColumns, kAtOnce = Tile::kAtOnce;

 public:
  __device__ Balancing(const SinkhornParams& p, Shared<kCluster, Tile>& s,
                       Team<kCluster, Tile>& team, const Rows& rows, int64_t problem)
      : p_(p), in_(p.in), s_(s), team_(team), rows_(rows), problem_(problem) {
    measures_ = p.measures || in_.tolerance >= 0;
  }

  __device__ void run() {
    float v[kColumns];
#pragma unroll
    for (int c = 0; c < kColumns; ++c) v[c] = 1;
    scale_rows<true>(v);
    const float* sums = team_.exchange();
    set_marginals(sums[Tile::kPadded]);
    if (!all_massive(sums)) {
      if (run_exactly(0, v)) return;
      sums = nullptr;  // the first iteration is done
    }
    for (;;) {
      if (sums) {
        if (measures_ && ends(error_of(sums, v))) break;
        ++iteration_;
        if (!scale_columns(sums, v)) {
          run_exactly(iteration_, v);
          return;
        }
      }
      note_scalings(v);
      if (iteration_ == in_.n_iters && !measures_) break;
      scale_rows<false>(v);
      sums = team_.exchange();
    }
    write_rows(v);
    write_columns(v);
  }

 private:
  enum class Exactly { largest, first_sums, masses, plan };

  __device__ bool ends(float error) {
    error_ = error;
    return iteration_ == in_.n_iters || (in_.tolerance >= 0 && error <= in_.tolerance);
  }

  // One pass, given v: scales every row, and sums the columns. kFirst computes the rows and keeps
  // them.
  template <bool kFirst>
  __device__ void scale_rows(const float (&v)[kColumns]) {
    float sums[kColumns] = {}, total = 0;
#pragma unroll 1
    for (int base = warp_id() * Tile::kVisit; base < rows_.n;
         base += kSinkhornWarps * Tile::kVisit) {
      float x[kAtOnce][kColumns];
      if constexpr (kFirst) {
        float shift[kAtOnce];
        rows_.compute(base, x, shift);
        if (base < rows_.n_kept) rows_.keep(base, x, shift);
      } else {
        rows_.get(base, x);
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        float sum = 0, r = 1;
#pragma unroll
        for (int c = 0; c < kColumns; ++c) sum = fmaf(x[i][c], v[c], sum);
        sum = row_sum<Tile::kLanes>(sum);
        if (kFirst || !rows_.plain) r = rows_.marginal(rows_.row_of(base, i));
        const float u = sum == 0 ? 0.0f : r * reciprocal_approx(sum);
#pragma unroll
        for (int c = 0; c < kColumns; ++c) sums[c] = fmaf(x[i][c], u, sums[c]);
        if (kFirst) total += r;
      }
    }
    float* const to = s_.team.partial[warp_id()];
    store_over_warp<Tile>(sums, to);
    if (kFirst) total = warp_sum(total) / Tile::kLanes;
    if (lane_id() == 0) to[Tile::kPadded] = total;
  }

  __device__ void write_rows(const float (&v)[kColumns]) {
    const Elements<4> plan = floats(p_.plan);
    const float inverse = 1 / float(in_.temperature);
#pragma unroll 1
    for (int base = warp_id() * Tile::kVisit; base < rows_.n;
         base += kSinkhornWarps * Tile::kVisit) {
      float x[kAtOnce][kColumns], shift[kAtOnce];
      if (base < rows_.n_kept) {
        rows_.get(base, x);
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) shift[i] = rows_.kept_shift[rows_.row_of(base, i)];
      } else {
        rows_.compute(base, x, shift);
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int row = rows_.row_of(base, i);
        float sum = 0;
#pragma unroll
        for (int c = 0; c < kColumns; ++c) x[i][c] *= v[c], sum += x[i][c];
        sum = row_sum<Tile::kLanes>(sum);
        const float u = sum == 0 ? 0.0f : rows_.marginal(row) * reciprocal_approx(sum);
#pragma unroll
        for (int c = 0; c < kColumns; ++c) x[i][c] *= u;
        rows_.store_row(plan, row, x[i]);
        if (p_.log_u && lane_id() % Tile::kLanes == 0 && row < rows_.n) {
          static_cast<float*>(p_.log_u)[rows_.first + row] = __logf(u) - shift[i] * inverse;
        }
      }
    }
  }

  __device__ void set_marginals(float total) {
    total_ = total;
    const float* const given = static_cast<const float*>(in_.col_marginals);
    for (int c = threadIdx.x; c < Tile::kPadded; c += kSinkhornThreads) {
      s_.g[c] = 0;
      s_.wanted[c] = c >= in_.n_columns ? 0.0f
                     : given            ? given[problem_ * in_.n_columns + c]
                                        : total / float(in_.n_columns);
    }
    __syncthreads();
  }
  // Whether no column may have lost a part of its mass.
  __device__ bool all_massive(const float* sums) const {
    bool lost = false;
    for (int c = lane_id(); c < Tile::kPadded; c += 32) {
      lost |= sums[c] < kLeastMass && s_.wanted[c] > 0;
    }
    return !__any_sync(kFullWarp, lost);
  }
  // Every warp computes it.
  __device__ float error_of(const float* sums, const float (&v)[kColumns]) const {
    float wrong = 0;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      wrong += fabsf(v[c] * sums[Rows::column(c)] - s_.wanted[Rows::column(c)]);
    }
    wrong = row_sum<Tile::kLanes>(wrong);
    return total_ > 0 ? wrong / total_ : wrong;
  }
  // False where v leaves the range.
  __device__ bool scale_columns(const float* sums, float (&v)[kColumns]) const {
    float sum[kColumns], wanted[kColumns];
    Rows::of_lane(sums, sum), Rows::of_lane(s_.wanted, wanted);
    bool out_of_range = false;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      if (sum[c] != 0) v[c] = wanted[c] * reciprocal_approx(sum[c]);
      out_of_range |= (v[c] < kLeastScaling || v[c] > kMostScaling) && wanted[c] > 0;
    }
    return !__any_sync(kFullWarp, out_of_range);
  }

  // --- where float32 has not the range ---

  // Goes on in float64 from iteration `iteration_`, v being its scalings, or from the beginning.
  // True when all is done, false if float32 does again after the first iteration.
  __device__ bool run_exactly(int iteration, float (&v)[kColumns]) {
    Exactly what = Exactly::largest;
    if (iteration > 0) {
      __syncthreads();
      if (warp_id() == 0) Rows::to_columns(v, s_.v);
      __syncthreads();
      for (int c = threadIdx.x; c < Tile::kPadded; c += kSinkhornThreads) {
        s_.g[c] = log2(double(s_.v[c]));
      }
      note_exactly(iteration);
      what = next();
    }
    for (;;) {
      __syncthreads();
      scale_rows_exactly(what);
      if (what == Exactly::plan) break;
      const float* const sums = team_.exchange(what == Exactly::largest);
      if (what == Exactly::largest) {
        for (int c = threadIdx.x; c < Tile::kPadded; c += kSinkhornThreads) s_.v[c] = sums[c];
        what = Exactly::first_sums;
        continue;
      }
      if (what == Exactly::masses && measures_ && ends(exact_error(sums))) {
        what = Exactly::plan;
        continue;
      }
      ++iteration_;
      bool in_range = true;
      for (int c = threadIdx.x; c < Tile::kPadded; c += kSinkhornThreads) {
        const float sum = sums[c], wanted = s_.wanted[c];
        const double from = what == Exactly::masses ? s_.g[c] : -double(s_.v[c]);
        if (sum != 0) {
          s_.g[c] =
              wanted > 0 ? from + double(log2f(wanted)) - double(log2f(sum)) : -double(kInfinity);
        }
        in_range &= wanted == 0 || fabs(s_.g[c]) <= 40;
      }
      in_range = __syncthreads_and(in_range);
      if (what == Exactly::first_sums && in_range) {
#pragma unroll
        for (int c = 0; c < kColumns; ++c) v[c] = exp2f(float(s_.g[Rows::column(c)]));
        return false;
      }
      note_exactly(iteration_);
      what = next();
    }
    write_exact_columns();
    return true;
  }
  __device__ Exactly next() const {
    return iteration_ == in_.n_iters && !measures_ ? Exactly::plan : Exactly::masses;
  }

  __device__ void scale_rows_exactly(Exactly what) {
    float sums[kColumns];
#pragma unroll
    for (int c = 0; c < kColumns; ++c) sums[c] = what == Exactly::largest ? -kInfinity : 0.0f;
#pragma unroll 1
    for (int base = warp_id() * Tile::kGroups; base < rows_.n;
         base += kSinkhornWarps * Tile::kGroups) {
      const int row = rows_.row_of(base, 0);
      const float r = rows_.marginal(row);
      double scaled[kColumns], log_u;
      float x[kColumns];
      rows_.compute_exactly(row, s_.g, scaled, x, &log_u);
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        const float most = s_.v[Rows::column(c)];
        if (what == Exactly::largest) {
          sums[c] = fmaxf(sums[c], float(scaled[c] + log_u));
        } else if (what == Exactly::first_sums) {
          if (most != -kInfinity) sums[c] += exp2_approx(float(scaled[c] + log_u - most));
        } else {
          x[c] *= r;
          sums[c] += x[c];
        }
      }
      if (what == Exactly::plan) {
        rows_.store_row(floats(p_.plan), row, x);
        if (p_.log_u && lane_id() % Tile::kLanes == 0 && row < rows_.n) {
          static_cast<float*>(p_.log_u)[rows_.first + row] = float(log_u * kLn2);
        }
      }
    }
    store_over_warp<Tile>(sums, s_.team.partial[warp_id()], what == Exactly::largest);
    if (lane_id() == 0) s_.team.partial[warp_id()][Tile::kPadded] = 0;
  }
  __device__ float exact_error(const float* sums) const {
    float wrong = 0;
    for (int c = lane_id(); c < Tile::kPadded; c += 32) wrong += fabsf(sums[c] - s_.wanted[c]);
    wrong = warp_sum(wrong);
    return total_ > 0 ? wrong / total_ : wrong;
  }

  // --- what one block writes ---

  __device__ double* history(int iteration) const {
    return p_.history + (problem_ * in_.n_iters + iteration - 1) * in_.n_columns;
  }
  __device__ void note_scalings(const float (&v)[kColumns]) const {
    if (!p_.history || team_.block() != 0 || threadIdx.x >= Tile::kLanes) return;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      if (Rows::column(c) < in_.n_columns) history(iteration_)[Rows::column(c)] = double(v[c]);
    }
  }
  // Of `iteration`, the first that is noted so: those before become logarithms.
  __device__ void note_exactly(int iteration) {
    if (!p_.history || team_.block() != 0) return;
    __syncthreads();
    for (int c = threadIdx.x; c < in_.n_columns; c += kSinkhornThreads) {
      for (int i = 1; i < iteration && !noted_; ++i) history(i)[c] = log2(history(i)[c]);
      history(iteration)[c] = s_.g[c];
    }
    noted_ = true;
  }
  __device__ void write_state(bool exact) const {
    if (threadIdx.x == 0) {
      p_.state[2 * problem_] = iteration_, p_.state[2 * problem_ + 1] = exact;
      if (p_.error) static_cast<float*>(p_.error)[problem_] = error_;
    }
    for (int64_t i = threadIdx.x + int64_t(iteration_) * in_.n_columns;
         p_.history && i < in_.n_iters * in_.n_columns; i += kSinkhornThreads) {
      history(1)[i] = 0;
    }
  }
  __device__ void write_columns(const float (&v)[kColumns]) const {
    if (team_.block() != 0) return;
    write_state(false);
    if (!p_.log_v || threadIdx.x >= Tile::kLanes) return;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      if (Rows::column(c) < in_.n_columns) log_v()[Rows::column(c)] = __logf(v[c]);
    }
  }
  __device__ void write_exact_columns() const {
    if (team_.block() != 0) return;
    write_state(true);
    for (int c = threadIdx.x; c < in_.n_columns && p_.log_v; c += kSinkhornThreads) {
      log_v()[c] = float(s_.g[c] * kLn2);
    }
  }
  __device__ float* log_v() const {
    return static_cast<float*>(p_.log_v) + problem_ * in_.n_columns;
  }

  const SinkhornParams& p_;
  const SinkhornProblems& in_;
  Shared<kCluster, Tile>& s_;
  Team<kCluster, Tile>& team_;
  const Rows& rows_;
  int64_t problem_;
  int iteration_ = 0;
  float total_ = 0, error_ = -1;
  bool measures_, noted_ = false;
};

template <int kCluster, class Tile>
__device__ void balance(const SinkhornParams& p, int team_clusters, int capacity) {
  extern __shared__ float4 memory[];
  auto& s = *reinterpret_cast<Shared<kCluster, Tile>*>(memory);
  Team<kCluster, Tile> team(s.team, static_cast<uint64_t*>(p.workspace), team_clusters);
  SinkhornRows<Tile> rows(p.in, reinterpret_cast<float*>(&s + 1), capacity);
#pragma unroll 1
  for (int64_t problem = team.index(); team.index() < team.count() && problem < p.in.n_problems;
       problem += team.count()) {
    rows.divide(problem, team.block(), team.blocks(), capacity);
    Balancing<kCluster, Tile>(p, s, team, rows, problem).run();
    __syncthreads();
  }
  team.finish();
}

template <class Tile>
__global__ void __launch_bounds__(kSinkhornThreads, 1)
    blocks_kernel(const __grid_constant__ SinkhornParams p, int team_clusters, int capacity) {
  balance<1, Tile>(p, team_clusters, capacity);
}
template <class Tile>
SPARSEMOE_CLUSTER(8)
__global__ void __launch_bounds__(kSinkhornThreads, 1)
    clusters_kernel(const __grid_constant__ SinkhornParams p, int team_clusters, int capacity) {
#if SPARSEMOE_HOPPER
  balance<8, Tile>(p, team_clusters, capacity);
#else
  __trap();
#endif
}

}  // namespace

int sinkhorn_cuda(const SinkhornParams& p, void* stream) {
  if (is_small(p.in) && !p.history) return small_cuda(p, stream);
  return with_sinkhorn_tile<32>(p.in, [&](auto tile) {
    using Tile = decltype(tile);
    const SinkhornLayout layout(p.in);
    const int64_t blocks = layout.n_teams * layout.team_blocks;
    if (layout.clusters) {
      const auto shared = rows_that_fit<Tile, sizeof(Shared<8, Tile>)>();
      return launch_together<clusters_kernel<Tile>, 8>(blocks / 8, kSinkhornThreads, shared.bytes,
                                                       stream, p, int(layout.team_blocks / 8),
                                                       shared.rows);
    }
    const auto shared = rows_that_fit<Tile, sizeof(Shared<1, Tile>)>();
    return launch_together<blocks_kernel<Tile>, 1>(blocks, kSinkhornThreads, shared.bytes, stream,
                                                   p, int(layout.team_blocks), shared.rows);
  });
}

}  // namespace sparsemoe
