// How the kernels for large problems divide a GPU, and what they keep in device memory.
#pragma once

#include <algorithm>

#include "sinkhorn/sinkhorn.h"

namespace sparsemoe {

struct SinkhornLayout {
  int64_t team_blocks;  // that share a problem; a multiple of 8 where clusters are used
  int64_t n_teams;      // at most
  int64_t padded;       // columns, as a tile pads them, at most
  bool clusters;        // of 8 blocks

  // Of the current device.
  explicit SinkhornLayout(const SinkhornProblems& in);

  int64_t slot_bytes() const { return 2 * n_teams * (team_blocks + 1) * (padded + 4) * 8; }
  // For each team of a backward pass: u and alpha of every row and iteration; for each block: v and
  // y of every column and iteration.
  int64_t rows_bytes(const SinkhornProblems& in) const {
    return (n_teams * (in.n_iters + 1) * in.n_rows + 1) / 2 * 16;
  }
  int64_t columns_bytes(const SinkhornProblems& in) const {
    return n_teams * team_blocks * in.n_iters * padded * 8;
  }
};

}  // namespace sparsemoe
