// Scores of codes, and the lowest of a vector that a thread keeps. See encode_hopper.cuh.
#pragma once

#include "common/cuda.cuh"
#include "rvq/encode_hopper.h"
#include "rvq/encode_workspace.h"

namespace sparsemoe {
namespace hopper {

// Scores are kept as whole numbers, with what a thread calls a code in the lowest bits. Of integers
// one instruction takes the least of three; and a code is put in by multiplying, which goes on
// beside the comparisons, where a logic instruction would be in their way.
constexpr int kIndexBits = 11;  // tile, then code in the tile
static_assert(kMostCodes / kTileCodes * 32 == 1 << kIndexBits, "a thread has 32 codes of a tile");
constexpr uint32_t kNoScore = ~0u, kMostScore = (1u << (32 - kIndexBits)) - 1;
constexpr uint32_t kAllIndexBits = (1u << kIndexBits) - 1;
constexpr float kMostSlack = 1e30f;  // of scores; keeps the range finite

// Of a thread: the two lowest scores, and the lowest of those that were dropped.
struct Best {
  uint32_t first = kNoScore, second = kNoScore, dropped = kNoScore;

  __device__ void add(const uint32_t (&v)[4]) {
    const uint32_t a = add(v[0], v[1]), b = add(v[2], v[3]);
    dropped = min(min(dropped, a), b);
  }
  __device__ void set_bits(uint32_t bits) { first |= bits, second |= bits; }

 private:
  // The lowest that is dropped.
  __device__ uint32_t add(uint32_t v, uint32_t w) {
    const uint32_t low = min(v, w), high = max(v, w);
    const uint32_t x = max(first, low), y = min(second, high);
    first = min(first, low);
    second = min(x, y);
    return max(x, y);
  }
};

// The two lowest scores of every kSets-th tile, for each of kSets. Set i has the tile i before the
// last.
constexpr int kSets = 4;
// Of a vector, so many at most: all of their codes are looked at where scores were dropped, those
// with scores too high to be candidates, too.
constexpr int kMostSets = 2;
struct Kept {
  uint32_t scores[2 * kSets], dropped = kNoScore;

  __device__ Kept() {
    for (uint32_t& score : scores) score = kNoScore;
  }
  __device__ void add(const Best& tile) {
    const uint32_t first = scores[2 * kSets - 2], second = scores[2 * kSets - 1];
    const uint32_t a = max(first, tile.first), b = min(second, tile.second);
    const uint32_t c = min(max(first, tile.second), max(second, tile.first));
    dropped = min(min(dropped, tile.dropped), c);
#pragma unroll
    for (int i = 2 * kSets - 1; i > 1; --i) scores[i] = scores[i - 2];
    scores[0] = min(first, tile.first);
    scores[1] = min(a, b);
  }
  // A bit for each set that may have dropped a score that is not above `limit`: both that it has
  // kept are then not above it, either.
  __device__ unsigned sets_that_dropped(uint32_t limit) const {
    unsigned sets = 0;
#pragma unroll
    for (int i = 0; i < kSets; ++i) {
      if (dropped <= limit && scores[2 * i + 1] <= limit) sets |= 1u << i;
    }
    return sets;
  }
  __device__ uint32_t lowest() const {
    uint32_t score = scores[0];
#pragma unroll
    for (int i = 2; i < 2 * kSets; i += 2) score = min(score, scores[i]);
    return score;
  }
};

// Scores are below a power of two, their range. Added to 13 times that, they are in the lowest 21
// bits of the sum, in units of 2^-20 of it, from -2^20 on. The norm of the residual, and the error
// of what the tensor cores see of it, are scaled, and by `weight` are norms of codes.
constexpr float kBase = 13;
__device__ inline float range_of_scores(float norm, float error, float weight,
                                        const StageConstants& c) {
  // The same bits wherever it is asked.
  const float most = fmaf(norm + error, c.code, weight * c.norm2);
  return __uint_as_float((__float_as_uint(1.01f * most) & 0x7f800000) + 0x00800000);
}
// How far above the lowest score that of the nearest code can be, of a sum of so many products.
__device__ inline float slack_of_scores(float norm, float error, float weight,
                                        const StageConstants& c, int n_products, float range) {
  const float products = norm * c.code, norms = weight * c.norm2;
  const float rounding = error * c.code + norm * c.rounding;
  const float sums = (n_products + 4) * 0x1p-22f * products + 0x1p-18f * norms;
  return 2 * (rounding + sums + range * 0x1p-20f);
}
// What rounding may add to or take from squared distances that are computed in float32, as scores.
// With less slack than that, a code that is no candidate might seem nearer than those that are.
__device__ inline float noise_of_distances(float norm, float weight, float range) {
  return 0x1p-17f * (norm * norm / weight + range);
}
// The highest score of a code that may be the nearest.
__device__ inline uint32_t highest_candidate(uint32_t lowest, float slack, float unit) {
  const uint32_t most = (lowest >> kIndexBits) + uint32_t(fminf(slack / unit, 0x1p21f)) + 1;
  return min(most, kMostScore - 1) << kIndexBits | kAllIndexBits;
}

// Of the products of a tile and two rows. norms2 begins with the lane's.
__device__ inline void score_tile(const float (&sum)[64], const float4* norms2,
                                  const float (&weight)[2], const float (&base)[2],
                                  uint32_t to_index, Best (&of_tile)[2]) {
#pragma unroll
  for (int j = 0; j < 16; j += 2) {
    const float4 four = norms2[2 * j];
    const float norm2[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      uint32_t score[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float v = fmaf(norm2[i], weight[h], sum[4 * (j + i / 2) + 2 * h + i % 2]);
        score[i] = __float_as_uint(v + base[h]) * to_index + uint32_t(2 * j + i);
      }
      of_tile[h].add(score);
    }
  }
}
// Codes of the last tile that are not there get the highest score.
__device__ inline void leave_out_padding(int n_codes, int n_tiles, const float (&range)[2],
                                         float (&sum)[64]) {
  const int n_left = n_codes - (n_tiles - 1) * int(kTileCodes) - 2 * (lane_id() % 4);
  if (n_left >= kTileCodes - 6) return;
#pragma unroll
  for (int i = 0; i < 64; ++i) {
    if (i / 4 * 8 + i % 2 >= n_left) sum[i] = (1 - 0x1p-20f) * range[i / 2 % 2];
  }
}
// Of a score of a thread: its place in the tile.
__device__ inline int code_in_tile(uint32_t score, int lane) {
  return int((score & 31) / 2 * 8 + 2 * (lane % 4) + (score & 1));
}

// Calls look_at(code) for a share of the codes of a set, those of a lane: each `shares`-th from
// `share` on, of tiles that are kSets * step apart, back from `last_tile` to `first_tile`.
template <class LookAt>
__device__ inline void for_codes_of_set(int last_tile, int first_tile, int step, int lane,
                                        int share, int shares, int n_codes, const LookAt& look_at) {
#pragma unroll 1
  for (int tile = last_tile; tile >= first_tile; tile -= kSets * step) {
#pragma unroll 2
    for (int i = share; i < 32; i += shares) {
      look_at(min(tile * int(kTileCodes) + code_in_tile(i, lane), n_codes - 1));
    }
  }
}

}  // namespace hopper
}  // namespace sparsemoe
