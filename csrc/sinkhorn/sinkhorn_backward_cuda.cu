// The gradient of large problems: the iterations again, backwards, by the same teams of blocks.
// With K, u and v as in sinkhorn.h, d the gradient to the plan, and the columns' y_i = v_i dg_i /
// c:
//
//   df_n = u_n K (v_n d),  alpha_i = u_i df_i / r,  dg_n = v_n K^T (u_n d - alpha_n)
//   df_{i-1} = -u_{i-1} K y_i,  dg_{i-1} = -v_{i-1} K^T alpha_{i-1}
//   dlogits = K (u_n v_n d - alpha_n v_n - sum_i (u_{i-1} y_i + alpha_{i-1} v_{i-1})) / temperature
//
// u_i is computed again from v_i. Where float32 has not the range, v_i is 2^g_i, and every element
// is computed from logarithms; y is then dg / c.
#include "sinkhorn/layout.h"
#include "sinkhorn/rows.cuh"
#include "sinkhorn/small.h"
#include "sinkhorn/team.cuh"

namespace sparsemoe {
namespace {

template <int kCluster, class Tile>
struct alignas(16) Shared {
  // Where float32 has not the range: of iteration i - 1 and of i; y_i.
  double g[Tile::kPadded], g_after[Tile::kPadded];
  float y[Tile::kPadded];
  float wanted[Tile::kPadded];  // the columns' marginals
  TeamShared<kCluster, Tile> team;
};

struct UAndAlpha {
  float u, alpha;
};

template <int kCluster, class Tile>
class Gradient {
  using Rows = SinkhornRows<Tile>;
  static constexpr int kColumns = Tile::kColumns, kAtOnce = Tile::kAtOnce;
  static constexpr int kPadded = Tile::kPadded;

 public:
  __device__ Gradient(const SinkhornBackwardParams& p, Shared<kCluster, Tile>& s,
                      Team<kCluster, Tile>& team, const Rows& rows, int64_t problem,
                      UAndAlpha* of_rows, float* of_columns)
      : p_(p),
        in_(p.in),
        s_(s),
        team_(team),
        rows_(rows),
        history_(p.history + problem * in_.n_iters * in_.n_columns),
        of_rows_(of_rows + rows.first - problem * in_.n_rows),
        of_columns_(of_columns),
        problem_(problem) {
    n_ = p.state[2 * problem];
  }

  __device__ void run() {
    if (p_.state[2 * problem_ + 1] != 0) return run_exactly();
    float v[kColumns], y[kColumns], before[kColumns];
    load_scalings(n_, v);
    last_rows(v);
    for (int i = n_; i > 0; --i) {
      load_scalings(i - 1, before);  // on its way while sums are exchanged
      const float* const sums = exchange();
      float sum[kColumns], wanted[kColumns];
      Rows::of_lane(sums, sum), Rows::of_lane(s_.wanted, wanted);
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        const float signed_sum = i == n_ ? sum[c] : -sum[c];
        y[c] = wanted[c] > 0 ? v[c] * v[c] * signed_sum / wanted[c] : 0.0f;
        v[c] = before[c];
      }
      note_columns(i, y, v);
      rows_before(i, y, v);
    }
    __syncthreads();
    write();
  }

 private:
  __device__ const float* exchange() {
    const float* const sums = team_.exchange();
    if (!has_marginals_) {
      const float* const given = static_cast<const float*>(in_.col_marginals);
      for (int c = threadIdx.x; c < kPadded; c += kSinkhornThreads) {
        s_.wanted[c] = c >= in_.n_columns ? 0.0f
                       : given            ? given[problem_ * in_.n_columns + c]
                                          : sums[kPadded] / float(in_.n_columns);
      }
      __syncthreads();
    }
    has_marginals_ = true;
    return sums;
  }
  __device__ const double* history(int i) const {
    return history_ + int64_t(i - 1) * in_.n_columns;
  }
  __device__ void load_scalings(int i, float (&v)[kColumns]) const {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      v[c] = 1;
      if (i > 0 && Rows::column(c) < in_.n_columns) v[c] = float(history(i)[Rows::column(c)]);
    }
  }
  // y_i and v_{i-1}, for the end.
  __device__ void note_columns(int i, const float (&y)[kColumns], const float (&v)[kColumns]) {
    if (threadIdx.x >= Tile::kLanes) return;
    float* const at = of_columns_ + int64_t(i - 1) * 2 * kPadded;
    Rows::to_columns(y, at), Rows::to_columns(v, at + kPadded);
  }
  __device__ UAndAlpha* of_rows(int i) const { return of_rows_ + i * in_.n_rows; }
  __device__ void note(int i, int row, UAndAlpha value) {
    if (lane_id() % Tile::kLanes == 0 && row < rows_.n) of_rows(i)[row] = value;
  }
  __device__ void store_sums(float (&sums)[kColumns], float total) {
    float* const to = s_.team.partial[warp_id()];
    store_over_warp<Tile>(sums, to);
    total = warp_sum(total) / Tile::kLanes;
    if (lane_id() == 0) to[kPadded] = total;
  }

  __device__ void last_rows(const float (&v)[kColumns]) {
    float sums[kColumns] = {}, total = 0;
#pragma unroll 1
    for (int base = warp_id() * Tile::kVisit; base < rows_.n;
         base += kSinkhornWarps * Tile::kVisit) {
      float x[kAtOnce][kColumns], shift[kAtOnce], d[kAtOnce][kColumns];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        rows_.load_row(floats(p_.grad), rows_.row_of(base, i), 0.0f, d[i]);
      }
      rows_.compute(base, x, shift);
      if (base < rows_.n_kept) rows_.keep(base, x, shift);
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int row = rows_.row_of(base, i);
        const float r = rows_.marginal(row);
        float sum = 0, inner = 0;
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          const float scaled = x[i][c] * v[c];
          sum += scaled, inner = fmaf(scaled, d[i][c], inner);
        }
        sum = row_sum<Tile::kLanes>(sum), inner = row_sum<Tile::kLanes>(inner);
        const float inverse = sum == 0 ? 0.0f : reciprocal_approx(sum);
        const float u = r * inverse, alpha = u * inner * inverse;
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          sums[c] = fmaf(x[i][c], fmaf(u, d[i][c], -alpha), sums[c]);
        }
        total += r;
        note(n_, row, {u, alpha});
      }
    }
    store_sums(sums, total);
  }

  __device__ void rows_before(int iteration, const float (&y)[kColumns],
                              const float (&v)[kColumns]) {
    float sums[kColumns] = {};
#pragma unroll 1
    for (int base = warp_id() * Tile::kVisit; base < rows_.n;
         base += kSinkhornWarps * Tile::kVisit) {
      float x[kAtOnce][kColumns];
      rows_.get(base, x);
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int row = rows_.row_of(base, i);
        float sum = 0, inner = 0;
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          sum = fmaf(x[i][c], v[c], sum), inner = fmaf(x[i][c], y[c], inner);
        }
        sum = row_sum<Tile::kLanes>(sum), inner = row_sum<Tile::kLanes>(inner);
        const float inverse = sum == 0 ? 0.0f : reciprocal_approx(sum);
        const float r = rows_.plain ? 1.0f : rows_.marginal(row);
        const float u = r * inverse, alpha = -u * inner * inverse;
#pragma unroll
        for (int c = 0; c < kColumns; ++c) sums[c] = fmaf(x[i][c], alpha, sums[c]);
        note(iteration - 1, row, {u, alpha});
      }
    }
    store_sums(sums, 0);
  }

  __device__ void write() {
    const float scale = 1 / float(in_.temperature);
    const auto to = elements<Tile::kBytes>(p_.grad_logits, in_.dtype);
#pragma unroll 1
    for (int base = warp_id() * Tile::kVisit; base < rows_.n;
         base += kSinkhornWarps * Tile::kVisit) {
      float out[kAtOnce][kColumns], v[kColumns];
      load_scalings(n_, v);
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int row = rows_.row_of(base, i);
        rows_.load_row(floats(p_.grad), row, 0.0f, out[i]);
        const UAndAlpha last = row < rows_.n ? of_rows(n_)[row] : UAndAlpha{0, 0};
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          out[i][c] = v[c] * fmaf(last.u, out[i][c], -last.alpha);
        }
      }
#pragma unroll 2
      for (int j = 0; j < n_; ++j) {
        float y[kColumns];
        UAndAlpha of[kAtOnce];
        Rows::of_lane(of_columns_ + int64_t(j) * 2 * kPadded, y);
        Rows::of_lane(of_columns_ + (int64_t(j) * 2 + 1) * kPadded, v);
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          const int row = rows_.row_of(base, i);
          of[i] = row < rows_.n ? of_rows(j)[row] : UAndAlpha{0, 0};
        }
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
#pragma unroll
          for (int c = 0; c < kColumns; ++c) {
            out[i][c] -= fmaf(of[i].u, y[c], of[i].alpha * v[c]);
          }
        }
      }
      float x[kAtOnce][kColumns];
      rows_.get(base, x);
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          out[i][c] = x[i][c] == 0 ? 0.0f : out[i][c] * x[i][c] * scale;
        }
        rows_.store_row(to, rows_.row_of(base, i), out[i]);
      }
    }
  }

  // --- where float32 has not the range ---

  __device__ void run_exactly() {
    load_exact_scalings(n_);
    __syncthreads();
    for (int i = n_; i >= 0; --i) {
      exact_rows(i);
      if (i == 0) break;
      const float* const sums = exchange();
      for (int c = threadIdx.x; c < kPadded; c += kSinkhornThreads) {
        const float sum = i == n_ ? sums[c] : -sums[c];
        s_.y[c] = s_.wanted[c] > 0 ? sum / s_.wanted[c] : 0.0f;
        of_columns_[int64_t(i - 1) * kPadded + c] = s_.y[c];
      }
      load_exact_scalings(i - 1);
      __syncthreads();
    }
    write_exactly();
  }
  __device__ void load_exact_scalings(int i) {
    for (int c = threadIdx.x; c < kPadded; c += kSinkhornThreads) {
      s_.g_after[c] = s_.g[c];
      s_.g[c] = i > 0 && c < in_.n_columns ? history(i)[c] : 0.0;
    }
  }
  // Of iteration i, the last or one before it.
  __device__ void exact_rows(int iteration) {
    float sums[kColumns] = {}, total = 0;
    const bool last = iteration == n_;
#pragma unroll 1
    for (int base = warp_id() * Tile::kGroups; base < rows_.n;
         base += kSinkhornWarps * Tile::kGroups) {
      const int row = rows_.row_of(base, 0);
      const float r = rows_.marginal(row);
      double scaled[kColumns], log_u;
      float x[kColumns], d[kColumns], inner = 0;
      rows_.compute_exactly(row, s_.g, scaled, x, &log_u);
      if (last) rows_.load_row(floats(p_.grad), row, 0.0f, d);
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        const int column = Rows::column(c);
        inner = last ? fmaf(x[c], d[c], inner)
                     : fmaf(exp2_approx(float(scaled[c] + log_u + s_.g_after[column])),
                            s_.y[column], inner);
      }
      inner = row_sum<Tile::kLanes>(inner);
      const float alpha = last ? inner : r > 0 ? -inner / r : 0.0f;  // df / r
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        sums[c] = fmaf(x[c] * r, last ? d[c] - alpha : alpha, sums[c]);
      }
      total += r;
      note(iteration, row, {0, alpha});
    }
    store_sums(sums, total);
  }
  __device__ void write_exactly() {
    // Some rows after others through all iterations: the columns' scalings change with them.
#pragma unroll 1
    for (int base = 0; base < rows_.n; base += kSinkhornWarps * Tile::kGroups) {
      const int row = rows_.row_of(base + warp_id() * Tile::kGroups, 0);
      const float r = rows_.marginal(row);
      float out[kColumns];
#pragma unroll 1
      for (int j = n_; j >= 0; --j) {
        double scaled[kColumns], log_u;
        float x[kColumns];
        __syncthreads();
        load_exact_scalings(j);
        __syncthreads();
        rows_.compute_exactly(row, s_.g, scaled, x, &log_u);
        const float alpha = row < rows_.n ? of_rows(j)[row].alpha : 0.0f;
        if (j == n_) rows_.load_row(floats(p_.grad), row, 0.0f, out);
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          const int column = Rows::column(c);
          if (j == n_) {
            out[c] = x[c] * r * (out[c] - alpha);
          } else {
            out[c] -= exp2_approx(float(scaled[c] + log_u + s_.g_after[column])) *
                          of_columns_[int64_t(j) * kPadded + column] +
                      x[c] * r * alpha;
          }
        }
      }
#pragma unroll
      for (int c = 0; c < kColumns; ++c) out[c] /= float(in_.temperature);
      rows_.store_row(elements<Tile::kBytes>(p_.grad_logits, in_.dtype), row, out);
    }
  }

  const SinkhornBackwardParams& p_;
  const SinkhornProblems& in_;
  Shared<kCluster, Tile>& s_;
  Team<kCluster, Tile>& team_;
  const Rows& rows_;
  const double* history_;
  UAndAlpha* of_rows_;  // [n + 1, rows of the problem], from this block's first on
  float* of_columns_;   // [n, 2, kPadded] of this block: y_{i+1} and v_i
  int64_t problem_;
  int n_;
  bool has_marginals_ = false;
};

template <int kCluster, class Tile>
__device__ void differentiate(const SinkhornBackwardParams& p, int team_clusters, int capacity,
                              char* of_rows, char* of_columns) {
  extern __shared__ float4 memory[];
  auto& s = *reinterpret_cast<Shared<kCluster, Tile>*>(memory);
  Team<kCluster, Tile> team(s.team, static_cast<uint64_t*>(p.workspace), team_clusters);
  SinkhornRows<Tile> rows(p.in, reinterpret_cast<float*>(&s + 1), capacity);
#pragma unroll 1
  for (int64_t problem = team.index(); team.index() < team.count() && problem < p.in.n_problems;
       problem += team.count()) {
    rows.divide(problem, team.block(), team.blocks(), capacity);
    auto* const mine =
        reinterpret_cast<UAndAlpha*>(of_rows) + team.index() * (p.in.n_iters + 1) * p.in.n_rows;
    auto* const columns =
        reinterpret_cast<float*>(of_columns) + blockIdx.x * p.in.n_iters * 2 * Tile::kPadded;
    Gradient<kCluster, Tile>(p, s, team, rows, problem, mine, columns).run();
    __syncthreads();
  }
  team.finish();
}

template <class Tile>
__global__ void __launch_bounds__(kSinkhornThreads, 1)
    blocks_backward_kernel(const __grid_constant__ SinkhornBackwardParams p, int team_clusters,
                           int capacity, char* of_rows, char* of_columns) {
  differentiate<1, Tile>(p, team_clusters, capacity, of_rows, of_columns);
}
template <class Tile>
SPARSEMOE_CLUSTER(8)
__global__ void __launch_bounds__(kSinkhornThreads, 1)
    clusters_backward_kernel(const __grid_constant__ SinkhornBackwardParams p, int team_clusters,
                             int capacity, char* of_rows, char* of_columns) {
#if SPARSEMOE_HOPPER
  differentiate<8, Tile>(p, team_clusters, capacity, of_rows, of_columns);
#else
  __trap();
#endif
}

}  // namespace

int sinkhorn_backward_cuda(const SinkhornBackwardParams& p, void* stream) {
  if (!p.history) return small_backward_cuda(p, stream);
  return with_sinkhorn_tile<16>(p.in, [&](auto tile) {
    using Tile = decltype(tile);
    const SinkhornLayout layout(p.in);
    const int64_t blocks = layout.n_teams * layout.team_blocks;
    char* const of_rows = static_cast<char*>(p.workspace) + layout.slot_bytes();
    char* const of_columns = of_rows + layout.rows_bytes(p.in);
    if (layout.clusters) {
      const auto shared = rows_that_fit<Tile, sizeof(Shared<8, Tile>)>();
      return launch_together<clusters_backward_kernel<Tile>, 8>(
          blocks / 8, kSinkhornThreads, shared.bytes, stream, p, int(layout.team_blocks / 8),
          shared.rows, of_rows, of_columns);
    }
    const auto shared = rows_that_fit<Tile, sizeof(Shared<1, Tile>)>();
    return launch_together<blocks_backward_kernel<Tile>, 1>(blocks, kSinkhornThreads, shared.bytes,
                                                            stream, p, int(layout.team_blocks),
                                                            shared.rows, of_rows, of_columns);
  });
}

}  // namespace sparsemoe
