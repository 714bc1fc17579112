#include "sinkhorn/small.cuh"
#include "sinkhorn/small.h"

namespace sparsemoe {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / 32;
// Between two looks at the scalings, at most 4 iterations apart, those of 64 rows and columns
// change by less than 2^24; see kLeastScaling of larger problems.
constexpr float kLeastScaling = 0x1p-16f, kMostScaling = 0x1p16f;

// Of a warp.
template <class Tile>
struct alignas(16) Shared {
  float rows[SmallRows<Tile>::kShared];
  float columns[Tile::kProblems][Tile::kColumns];
};

// wanted / x of several numbers, two by one reciprocal: those are slow.
template <int kN>
__device__ void divide(float wanted, float (&x)[kN]) {
#pragma unroll
  for (int i = 0; i + 1 < kN; i += 2) {
    const float both = wanted * reciprocal_approx(x[i] * x[i + 1]), first = x[i];
    x[i] = both * x[i + 1], x[i + 1] = both * first;
  }
  if (kN % 2) x[kN - 1] = wanted * reciprocal_approx(x[kN - 1]);
}

__device__ __noinline__ void balance_exactly(const SinkhornParams& p, int64_t problem,
                                             void* shared) {
  ExactSmall exact(p.in, problem, shared, false);
  const bool measures = p.measures || p.in.tolerance >= 0;
  exact.begin();
  int iteration = 0;
  float error = -1;
  for (;;) {
    if (measures) {
      error = exact.error(0);
      if (p.in.tolerance >= 0 && error <= p.in.tolerance) break;
    }
    if (iteration == p.in.n_iters) break;
    ++iteration;
    exact.scale_columns(0, 0);
    exact.scale_rows(0);
  }
  const int64_t n_rows = p.in.n_rows, n_columns = p.in.n_columns;
  for (int64_t i = lane_id(); i < n_rows * n_columns; i += 32) {
    static_cast<float*>(p.plan)[problem * n_rows * n_columns + i] =
        exact.element(int(i / n_columns), int(i % n_columns), 0, 0);
  }
  for (int64_t t = lane_id(); t < n_rows && p.log_u; t += 32) {
    static_cast<float*>(p.log_u)[problem * n_rows + t] = float(exact.f[t] * kLn2);
  }
  for (int64_t c = lane_id(); c < n_columns && p.log_v; c += 32) {
    static_cast<float*>(p.log_v)[problem * n_columns + c] = float(exact.g[c] * kLn2);
  }
  if (lane_id() == 0) {
    p.state[2 * problem] = iteration, p.state[2 * problem + 1] = 1;
    if (p.error) static_cast<float*>(p.error)[problem] = error;
  }
  __syncwarp();
}

// kPlain: all marginals are the defaults, nothing is masked or measured.
template <class Tile, bool kPlain>
__global__ void __launch_bounds__(kThreads, Tile::kBlocks)
    small_kernel(const __grid_constant__ SinkhornParams p) {
  constexpr int kColumns = Tile::kColumns, kRows = Tile::kRows, kLanes = Tile::kLanes,
                kOwn = Tile::kOwn;
  extern __shared__ float4 space[];
  auto& s = reinterpret_cast<Shared<Tile>*>(space)[warp_id()];
  const SinkhornProblems& in = p.in;
  const SmallRows<Tile> rows(in, int64_t(blockIdx.x) * kWarps + warp_id(), s.rows);
  float* const shared = s.columns[lane_id() / kLanes];
  float x[kRows][kColumns], shift[kRows], r[kRows], u[kRows];
  rows.compute(x, shift);
  float v[kColumns], own[kOwn], wanted[kOwn], total = 0;
#pragma unroll
  for (int i = 0; i < kRows; ++i) r[i] = rows.marginal(rows.row_of(i)), total += r[i];
  total = lanes_sum<kLanes>(total);
#pragma unroll
  for (int c = 0; c < kColumns; ++c) v[c] = 1;
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    own[i] = 1, wanted[i] = rows.column_marginal(own_column<Tile>() + i, total);
  }
  const float share = float(in.n_rows) / float(in.n_columns);
  const bool measures = !kPlain && (p.measures || in.tolerance >= 0);
  int iteration = 0, ran = 0;
  float error = -1;
  bool bad = false, done = false;
  for (;;) {
    float sums[kColumns];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      float sum = 0;
#pragma unroll
      for (int c = 0; c < kColumns; ++c) sum = fmaf(x[i][c], v[c], sum);
      u[i] = kPlain && rows.row_of(i) >= in.n_rows ? 1.0f : sum;
    }
    if (kPlain) {
      divide(1, u);
#pragma unroll
      for (int i = 0; i < kRows; ++i) u[i] = rows.row_of(i) < in.n_rows ? u[i] : 0.0f;
    } else {
#pragma unroll
      for (int i = 0; i < kRows; ++i) u[i] = u[i] == 0 ? 0.0f : r[i] * reciprocal_approx(u[i]);
    }
    if (iteration == in.n_iters && !measures) break;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      sums[c] = x[0][c] * u[0];
#pragma unroll
      for (int i = 1; i < kRows; ++i) sums[c] = fmaf(x[i][c], u[i], sums[c]);
    }
    sum_columns<Tile>(sums);
    if (measures) {
      float wrong = 0;
#pragma unroll
      for (int i = 0; i < kOwn; ++i) wrong += fabsf(own[i] * sums[i] - wanted[i]);
      wrong = lanes_sum<kLanes>(wrong) / float(Tile::kTwins);
      if (!done) error = total > 0 ? wrong / total : wrong;
      done |= in.tolerance >= 0 && error <= in.tolerance;
      if (iteration == in.n_iters || __all_sync(kFullWarp, done || !rows.exists)) break;
    }
    ++iteration;
    if (!done) ++ran;
    if (kPlain) {
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        own[i] = own_column<Tile>() + i < in.n_columns ? sums[i] : 1.0f;
      }
      divide(share, own);
    } else {
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        if (!done && sums[i] != 0) own[i] = wanted[i] / sums[i];
      }
    }
    if (!kPlain || iteration == 1 || iteration % 4 == 0 || iteration == in.n_iters) {
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        const bool counts = own_column<Tile>() + i < in.n_columns && (kPlain || wanted[i] > 0);
        bad |= counts && !(own[i] >= kLeastScaling && own[i] <= kMostScaling);
      }
    }
    spread_columns<Tile>(own, shared, v);
  }
  const uint32_t lanes = 0xffffffffu >> (32 - kLanes);
  const uint32_t all_bad = __ballot_sync(kFullWarp, bad && rows.exists);
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) x[i][c] *= u[i] * v[c];
  }
  rows.store_rows(p.plan, DType::f32, x);
  if (rows.exists && lane_id() % kLanes == 0) {
    reinterpret_cast<int2*>(p.state)[rows.problem] = {ran, 0};
  }
  if (!kPlain && p.log_u && rows.exists) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (rows.row_of(i) < in.n_rows) {
        static_cast<float*>(p.log_u)[rows.index(rows.row_of(i))] =
            __logf(u[i]) - shift[i] / float(in.temperature);
      }
    }
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int c = own_column<Tile>() + i;
      if (c < in.n_columns && lane_id() % Tile::kTwins == 0) {
        static_cast<float*>(p.log_v)[rows.problem * in.n_columns + c] = __logf(own[i]);
      }
    }
    if (lane_id() % kLanes == 0) static_cast<float*>(p.error)[rows.problem] = error;
  }
  for (int i = 0; i < Tile::kProblems && all_bad; ++i) {
    if (!(all_bad >> (i * kLanes) & lanes)) continue;
    __syncwarp();
    balance_exactly(p, rows.first + i, s.rows);
  }
}

template <auto kKernel, class Tile>
int launch(const SinkhornParams& p, void* stream) {
  constexpr int kBytes = kWarps * int(sizeof(Shared<Tile>));
  if (kBytes > 48 * 1024) {
    const cudaError_t error =
        cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
    if (error != cudaSuccess) return int(error);
  }
  const unsigned blocks = unsigned(ceil_div(p.in.n_problems, Tile::kProblems * kWarps));
  kKernel<<<blocks, kThreads, kBytes, cudaStream_t(stream)>>>(p);
  return int(cudaGetLastError());
}

}  // namespace

int small_cuda(const SinkhornParams& p, void* stream) {
  const SinkhornProblems& in = p.in;
  const bool plain =
      !in.row_marginals && !in.col_marginals && !in.mask && !p.measures && in.tolerance < 0;
  return with_small_wide_tile(in.n_rows, in.n_columns, [&](auto tile) {
    using Tile = decltype(tile);
    static_assert(sizeof(Shared<Tile>) >= 8 * 2 * kSmallSize, "ExactSmall needs so much");
    return plain ? launch<small_kernel<Tile, true>, Tile>(p, stream)
                 : launch<small_kernel<Tile, false>, Tile>(p, stream);
  });
}

}  // namespace sparsemoe
