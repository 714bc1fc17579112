// How a warp works on small problems: some lanes to a problem, whole rows to a lane.
#pragma once

#include "sinkhorn/rows.cuh"

namespace sparsemoe {

// A lane holds rows lane, lane + kLanes, ...
template <int kColumns_, int kRows_, int kLanes_>
struct SmallTile {
  static constexpr int kColumns = kColumns_, kRows = kRows_;  // of a lane
  static constexpr int kLanes = kLanes_;                      // of a problem
  static constexpr int kProblems = 32 / kLanes;               // of a warp
  // The sums of columns end with the lanes, so many with each. Where there are more lanes than
  // columns, kTwins lanes have the same.
  static constexpr int kOwn = kColumns > kLanes ? kColumns / kLanes : 1;
  static constexpr int kTwins = kLanes > kColumns ? kLanes / kColumns : 1;
  // Blocks of four warps that a multiprocessor is to have registers for, of balancing and of its
  // gradient.
  static constexpr int kSize = kColumns * kRows;
  static constexpr int kBlocks = kSize <= 16 ? 7 : kSize <= 32 ? 4 : 2;
  static constexpr int kGradientBlocks = kSize <= 16 ? 5 : kColumns < 32 ? 4 : kRows == 1 ? 3 : 2;
};

template <int kColumns, int kRows, int kLanes, int... kMore, class F>
int with_small_rows(int64_t n_rows, F f) {
  if constexpr (sizeof...(kMore) > 0) {
    if (n_rows > kRows * kLanes) return with_small_rows<kColumns, kRows, kMore...>(n_rows, f);
  }
  return f(SmallTile<kColumns, kRows, kLanes>());
}
template <class F>
int with_small_tile(int64_t n_rows, int64_t n_columns, F f) {
  if (n_columns <= 4) return with_small_rows<4, 4, 1, 2, 4, 16>(n_rows, f);
  if (n_columns <= 8) return with_small_rows<8, 4, 1, 2, 4, 16>(n_rows, f);
  if (n_columns <= 16) return with_small_rows<16, 2, 4, 8, 32>(n_rows, f);
  if (n_rows <= 32) return with_small_rows<32, 1, 8, 16, 32>(n_rows, f);
  return with_small_rows<32, 2, 32>(n_rows, f);
}
template <class F>
int with_small_wide_tile(int64_t n_rows, int64_t n_columns, F f) {
  if (n_columns <= 32) return with_small_tile(n_rows, n_columns, f);
  if (n_rows <= 32) return with_small_rows<64, 1, 8, 32>(n_rows, f);
  return with_small_rows<64, 2, 32>(n_rows, f);
}

template <int kLanes>
__device__ float lanes_sum(float v) {
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) v += __shfl_xor_sync(kFullWarp, v, step);
  return v;
}

// The sums over the kLanes lanes of a problem. They end with the lanes, in the order of the
// columns.
template <int kN, int kLanes, int kSize>
__device__ void sum_columns(float (&v)[kSize]) {
  if constexpr (kLanes > 1) {
    constexpr int kStep = kLanes / 2, kNext = kN > 1 ? kN / 2 : 1;
    const bool upper = kN > 1 && (lane_id() & kStep);
#pragma unroll
    for (int i = 0; i < kNext; ++i) {
      const float other = __shfl_xor_sync(kFullWarp, upper || kN == 1 ? v[i] : v[kNext + i], kStep);
      v[i] = (upper ? v[kNext + i] : v[i]) + other;
    }
    sum_columns<kNext, kStep>(v);
  }
}
template <class Tile>
__device__ void sum_columns(float (&v)[Tile::kColumns]) {
  sum_columns<Tile::kColumns, Tile::kLanes>(v);
}
template <class Tile>
__device__ int own_column() {
  return lane_id() % Tile::kLanes / Tile::kTwins * Tile::kOwn;
}
template <int kColumns>
__device__ void read_columns(const float* shared, float (&all)[kColumns]) {
#pragma unroll
  for (int c = 0; c < kColumns; c += 4) {
    const float4 quad = *reinterpret_cast<const float4*>(shared + c);
    all[c] = quad.x, all[c + 1] = quad.y, all[c + 2] = quad.z, all[c + 3] = quad.w;
  }
}
// Every lane's own values become known to all lanes of the problem, and stay in `shared`:
// [kColumns] of the problem.
template <class Tile>
__device__ void spread_and_note(const float (&own)[Tile::kOwn], float* shared,
                                float (&all)[Tile::kColumns]) {
  __syncwarp();
#pragma unroll
  for (int i = 0; i < Tile::kOwn; ++i) shared[own_column<Tile>() + i] = own[i];
  __syncwarp();
  read_columns(shared, all);
}
template <class Tile>
__device__ void spread_columns(const float (&own)[Tile::kOwn], float* shared,
                               float (&all)[Tile::kColumns]) {
  if constexpr (Tile::kLanes == 1) {
#pragma unroll
    for (int c = 0; c < Tile::kColumns; ++c) all[c] = own[c];
  } else {
    spread_and_note<Tile>(own, shared, all);
  }
}

// The problems of a warp, which lie one after another in memory; rows are in shared memory between
// memory and lanes, so that memory is accessed in order.
template <class Tile>
struct SmallRows {
  static constexpr int kColumns = Tile::kColumns, kRows = Tile::kRows, kLanes = Tile::kLanes;
  static constexpr int kShared = 32 * kRows * kColumns;  // floats of a warp
  const SinkhornProblems& in;
  float* shared;
  int64_t first;    // problem of the warp
  int count;        // of them
  bool exists;      // the lane's
  int64_t problem;  // the lane's

  __device__ SmallRows(const SinkhornProblems& problems, int64_t warp, float* space)
      : in(problems), shared(space), first(warp * Tile::kProblems) {
    count = int(max(int64_t(0), min(int64_t(Tile::kProblems), in.n_problems - first)));
    problem = first + lane_id() / kLanes;
    exists = lane_id() / kLanes < count;
  }
  __device__ static int row_of(int i) { return lane_id() % kLanes + i * kLanes; }
  __device__ int64_t index(int row) const { return problem * in.n_rows + row; }
  __device__ bool takes_part(int row) const {
    return exists && row < in.n_rows && !(in.mask && !in.mask[index(row)]);
  }
  __device__ float marginal(int row) const {
    if (!takes_part(row)) return 0;
    return in.row_marginals ? static_cast<const float*>(in.row_marginals)[index(row)] : 1.0f;
  }
  // c, given the sum of r.
  __device__ float column_marginal(int c, float total) const {
    if (c >= in.n_columns || !exists) return 0;
    if (!in.col_marginals) return total / float(in.n_columns);
    return static_cast<const float*>(in.col_marginals)[problem * in.n_columns + c];
  }

  __device__ bool quads(const void* data, int bytes) const {
    return in.n_columns % 4 == 0 && reinterpret_cast<uintptr_t>(data) % (4 * bytes) == 0;
  }
  // Where a quad lies: lanes that read a column of quads find them in different banks.
  __device__ float* quad_at(int quad) const { return shared + 4 * (quad ^ (quad >> 3 & 7)); }
  // Moves what has the logits' shape: to(place in shared memory, index) for quads, or for elements.
  template <class F, class G>
  __device__ void for_each(bool in_quads, F quad, G element) const {
    const int64_t size = in.n_rows * in.n_columns, start = first * size;
    const int n = int(size) * count;
    __syncwarp();
    if (in_quads) {
#pragma unroll 4
      for (int i = lane_id(); i < n / 4; i += 32) quad(quad_at(i), start + 4 * i);
    } else {
      for (int i = lane_id(); i < n; i += 32) element(shared + i, start + i);
    }
    __syncwarp();
  }
  template <int kBytes>
  __device__ void fetch(const Elements<kBytes>& from, bool in_quads) const {
    for_each(
        in_quads, [&](float* to, int64_t i) { from.load(i, to); },
        [&](float* to, int64_t i) { *to = from[i]; });
  }
  template <int kBytes>
  __device__ void send(const Elements<kBytes>& to, bool in_quads) const {
    for_each(
        in_quads, [&](float* from, int64_t i) { to.store(i, from); },
        [&](float* from, int64_t i) { to.set(i, *from); });
  }
  template <class F>
  __device__ void for_lane(bool in_quads, F f) const {
    const int start = lane_id() / kLanes * int(in.n_rows);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int row = start + row_of(i);
      const bool there = takes_part(row_of(i));
#pragma unroll
      for (int c = 0; c < kColumns; c += 4) {
        if (there && in_quads && c < in.n_columns) {
          f(i, c, 4, quad_at((row * int(in.n_columns) + c) / 4));
        } else {
#pragma unroll
          for (int j = c; j < c + 4; ++j) {
            f(i, j, there && j < in.n_columns, shared + row * int(in.n_columns) + j);
          }
        }
      }
    }
  }
  __device__ void load_rows(const void* data, DType dtype, float fill,
                            float (&x)[kRows][kColumns]) const {
    const bool in_quads = quads(data, dtype == DType::f32 ? 4 : 2);
    if (dtype == DType::f32) {
      fetch(floats(data), in_quads);
    } else {
      fetch(elements<2>(data, dtype), in_quads);
    }
    for_lane(in_quads, [&](int i, int c, int n, const float* from) {
      if (n == 4) {
        const float4 quad = *reinterpret_cast<const float4*>(from);
        x[i][c] = quad.x, x[i][c + 1] = quad.y, x[i][c + 2] = quad.z, x[i][c + 3] = quad.w;
      } else {
        x[i][c] = n ? *from : fill;
      }
    });
  }
  // Rows that take no part are left at zero.
  __device__ void store_rows(void* data, DType dtype, const float (&x)[kRows][kColumns]) const {
    const bool in_quads = quads(data, dtype == DType::f32 ? 4 : 2);
    __syncwarp();
    if (in.mask) {
      for (int i = lane_id(); i < kShared; i += 32) shared[i] = 0;
      __syncwarp();
    }
    for_lane(in_quads, [&](int i, int c, int n, float* to) {
      if (n == 4) {
        *reinterpret_cast<float4*>(to) =
            make_float4(x[i][c], x[i][c + 1], x[i][c + 2], x[i][c + 3]);
      } else if (n) {
        *to = x[i][c];
      }
    });
    if (dtype == DType::f32) {
      send(floats(data), in_quads);
    } else {
      send(elements<2>(data, dtype), in_quads);
    }
  }
  // exp((logits - the row's largest) / temperature)
  __device__ void compute(float (&x)[kRows][kColumns], float (&shift)[kRows]) const {
    const float scale = float(kLog2E) / float(in.temperature);
    load_rows(in.logits, in.dtype, -kInfinity, x);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      float most = x[i][0];
#pragma unroll
      for (int c = 1; c < kColumns; ++c) most = fmaxf(most, x[i][c]);
      shift[i] = most == -kInfinity ? 0.0f : most;
#pragma unroll
      for (int c = 0; c < kColumns; ++c) x[i][c] = exp2_approx((x[i][c] - shift[i]) * scale);
    }
  }
};

// One problem by a whole warp, in logarithms to base 2 and float64: for problems whose scalings
// leave float32's range. What it keeps of iterations 0 .. n lies in shared memory.
struct ExactSmall {
  const SinkhornProblems& in;
  int64_t problem;
  double* g;     // [n + 1, columns] of the columns' scalings
  double* f;     // [n + 1, rows] of the rows'
  float* alpha;  // [n + 1, rows], for the gradient: df / r
  float* y;      // [n + 1, columns]: dg / c
  float total = 0;

  __host__ __device__ static int64_t bytes(const SinkhornProblems& in, bool gradient) {
    const int64_t kept = gradient ? 12 * (in.n_iters + 1) : 8;
    return kept * (in.n_rows + in.n_columns);
  }
  // Without gradient one iteration is kept.
  __device__ ExactSmall(const SinkhornProblems& problems, int64_t which, void* shared,
                        bool gradient)
      : in(problems), problem(which) {
    const int64_t kept = gradient ? in.n_iters + 1 : 1;
    g = static_cast<double*>(shared), f = g + kept * in.n_columns;
    alpha = reinterpret_cast<float*>(f + kept * in.n_rows), y = alpha + kept * in.n_rows;
    for (int t = lane_id(); t < in.n_rows; t += 32) total += row_marginal(t);
    total = warp_sum(total);
  }

  __device__ float row_marginal(int t) const {
    const int64_t at = problem * in.n_rows + t;
    if (in.mask && !in.mask[at]) return 0;
    return in.row_marginals ? static_cast<const float*>(in.row_marginals)[at] : 1.0f;
  }
  __device__ float column_marginal(int c) const {
    if (!in.col_marginals) return total / float(in.n_columns);
    return static_cast<const float*>(in.col_marginals)[problem * in.n_columns + c];
  }
  __device__ double log_k(int t, int c) const {
    const int64_t at = (problem * in.n_rows + t) * in.n_columns + c;
    const float logit =
        in.dtype == DType::f32 ? floats(in.logits)[at] : elements<2>(in.logits, in.dtype)[at];
    return double(logit) * (kLog2E / in.temperature);
  }
  // An element of the plan of u_i and v_j.
  __device__ float element(int t, int c, int i, int j) const {
    const double log_u = f[int64_t(i) * in.n_rows + t];
    if (log_u == -double(kInfinity)) return 0;
    return exp2_approx(float(log_k(t, c) + log_u + g[int64_t(j) * in.n_columns + c]));
  }

  // log2(sum(2^of(k)))
  template <class F>
  __device__ static double log_sum(int64_t n, F of) {
    double most = -double(kInfinity);
    for (int64_t k = 0; k < n; ++k) most = max(most, of(k));
    if (most == -double(kInfinity)) most = 0;
    float sum = 0;
    for (int64_t k = 0; k < n; ++k) sum += exp2_approx(float(of(k) - most));
    return sum == 0 ? -double(kInfinity) : most + double(log2f(sum));
  }
  // u_i of v_i, and v_i of u_{i-1}; the places of both, where one iteration is kept, are 0.
  __device__ void scale_rows(int i) {
    for (int t = lane_id(); t < in.n_rows; t += 32) {
      const float r = row_marginal(t);
      const double sum = r == 0 ? -double(kInfinity) : log_sum(in.n_columns, [&](int64_t c) {
        return log_k(t, int(c)) + g[i * in.n_columns + c];
      });
      f[i * in.n_rows + t] = sum == -double(kInfinity) ? sum : double(log2f(r)) - sum;
    }
    __syncwarp();
  }
  __device__ void scale_columns(int i, int before) {
    for (int c = lane_id(); c < in.n_columns; c += 32) {
      const double sum = log_sum(in.n_rows, [&](int64_t t) {
        const double log_u = f[before * in.n_rows + t];
        return log_u == -double(kInfinity) ? log_u : log_k(int(t), c) + log_u;
      });
      const float wanted = column_marginal(c);
      g[i * in.n_columns + c] = sum == -double(kInfinity) ? 0.0
                                : wanted > 0              ? double(log2f(wanted)) - sum
                                                          : -double(kInfinity);
    }
    __syncwarp();
  }
  __device__ void begin() {
    for (int c = lane_id(); c < in.n_columns; c += 32) g[c] = 0;
    __syncwarp();
    scale_rows(0);
  }
  __device__ float error(int i) const {
    float wrong = 0;
    for (int c = lane_id(); c < in.n_columns; c += 32) {
      float mass = 0;
      for (int t = 0; t < in.n_rows; ++t) mass += element(t, c, i, i);
      wrong += fabsf(mass - column_marginal(c));
    }
    wrong = warp_sum(wrong);
    return total > 0 ? wrong / total : wrong;
  }
};

}  // namespace sparsemoe
