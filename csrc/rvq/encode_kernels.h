// The kernels of rvq_encode_cuda, beside those of encode_hopper.h.
#pragma once

#include "rvq/encode_workspace.h"

namespace sparsemoe {

// In place of a code: not yet looked for, and left to another kernel.
constexpr int32_t kUnknown = -2, kLeft = -1;

// Vectors of which the last kernel has left codes, which are kLeft from some stage on.
struct LateVectors {
  const int32_t* list;  // {count, -}, then {vector, stage} of each
  GroupNotes* groups;
  float* residuals;  // [n_blocks, kExactRows, width], and kFewBlocks rows at least
  int64_t n_blocks;
};

// Quantized and errors of all vectors. With `late`, the kernel may begin before the last one has
// ended, waits for codes that are kUnknown, and then looks for the codes of late vectors by every
// distance, in float32.
int encode_finish(const RvqEncodeParams& p, const LateVectors* late, void* stream);

// Codes of all vectors by every distance, in float32. `residuals` is as that of LateVectors.
int encode_exactly(const RvqEncodeParams& p, GroupNotes* groups, float* residuals, int64_t n_blocks,
                   void* stream);

}  // namespace sparsemoe
