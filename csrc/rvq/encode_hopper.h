// Encoding on Hopper's tensor cores. See encode_hopper.cuh.
#pragma once

#include "rvq/encode_workspace.h"

namespace sparsemoe {
namespace hopper {

// Of a stage: what its scores can be wrong by, and its scale.
struct StageConstants {
  float code;      // the largest norm of a code as the tensor cores see it
  float rounding;  // the largest norm of what rounding took from a code
  float norm2;     // the largest squared norm of a code
  float other;     // entry n_parts of a stage: the norm of the center; code is then the scale
};

struct EncodeTilesParams {
  RvqEncodeParams p;
  int64_t n_tiles, n_parts, n_padded;  // tiles of codes, parts of kPartCodes, codes with padding
  void* tiles;                // [n_stages, n_tiles, depths] x [128 codes, 64 columns] of half
  float* norms2;              // [n_stages, n_padded] squared norms, scaled; by tile, in fours
  float* centers;             // [n_stages, depths * 64]
  float* norms;               // [n_stages, n_codes], for Metric::cosine
  StageConstants* constants;  // [n_stages, n_parts + 1]
  int32_t* late;              // {count, -}, then {vector, stage} of each that is left to others
  GroupNotes* groups;         // of others, whose counters are to be 0
  float* residuals;           // for encode_general, [blocks, 64, depths * 64]

  // Enough for the vectors, so many to a cluster of two blocks, and to prepare the codes.
  int64_t n_clusters(int64_t vectors_each) const {
    return std::max((p.n + vectors_each - 1) / vectors_each, (n_parts * p.n_stages + 1) / 2);
  }
};

// kDepths * 64 columns at most. Codes are kUnknown when the next kernel may begin, which is when
// all blocks run.
template <int kDepths>
int encode_tiles(const EncodeTilesParams& p, void* stream);
// The same for up to kMostGeneralDepths * 64 columns that need not be a multiple of 4, any number
// of codes, and up to kMostGeneralStages.
int encode_general(const EncodeTilesParams& p, int64_t depths, void* stream);

}  // namespace hopper

}  // namespace sparsemoe
