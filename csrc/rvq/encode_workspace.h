// Where the CUDA kernels of encode keep what they need beside their outputs.
#pragma once

#include "rvq/encode.h"

namespace sparsemoe {

// The kernel on Hopper's tensor cores reads codebooks as tiles of 128 codes x 64 columns.
constexpr int64_t kTileCodes = 128, kTileDepth = 64;
// They are prepared part by part.
constexpr int64_t kPartCodes = 32;
// What encode_tiles takes, and encode_general.
constexpr int64_t kMostDepths = 8, kMostCodes = 8192, kMostStages = 32;
constexpr int64_t kMostGeneralDepths = 16, kMostGeneralStages = 128;
// Where every distance is computed, a block takes 64 vectors at a time, and keeps their residuals.
// Few vectors are taken one by one, each by a group of blocks, which have a copy each.
constexpr int64_t kMostFew = 2048;
constexpr int64_t kExactRows = 64, kExactBlocks = 528, kFewBlocks = 256;
constexpr int64_t kMostGroupBlocks = 16, kMostGroups = kExactBlocks / 2;
inline int64_t few_blocks(int64_t vectors) {
  return std::min(vectors * kMostGroupBlocks, kFewBlocks);
}

// What the blocks of groups tell each other; see BlockGroup.
struct GroupNotes {
  int32_t begun;                                    // blocks of all groups
  int32_t size[kMostGroups], arrived[kMostGroups];  // of a group; arrivals of all turns
  int32_t code[2][kExactBlocks];                    // what blocks have found, in turns
  float distance[2][kExactBlocks];
};
// The first so many are to be 0.
constexpr int64_t kGroupCounters = 1 + 2 * kMostGroups;
static_assert(kFewBlocks <= kExactBlocks);

// Offsets in bytes.
struct RvqEncodeSpace {
  int64_t n_tiles, n_parts, n_depths, n_padded, n_blocks;
  int64_t late, groups, residuals;                   // of vectors that need every distance
  int64_t tiles, norms2, centers, norms, constants;  // of Hopper's
  int64_t bytes;

  explicit RvqEncodeSpace(const RvqEncodeParams& p) {
    n_tiles = (p.n_codes + kTileCodes - 1) / kTileCodes;
    n_depths = (p.width + kTileDepth - 1) / kTileDepth;
    if (n_depths > 4) n_depths = (n_depths + 1) / 2 * 2;
    if (n_depths == 3) n_depths = 4;
    n_padded = n_tiles * kTileCodes;
    n_parts = n_padded / kPartCodes;
    n_blocks = std::min((p.n + kExactRows - 1) / kExactRows, kExactBlocks);
    const int64_t n_pairs = (n_blocks + 1) / 2;  // of encode_general's, with as many vectors
    bytes = 0;
    late = take((p.n + 1) * 8);
    groups = take(int64_t(sizeof(GroupNotes)));
    residuals = take(std::max(std::max(n_blocks * kExactRows, kFewBlocks) * p.width * 4,
                              n_pairs * 2 * kExactRows * n_depths * kTileDepth * 4));
    const bool tiled = n_depths <= kMostGeneralDepths && p.n_stages <= kMostGeneralStages;
    const int64_t n_stages = tiled ? p.n_stages : 0;
    tiles = take(n_stages * n_padded * n_depths * kTileDepth * 2);
    norms2 = take(n_stages * n_padded * 4);
    centers = take(n_stages * n_depths * kTileDepth * 4);
    norms = take(n_stages * p.n_codes * 4);
    constants = take(n_stages * (n_parts + 1) * 16);
  }

 private:
  int64_t take(int64_t count) {
    const int64_t at = bytes;
    bytes += (count + 1023) / 1024 * 1024;
    return at;
  }
};

inline int64_t rvq_encode_workspace_bytes(const RvqEncodeParams& p) {
  return RvqEncodeSpace(p).bytes;
}

// Beam search takes as many vectors at a time as have 64 beams together, and keeps their residuals,
// and the codes of each beam before and after a stage.
constexpr int64_t kBeamRows = 64, kBeamBlocks = 528;

inline int64_t rvq_beam_blocks(const RvqBeamParams& p) {
  const int64_t at_once = kBeamRows / p.beam;
  return std::min((p.n + at_once - 1) / at_once, kBeamBlocks);
}
inline int64_t rvq_beam_workspace_bytes(const RvqBeamParams& p) {
  return rvq_beam_blocks(p) * kBeamRows * (p.width + 2 * p.n_stages) * 4;
}

}  // namespace sparsemoe
