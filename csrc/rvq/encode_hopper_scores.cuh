// The lowest scores of a vector that a thread keeps. See encode_hopper.cuh.
#pragma once

#include "rvq/encode_workspace.h"

namespace sparsemoe {
namespace hopper {

// Scores are kept as whole numbers, with what a thread calls a code in the lowest bits. Of integers
// one instruction takes the least of three; and a code is put in by multiplying, which goes on
// beside the comparisons, where a logic instruction would be in their way.
constexpr int kIndexBits = 11;  // tile, then code in the tile
static_assert(kMostCodes / kTileCodes * 32 == 1 << kIndexBits, "a thread has 32 codes of a tile");
constexpr uint32_t kNoScore = ~0u, kMostScore = (1u << (32 - kIndexBits)) - 1;
constexpr float kMostSlack = 1e30f;  // of scores; keeps `range` finite

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

// The two lowest scores of every kSets-th tile, for each of kSets.
constexpr int kSets = 4;
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
  __device__ uint32_t lowest() const {
    uint32_t score = scores[0];
#pragma unroll
    for (int i = 2; i < 2 * kSets; i += 2) score = min(score, scores[i]);
    return score;
  }
};

}  // namespace hopper
}  // namespace sparsemoe
