// How a block works through rows: some lanes of a warp share a row, and a warp takes several rows
// at once. What fits of exp((logits - the row's largest) / temperature) stays in shared memory; the
// rest is computed again from the logits each time.
#pragma once

#include "common/cuda.cuh"
#include "common/ptx.cuh"
#include "sinkhorn/sinkhorn.h"

namespace sparsemoe {

constexpr double kLog2E = 1.4426950408889634, kLn2 = 0.6931471805599453;

// A lane holds quads of adjacent columns, kLanes quads apart. kBytes: of a logit; kTogether:
// elements that a lane works on at once.
template <int kBytes_, int kTogether, int kLanes_, int kColumns_>
struct SinkhornTile {
  static constexpr int kBytes = kBytes_, kLanes = kLanes_, kColumns = kColumns_;
  static constexpr int kPadded = kLanes * kColumns;  // columns that fit
  static constexpr int kGroups = 32 / kLanes;        // rows side by side in a warp
  static constexpr int kAtOnce = kColumns >= kTogether ? 1 : kTogether / kColumns;  // and in turn
  static constexpr int kVisit = kGroups * kAtOnce;  // rows a warp takes at once
};

// Calls f with the tile for so many columns.
template <int kBytes, int kTogether, class F>
int with_sinkhorn_tile(int64_t n_columns, F f) {
  if (n_columns <= 4) return f(SinkhornTile<kBytes, kTogether, 1, 4>());
  if (n_columns <= 16) return f(SinkhornTile<kBytes, kTogether, 4, 4>());
  if (n_columns <= 32) return f(SinkhornTile<kBytes, kTogether, 8, 4>());
  if (n_columns <= 64) return f(SinkhornTile<kBytes, kTogether, 8, 8>());
  if (n_columns <= 128) return f(SinkhornTile<kBytes, kTogether, 8, 16>());
  if (n_columns <= 256) return f(SinkhornTile<kBytes, kTogether, 16, 16>());
  if (n_columns <= 512) return f(SinkhornTile<kBytes, kTogether, 32, 16>());
  return f(SinkhornTile<kBytes, kTogether, 32, 32>());
}
template <int kTogether, class F>
int with_sinkhorn_tile(const SinkhornProblems& in, F f) {
  return in.dtype == DType::f32 ? with_sinkhorn_tile<4, kTogether>(in.n_columns, f)
                                : with_sinkhorn_tile<2, kTogether>(in.n_columns, f);
}

// Elements of float, or of one of the two types of 16 bits.
template <int kBytes>
struct Elements {
  using Word = std::conditional_t<kBytes == 4, uint32_t, uint16_t>;
  Word* data;
  bool bf16;

  __device__ static float value(uint32_t bits, bool bf16) {
    if constexpr (kBytes == 4) return __uint_as_float(bits);
    const float other = __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
    return bf16 ? __uint_as_float(bits << 16) : other;
  }
  __device__ static Word bits(float value, bool bf16) {
    if constexpr (kBytes == 4) {
      return __float_as_uint(value);
    } else {
      const auto other = __half_as_ushort(__float2half_rn(value));
      return bf16 ? __bfloat16_as_ushort(__float2bfloat16_rn(value)) : other;
    }
  }
  __device__ float operator[](int64_t i) const { return value(data[i], bf16); }
  __device__ void set(int64_t i, float v) const { data[i] = bits(v, bf16); }
  // Four from i on, aligned.
  __device__ void load(int64_t i, float* out) const {
    if constexpr (kBytes == 4) {
      const uint4 quad = __ldg(reinterpret_cast<const uint4*>(data + i));
      out[0] = __uint_as_float(quad.x), out[1] = __uint_as_float(quad.y);
      out[2] = __uint_as_float(quad.z), out[3] = __uint_as_float(quad.w);
    } else {
      const uint2 quad = __ldg(reinterpret_cast<const uint2*>(data + i));
      out[0] = value(quad.x & 0xffff, bf16), out[1] = value(quad.x >> 16, bf16);
      out[2] = value(quad.y & 0xffff, bf16), out[3] = value(quad.y >> 16, bf16);
    }
  }
  __device__ void store(int64_t i, const float* in) const {
    if constexpr (kBytes == 4) {
      *reinterpret_cast<float4*>(data + i) = make_float4(in[0], in[1], in[2], in[3]);
    } else {
      const uint2 quad = {bits(in[0], bf16) | uint32_t(bits(in[1], bf16)) << 16,
                          bits(in[2], bf16) | uint32_t(bits(in[3], bf16)) << 16};
      *reinterpret_cast<uint2*>(data + i) = quad;
    }
  }
};
template <int kBytes>
__device__ Elements<kBytes> elements(const void* data, DType dtype) {
  using Word = typename Elements<kBytes>::Word;
  return {static_cast<Word*>(const_cast<void*>(data)), dtype == DType::bf16};
}
__device__ inline Elements<4> floats(const void* data) { return elements<4>(data, DType::f32); }

// Over the kLanes lanes of a row.
template <int kLanes>
__device__ float row_sum(float v) {
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) v += __shfl_xor_sync(kFullWarp, v, step);
  return v;
}
template <int kLanes, class Real>
__device__ Real row_max(Real v) {
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) v = max(v, __shfl_xor_sync(kFullWarp, v, step));
  return v;
}

// The rows of one problem that a block has.
template <class Tile>
struct SinkhornRows {
  static constexpr int kLanes = Tile::kLanes, kColumns = Tile::kColumns, kAtOnce = Tile::kAtOnce;
  static constexpr int kPadded = Tile::kPadded;
  const SinkhornProblems& in;
  float* kept;        // [n_kept, kPadded] in shared memory
  float* kept_shift;  // [n_kept]: the row's largest logit
  int64_t first;      // the block's first row, counted over all problems
  int n, n_kept;      // rows; those in shared memory: all, or whole visits
  bool quads, plain;  // rows begin on quads; all take part, with r = 1

  __device__ SinkhornRows(const SinkhornProblems& problems, float* shared, int capacity)
      : in(problems), kept(shared + capacity), kept_shift(shared) {
    const uintptr_t logits = reinterpret_cast<uintptr_t>(in.logits);
    quads = in.n_columns % 4 == 0 && logits % (4 * Tile::kBytes) == 0;
    plain = !in.mask && !in.row_marginals;
  }
  // Takes this block's share of a problem.
  __device__ void divide(int64_t problem, int block, int blocks, int capacity) {
    const int64_t share = (in.n_rows + blocks - 1) / blocks, from = min(block * share, in.n_rows);
    first = problem * in.n_rows + from;
    n = int(min(share, in.n_rows - from));
    n_kept = min(n, capacity);
  }

  __device__ static int quad_column(int quad) { return 4 * (quad * kLanes + lane_id() % kLanes); }
  __device__ static int column(int c) { return quad_column(c / 4) + c % 4; }
  // Row i of a visit that begins at row `base`.
  __device__ static int row_of(int base, int i) {
    return base + i * Tile::kGroups + lane_id() / kLanes;
  }
  __device__ bool takes_part(int row) const {
    return row < n && (plain || !in.mask || in.mask[first + row]);
  }
  // r: 0 where the row takes no part.
  __device__ float marginal(int row) const {
    if (!takes_part(row)) return 0;
    return plain || !in.row_marginals ? 1.0f
                                      : static_cast<const float*>(in.row_marginals)[first + row];
  }
  // The values of the lane's columns among those of all.
  __device__ static void of_lane(const float* columns, float (&out)[kColumns]) {
#pragma unroll
    for (int quad = 0; quad < kColumns / 4; ++quad) {
      const float4 four = *reinterpret_cast<const float4*>(columns + quad_column(quad));
      out[4 * quad] = four.x, out[4 * quad + 1] = four.y;
      out[4 * quad + 2] = four.z, out[4 * quad + 3] = four.w;
    }
  }
  __device__ static void to_columns(const float (&values)[kColumns], float* columns) {
#pragma unroll
    for (int quad = 0; quad < kColumns / 4; ++quad) {
      *reinterpret_cast<float4*>(columns + quad_column(quad)) = make_float4(
          values[4 * quad], values[4 * quad + 1], values[4 * quad + 2], values[4 * quad + 3]);
    }
  }

  // A row of logits or of what has their shape; `fill` past the last column and where the row takes
  // no part.
  template <int kBytes>
  __device__ void load_row(const Elements<kBytes>& from, int row, float fill,
                           float (&x)[kColumns]) const {
    const bool read = takes_part(row);
    const int64_t start = (first + row) * in.n_columns;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) x[c] = fill;
    if (!read) return;
    if (quads) {
#pragma unroll
      for (int quad = 0; quad < kColumns / 4; ++quad) {
        const int at = quad_column(quad);
        if (at < in.n_columns) from.load(start + at, x + 4 * quad);
      }
    } else {
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        if (column(c) < in.n_columns) x[c] = from[start + column(c)];
      }
    }
  }
  __device__ void load_logits(int row, float (&x)[kColumns]) const {
    load_row(elements<Tile::kBytes>(in.logits, in.dtype), row, -kInfinity, x);
  }
  // Not of rows past the last.
  template <int kBytes>
  __device__ void store_row(const Elements<kBytes>& to, int row, const float (&x)[kColumns]) const {
    if (row >= n) return;
    const int64_t start = (first + row) * in.n_columns;
    if (in.n_columns % 4 == 0) {
#pragma unroll
      for (int quad = 0; quad < kColumns / 4; ++quad) {
        const int at = quad_column(quad);
        if (at < in.n_columns) to.store(start + at, x + 4 * quad);
      }
    } else {
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        if (column(c) < in.n_columns) to.set(start + column(c), x[c]);
      }
    }
  }

  // The rows of a visit as exp((logits - shift) / temperature), computed.
  __device__ void compute(int base, float (&x)[kAtOnce][kColumns], float (&shift)[kAtOnce]) const {
    const float scale = float(kLog2E) / float(in.temperature);
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) load_logits(row_of(base, i), x[i]);
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      float most = x[i][0];
#pragma unroll
      for (int c = 1; c < kColumns; ++c) most = fmaxf(most, x[i][c]);
      most = row_max<kLanes>(most);
      shift[i] = most == -kInfinity ? 0.0f : most;
#pragma unroll
      for (int c = 0; c < kColumns; ++c) x[i][c] = exp2_approx((x[i][c] - shift[i]) * scale);
    }
  }
  __device__ void keep(int base, const float (&x)[kAtOnce][kColumns],
                       const float (&shift)[kAtOnce]) const {
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      to_columns(x[i], kept + row_of(base, i) * kPadded);
      if (lane_id() % kLanes == 0) kept_shift[row_of(base, i)] = shift[i];
    }
  }
  // The same rows, from shared memory where they are there.
  __device__ void get(int base, float (&x)[kAtOnce][kColumns]) const {
    if (base >= n_kept) {
      float shift[kAtOnce];
      return compute(base, x, shift);
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) of_lane(kept + row_of(base, i) * kPadded, x[i]);
  }

  // A row in logarithms to base 2, in float64: float32 has too few digits where logits and scalings
  // are large. x becomes exp(logits / temperature) v u / r, which sums to one, and `log_scaling`
  // log2(u) (-infinity where the row is empty). v is 2^g.
  __device__ void compute_exactly(int row, const double* g, double (&scaled)[kColumns],
                                  float (&x)[kColumns], double* log_scaling) const {
    load_logits(row, x);
    const double scale = kLog2E / in.temperature;
    double most = -double(kInfinity);
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      scaled[c] = double(x[c]) * scale;
      most = max(most, scaled[c] + g[column(c)]);
    }
    most = row_max<kLanes>(most);
    const double shift = most == -double(kInfinity) ? 0.0 : most;
    float sum = 0;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      x[c] = exp2_approx(float(scaled[c] + g[column(c)] - shift));
      sum += x[c];
    }
    sum = row_sum<kLanes>(sum);
    const float r = marginal(row);
    const bool empty = sum == 0 || r == 0;
    const float factor = empty ? 0.0f : 1.0f / sum;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) x[c] *= factor;
    *log_scaling = empty ? -double(kInfinity) : double(log2f(r)) - shift - double(log2f(sum));
  }
};

// The sum or the maximum of x over the rows of a warp, to `columns`. Lanes of other rows hold the
// same columns.
template <class Tile>
__device__ void store_over_warp(float (&x)[Tile::kColumns], float* columns, bool largest = false) {
#pragma unroll
  for (int step = Tile::kLanes; step < 32; step *= 2) {
#pragma unroll
    for (int c = 0; c < Tile::kColumns; ++c) {
      const float other = __shfl_xor_sync(kFullWarp, x[c], step);
      x[c] = largest ? fmaxf(x[c], other) : x[c] + other;
    }
  }
  if (lane_id() < Tile::kLanes) SinkhornRows<Tile>::to_columns(x, columns);
}

}  // namespace sparsemoe
