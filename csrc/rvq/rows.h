#pragma once

#include "rvq/decode.h"

namespace sparsemoe {

// rvq_decode_cuda for any shape: a warp a vector.
int decode_rows_cuda(const RvqDecodeParams& p, void* stream);

}  // namespace sparsemoe
