#pragma once

#include "rvq/encode.h"

namespace sparsemoe {

// Quantized and errors, the codes being known; but with `early` negative ones are left out, and the
// kernel may begin before the last one has ended.
int encode_finish(const RvqEncodeParams& p, bool early, void* stream);

}  // namespace sparsemoe
