// The gradient of small problems: scales them again, and goes back; see sinkhorn_backward_cuda.cu.
#include <algorithm>

#include "common/together.cuh"
#include "sinkhorn/small.cuh"
#include "sinkhorn/small.h"

namespace sparsemoe {
namespace {

constexpr int kMostWarps = 4;

// Shared memory of a warp: its rows, and the scalings that its problems had after each iteration.
template <class Tile>
int64_t warp_bytes(const SinkhornProblems& in) {
  const int64_t scalings = Tile::kProblems * Tile::kColumns * (in.n_iters + 1);
  const int64_t bytes = 4 * (SmallRows<Tile>::kShared + scalings);
  return std::max(bytes, ExactSmall::bytes(in, true) + 15) / 16 * 16;
}

__device__ __noinline__ void differentiate_exactly(const SinkhornBackwardParams& p, int64_t problem,
                                                   void* shared) {
  ExactSmall e(p.in, problem, shared, true);
  const int64_t n_rows = p.in.n_rows, n_columns = p.in.n_columns, start = problem * n_rows;
  const float* const grad = static_cast<const float*>(p.grad) + start * n_columns;
  const auto d = [&](int64_t t, int64_t c) {
    return e.row_marginal(int(t)) > 0 ? grad[t * n_columns + c] : 0.0f;
  };
  const int n = p.state[2 * problem];
  e.begin();
  for (int i = 1; i <= n; ++i) {
    e.scale_columns(i, i - 1);
    e.scale_rows(i);
  }
  const auto set_alpha = [&](int i, int t, float df) {
    const float r = e.row_marginal(t);
    e.alpha[i * n_rows + t] = r > 0 ? df / r : 0.0f;
  };
  const auto set_y = [&](int i, int c, float dg) {
    const float wanted = e.column_marginal(c);
    e.y[i * n_columns + c] = wanted > 0 ? dg / wanted : 0.0f;
  };
  for (int t = lane_id(); t < n_rows; t += 32) {
    float df = 0;
    for (int c = 0; c < n_columns; ++c) df += e.element(t, c, n, n) * d(t, c);
    set_alpha(n, t, df);
  }
  __syncwarp();
  for (int c = lane_id(); c < n_columns; c += 32) {
    float dg = 0;
    for (int t = 0; t < n_rows; ++t) {
      dg += e.element(t, c, n, n) * (d(t, c) - e.alpha[n * n_rows + t]);
    }
    set_y(n, c, dg);
  }
  __syncwarp();
  for (int i = n; i > 0; --i) {
    for (int t = lane_id(); t < n_rows; t += 32) {
      float df = 0;
      for (int c = 0; c < n_columns; ++c) df -= e.element(t, c, i - 1, i) * e.y[i * n_columns + c];
      set_alpha(i - 1, t, df);
    }
    __syncwarp();
    for (int c = lane_id(); c < n_columns && i > 1; c += 32) {
      float dg = 0;
      for (int t = 0; t < n_rows; ++t) {
        dg -= e.element(t, c, i - 1, i - 1) * e.alpha[(i - 1) * n_rows + t];
      }
      set_y(i - 1, c, dg);
    }
    __syncwarp();
  }
  for (int64_t at = lane_id(); at < n_rows * n_columns; at += 32) {
    const int t = int(at / n_columns), c = int(at % n_columns);
    float out = e.element(t, c, n, n) * (d(t, c) - e.alpha[n * n_rows + t]);
    for (int i = n; i > 0; --i) {
      out -= e.element(t, c, i - 1, i) * e.y[i * n_columns + c] +
             e.element(t, c, i - 1, i - 1) * e.alpha[(i - 1) * n_rows + t];
    }
    out /= float(p.in.temperature);
    if (p.in.dtype == DType::f32) {
      floats(p.grad_logits).set(start * n_columns + at, out);
    } else {
      elements<2>(p.grad_logits, p.in.dtype).set(start * n_columns + at, out);
    }
  }
  __syncwarp();
}

template <class Tile>
__global__ void __launch_bounds__(kMostWarps * 32, Tile::kGradientBlocks)
    small_backward_kernel(const __grid_constant__ SinkhornBackwardParams p, int warp_bytes) {
  constexpr int kColumns = Tile::kColumns, kRows = Tile::kRows, kLanes = Tile::kLanes,
                kOwn = Tile::kOwn;
  extern __shared__ float4 space[];
  char* const mine = reinterpret_cast<char*>(space) + warp_id() * warp_bytes;
  const SinkhornProblems& in = p.in;
  float* const shared = reinterpret_cast<float*>(mine);
  const int64_t warp = int64_t(blockIdx.x) * (blockDim.x / 32) + warp_id();
  const SmallRows<Tile> rows(in, warp, shared);
  // The problem's scalings of iteration i.
  const auto scalings = [&](int i) {
    return shared + rows.kShared + (i * Tile::kProblems + lane_id() / kLanes) * kColumns;
  };
  const bool exact = rows.exists && p.state[2 * rows.problem + 1] != 0;
  const int n = rows.exists && !exact ? p.state[2 * rows.problem] : 0;
  const int most = __reduce_max_sync(kFullWarp, n);

  float x[kRows][kColumns], shift[kRows], r[kRows], u[kRows], total = 0;
  rows.compute(x, shift);
  float v[kColumns], own[kOwn], wanted[kOwn];
#pragma unroll
  for (int i = 0; i < kRows; ++i) r[i] = rows.marginal(rows.row_of(i)), total += r[i];
  total = lanes_sum<kLanes>(total);
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    own[i] = 1, wanted[i] = rows.column_marginal(own_column<Tile>() + i, total);
  }
  // 1 / (x v) of each row
  const auto inverses = [&](float (&inverse)[kRows]) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      float sum = 0;
#pragma unroll
      for (int c = 0; c < kColumns; ++c) sum = fmaf(x[i][c], v[c], sum);
      inverse[i] = sum == 0 ? 0.0f : reciprocal_approx(sum);
    }
  };
  spread_and_note<Tile>(own, scalings(0), v);
  for (int iteration = 1; iteration <= most; ++iteration) {
    inverses(u);
    float sums[kColumns] = {};
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      u[i] *= r[i];
#pragma unroll
      for (int c = 0; c < kColumns; ++c) sums[c] = fmaf(x[i][c], u[i], sums[c]);
    }
    sum_columns<Tile>(sums);
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      if (iteration <= n && sums[i] != 0) own[i] = wanted[i] / sums[i];
    }
    spread_and_note<Tile>(own, scalings(iteration), v);
  }

  float out[kRows][kColumns], y[kColumns], inverse[kRows];
  rows.load_rows(p.grad, DType::f32, 0.0f, out);
  inverses(inverse);
  float sums[kColumns] = {};
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    float inner = 0;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) inner = fmaf(x[i][c] * v[c], out[i][c], inner);
    u[i] = r[i] * inverse[i];
    const float alpha = u[i] * inner * inverse[i];
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      out[i][c] = u[i] * out[i][c] - alpha;
      sums[c] = fmaf(x[i][c], out[i][c], sums[c]);
      out[i][c] *= v[c];
    }
  }
  sum_columns<Tile>(sums);
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    own[i] = n > 0 && wanted[i] > 0 ? own[i] * own[i] * sums[i] / wanted[i] : 0.0f;
  }
  // Problems that ran fewer iterations wait for their last.
  float* const turned = scalings(most);  // no longer needed once v is read
  spread_columns<Tile>(own, turned, y);
  for (int iteration = most; iteration > 0; --iteration) {
    const bool active = iteration <= n;
    read_columns<kColumns>(scalings(iteration - 1), v);
    inverses(inverse);
    float back[kColumns] = {};
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      float inner = 0;
#pragma unroll
      for (int c = 0; c < kColumns; ++c) inner = fmaf(x[i][c], y[c], inner);
      const float before = r[i] * inverse[i], alpha = -before * inner * inverse[i];
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        if (active) out[i][c] -= fmaf(before, y[c], alpha * v[c]);
        back[c] = fmaf(x[i][c], alpha, back[c]);
      }
    }
    if (iteration == 1) break;
    sum_columns<Tile>(back);
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const float scaling = scalings(iteration - 1)[own_column<Tile>() + i];
      const float next = wanted[i] > 0 ? -scaling * scaling * back[i] / wanted[i] : 0.0f;
      own[i] = active ? next : own[i];
    }
    spread_columns<Tile>(own, turned, y);
  }
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      out[i][c] = x[i][c] == 0 ? 0.0f : out[i][c] * x[i][c] / float(in.temperature);
    }
  }
  rows.store_rows(p.grad_logits, in.dtype, out);
  const uint32_t all_exact = __ballot_sync(kFullWarp, exact);
  for (int i = 0; i < Tile::kProblems && all_exact; ++i) {
    if (!(all_exact >> (i * kLanes) & 1)) continue;
    __syncwarp();
    differentiate_exactly(p, rows.first + i, mine);
  }
}

}  // namespace

bool small_gradient_fits(const SinkhornProblems& in) {
  return is_small(in) && in.n_columns <= kMostSmallGradientColumns &&
         with_small_tile(in.n_rows, in.n_columns, [&](auto tile) {
           return int(warp_bytes<decltype(tile)>(in) <= most_shared_bytes());
         });
}

int small_backward_cuda(const SinkhornBackwardParams& p, void* stream) {
  const SinkhornProblems& in = p.in;
  return with_small_tile(in.n_rows, in.n_columns, [&](auto tile) {
    using Tile = decltype(tile);
    const int64_t bytes = warp_bytes<Tile>(in);
    int warps = kMostWarps;
    while (warps > 1 && warps * bytes > most_shared_bytes() / 2) warps /= 2;
    const cudaError_t error =
        cudaFuncSetAttribute(small_backward_kernel<Tile>,
                             cudaFuncAttributeMaxDynamicSharedMemorySize, int(warps * bytes));
    if (error != cudaSuccess) return int(error);
    const unsigned blocks = unsigned(ceil_div(in.n_problems, Tile::kProblems * warps));
    small_backward_kernel<Tile>
        <<<blocks, warps * 32, size_t(warps * bytes), cudaStream_t(stream)>>>(p, int(bytes));
    return int(cudaGetLastError());
  });
}

}  // namespace sparsemoe
