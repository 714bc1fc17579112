// What the kernels that move rows by a plan share.
#pragma once

#include "common/cuda.cuh"
#include "moe/dispatch.h"

namespace sparsemoe {

constexpr int kRowThreads = 256;
constexpr int kRowWarps = kRowThreads / 32;

// Of a plan that was changed by hand, indices out of range stand for none.

// The places of a token's rows in token_rows.
struct Entries {
  int64_t first;
  int count;
};
template <class Load = PlainLoad>
__device__ Entries entries_of(const RowMap& map, int64_t token, Load load = {}) {
  if (map.token_offsets) {
    const int64_t first = max(load(map.token_offsets + token), 0);
    const int64_t last = min(int64_t(load(map.token_offsets + token + 1)), map.n_rows);
    return {first, int(max(last - first, int64_t(0)))};
  }
  return {token * map.top_k, int(map.top_k)};
}

// Row of entry i, or -1.
template <class Load = PlainLoad>
__device__ int row_of(const RowMap& map, int64_t i, Load load = {}) {
  const int row = load(map.token_rows + i);
  return uint32_t(row) < uint64_t(map.n_rows) ? row : -1;
}

// The pair of entry i, whose row is `row` or -1. Below zero where there is none: its weight is
// zero.
template <class Load = PlainLoad>
__device__ int64_t pair_of(const RowMap& map, int64_t i, int row, Load load = {}) {
  if (!map.token_offsets) return i;
  const int64_t pair = row < 0 ? -1 : load(map.row_pair + row);
  return pair < map.n_rows ? pair : -1;
}

// Whether every row surely carries a token. Unused rows of a plan by tokens come last; an expert
// choice may leave them anywhere.
__device__ inline bool all_rows_used(const RowMap& map) {
  return !map.token_offsets && map.n_rows > 0 &&
         uint32_t(map.row_token[map.n_rows - 1]) < uint64_t(map.n_tokens);
}

// Of the rows that fall to worker `worker` of `n_workers` warps, clears those without token.
template <class P>
__device__ void clear_unused(const RowMap& map, int64_t worker, int64_t n_workers, P* rows,
                             int64_t packs_per_row) {
  const int64_t share = (map.n_rows + n_workers - 1) / n_workers;
  const int64_t end = min((worker + 1) * share, map.n_rows);
  for (int64_t first = worker * share; first < end; first += 32) {
    const int64_t row = first + lane_id();
    const bool unused = row < end && uint32_t(map.row_token[row]) >= uint64_t(map.n_tokens);
    unsigned todo = __ballot_sync(kFullWarp, unused);
    while (todo) {
      const int64_t r = first + __ffs(todo) - 1;
      todo &= todo - 1;
      for (int64_t c = lane_id(); c < packs_per_row; c += 32) rows[r * packs_per_row + c] = P{};
    }
  }
}

// Calls f with a null pointer of the widest pack, 16 bytes or a power of two less, that divides
// every one of the given byte counts and addresses.
template <class F>
int with_pack(int64_t everything, F f) {
  if (everything % 16 == 0) return f(static_cast<uint4*>(nullptr));
  if (everything % 8 == 0) return f(static_cast<uint2*>(nullptr));
  if (everything % 4 == 0) return f(static_cast<uint32_t*>(nullptr));
  return f(static_cast<uint16_t*>(nullptr));
}

}  // namespace sparsemoe
