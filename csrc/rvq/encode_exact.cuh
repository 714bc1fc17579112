// Encoding by every distance, in float32: for any width and number of codes.
#pragma once

#include "rvq/block_groups.cuh"
#include "rvq/encode_workspace.h"
#include "rvq/residuals.cuh"
#include "rvq/scale.cuh"
#include "rvq/vector.cuh"

namespace sparsemoe {

// --- one vector, by a group of blocks ---

template <int kWarps>
struct ExactOneShared {
  float least[kWarps];
  int found[kWarps], code;
};

// Its codes from stage `from` on, those before being known. Each warp computes distances of kAtOnce
// codes at a time. Each block has a copy of the residual. Threads of the block of rank 0 may read
// the codes when all of them have come to the end.
template <int kThreads, int kPieces, int kAtOnce, bool kPacked>
__device__ void encode_one_exactly(const RvqEncodeParams& p, int64_t vector, int from,
                                   float* residual, BlockGroup& group,
                                   ExactOneShared<kThreads / 32>& s) {
  constexpr int kWarps = kThreads / 32;
  const int width = int(p.width), n_codes = int(p.n_codes), lane = lane_id();
  const bool cosine = p.metric == Metric::cosine;
  const int warp_of_group = group.rank() * kWarps + warp_id();
  const float* const codebooks = static_cast<const float*>(p.codebooks);
  int32_t* const codes = p.codes + vector * p.n_stages;
  for (int d = threadIdx.x; d < width; d += kThreads) {
    float v = element_of(p.x, p.dtype, vector * p.x_stride + d);
    for (int q = 0; q < from; ++q) v -= codebooks[(q * p.n_codes + codes[q]) * width + d];
    residual[d] = v;
  }
  for (int stage = from; stage < int(p.n_stages); ++stage) {
    const float* const codebook = codebooks + stage * p.n_codes * width;
    float best = kInfinity;
    int code = 0;
    __syncthreads();
    for (int first = warp_of_group * kAtOnce; first < n_codes;
         first += group.size() * kWarps * kAtOnce) {
      float sum[kAtOnce] = {}, norm2[kAtOnce] = {};
      for (int column = 0; column < width; column += kPieces * kWalkColumns) {
        Columns<kPieces> e[kAtOnce], r;
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          const int64_t row = min(first + i, n_codes - 1);
          e[i].template load<kPacked>(codebook + row * width, column, width);
        }
        r.load_changing(residual, column, width);
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          if (cosine) {
            sum[i] -= r.product(e[i]);
            norm2[i] += e[i].sum_of_squares();
          } else {
            e[i].subtract(r);
            sum[i] += e[i].sum_of_squares();
          }
        }
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        float distance = warp_sum(sum[i]);
        if (cosine) distance *= inverse_norm(sqrtf(warp_sum(norm2[i])));
        if (first + i < n_codes && nearer(distance, first + i, best, code)) {
          best = distance, code = first + i;
        }
      }
    }
    if (lane == 0) s.least[warp_id()] = best, s.found[warp_id()] = code;
    __syncthreads();
    if (warp_id() == 0) {
      best = lane < kWarps ? s.least[lane] : kInfinity, code = lane < kWarps ? s.found[lane] : 0;
      least_of(best, code, kWarps);
      group.agree(best, code);
      if (!(best < kInfinity)) code = 0;
      if (lane == 0) s.code = code;
      if (lane == 0 && group.rank() == 0) codes[stage] = code;
    }
    __syncthreads();
    code = s.code;
    for (int d = threadIdx.x; d < width; d += kThreads) {
      residual[d] -= codebook[int64_t(code) * width + d];
    }
  }
}

// --- many vectors, by a block ---

// A block takes kRows at a time. Each thread adds up the distances of kOwn of them to 4 of a tile
// of 64 codes, column by column; the 16 threads of the same vectors are half a warp.
template <int kThreads>
struct ExactManyShared {
  static constexpr int kRows = int(kExactRows), kCodes = 64, kDepth = 32;
  static constexpr int kOwn = kRows * 16 / kThreads;
  float r[kDepth][kRows + 4], e[kDepth][kCodes + 4];
  float factor[kCodes];
  int chosen[kRows], from_stage[kRows];
  int64_t vector[kRows];
};

// The vectors s.vector[0 .. n_rows), from s.from_stage on; those after n_rows must be copies of
// some. `residuals` is for [kRows, width]. Warp w has written the codes of rows w, w + kWarps, ...
template <int kThreads>
__device__ void encode_many_exactly(const RvqEncodeParams& p, int n_rows, float* residuals,
                                    ExactManyShared<kThreads>& s) {
  using Of = ExactManyShared<kThreads>;
  constexpr int kWarps = kThreads / 32, kRows = Of::kRows, kCodes = Of::kCodes;
  constexpr int kDepth = Of::kDepth, kOwn = Of::kOwn;
  const int width = int(p.width), n_codes = int(p.n_codes), warp = warp_id(), lane = lane_id();
  const bool cosine = p.metric == Metric::cosine;
  const int my_row = threadIdx.x / 16 * kOwn, my_code = threadIdx.x % 16 * 4;
  // What the stages that are already known leave.
  for (int row = warp; row < kRows; row += kWarps) {
    for (int d = lane; d < width; d += 32) {
      float v = element_of(p.x, p.dtype, s.vector[row] * p.x_stride + d);
      for (int q = 0; q < s.from_stage[row]; ++q) {
        const int64_t code = p.codes[s.vector[row] * p.n_stages + q];
        v -= static_cast<const float*>(p.codebooks)[(q * p.n_codes + code) * width + d];
      }
      residuals[row * width + d] = v;
    }
  }
  for (int stage = 0; stage < int(p.n_stages); ++stage) {
    const float* codebook = static_cast<const float*>(p.codebooks) + stage * p.n_codes * width;
    __syncthreads();
    if (!__syncthreads_or(threadIdx.x < kRows && s.from_stage[threadIdx.x] <= stage)) continue;
    float least[kOwn];
    int found[kOwn];
#pragma unroll
    for (int i = 0; i < kOwn; ++i) least[i] = kInfinity, found[i] = 0;
    for (int tile = 0; tile < n_codes; tile += kCodes) {
      float sum[kOwn][4] = {};
      if (cosine) {
        for (int c = warp; c < kCodes; c += kWarps) {
          float norm2 = 0;
          for (int d = lane; d < width && tile + c < n_codes; d += 32) {
            const float v = codebook[int64_t(tile + c) * width + d];
            norm2 += v * v;
          }
          norm2 = warp_sum(norm2);
          if (lane == 0) s.factor[c] = inverse_norm(sqrtf(norm2));
        }
      }
      for (int depth = 0; depth < width; depth += kDepth) {
        __syncthreads();
        static_assert(kRows == kCodes);
        for (int i = threadIdx.x; i < kRows * kDepth; i += kThreads) {
          const int row = i / kDepth, d = i % kDepth;
          const bool inside = depth + d < width;
          s.r[d][row] = inside ? residuals[row * width + depth + d] : 0.0f;
          s.e[d][row] = inside && tile + row < n_codes
                            ? __ldg(codebook + int64_t(tile + row) * width + depth + d)
                            : 0.0f;
        }
        __syncthreads();
#pragma unroll 8
        for (int d = 0; d < kDepth; ++d) {
          const float4 b = *reinterpret_cast<const float4*>(&s.e[d][my_code]);
          const float code[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
          for (int i = 0; i < kOwn; i += 4) {
            const float4 a = *reinterpret_cast<const float4*>(&s.r[d][my_row + i]);
            const float left[4] = {a.x, a.y, a.z, a.w};
#pragma unroll
            for (int k = 0; k < 4; ++k) {
#pragma unroll
              for (int j = 0; j < 4; ++j) {
                const float v = cosine ? -left[k] : left[k] - code[j];
                sum[i + k][j] += v * (cosine ? code[j] : v);
              }
            }
          }
        }
      }
      if (cosine) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float factor = s.factor[my_code + j];
#pragma unroll
          for (int i = 0; i < kOwn; ++i) sum[i][j] *= factor;
        }
        __syncthreads();  // `factor` has been read
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int code = tile + my_code + j;
#pragma unroll
        for (int i = 0; i < kOwn; ++i) {
          if (code < n_codes && sum[i][j] < least[i]) least[i] = sum[i][j], found[i] = code;
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      least_of(least[i], found[i], 16);
      if (threadIdx.x % 16 == 0) s.chosen[my_row + i] = found[i];
    }
    __syncthreads();
    for (int row = warp; row < n_rows; row += kWarps) {
      if (s.from_stage[row] > stage) continue;
      const int code = s.chosen[row];
      if (lane == 0) p.codes[s.vector[row] * p.n_stages + stage] = code;
      for (int d = lane; d < width; d += 32) {
        residuals[row * width + d] -= codebook[int64_t(code) * width + d];
      }
    }
  }
}

}  // namespace sparsemoe
