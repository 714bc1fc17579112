#pragma once

#include "rvq/decode.h"
#include "rvq/encode.h"

namespace sparsemoe {

// In place of a code: not yet looked for, and left to another kernel.
constexpr int32_t kUnknown = -2, kLeft = -1;

constexpr int64_t kMostEarlyStages = 32;  // that Codes::known() looks at

// Quantized and errors of the vectors from `begin` to `end`. With `early`, for up to
// kMostEarlyStages, the kernel may begin before the last one has ended, waits for codes that are
// kUnknown, and leaves out vectors that have any that is kLeft.
int encode_finish(const RvqEncodeParams& p, int64_t begin, int64_t end, bool early, void* stream);

// rvq_decode_cuda for any shape: a warp a vector.
int decode_rows_cuda(const RvqDecodeParams& p, void* stream);

}  // namespace sparsemoe
