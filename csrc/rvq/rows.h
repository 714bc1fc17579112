#pragma once

#include "rvq/decode.h"
#include "rvq/encode.h"

namespace sparsemoe {

// Quantized and errors of the vectors from `begin` to `end`, the codes being known; but with
// `early` vectors with negative ones are left out, and the kernel may begin before the last one has
// ended.
int encode_finish(const RvqEncodeParams& p, int64_t begin, int64_t end, bool early, void* stream);

// rvq_decode_cuda for any shape: a warp a vector.
int decode_rows_cuda(const RvqDecodeParams& p, void* stream);

}  // namespace sparsemoe
