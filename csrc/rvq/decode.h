// The sum over stages of the chosen codes.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace sparsemoe {

struct RvqDecodeParams {
  int64_t n, width, n_stages, n_codes;
  const int32_t* codes;   // [n, n_stages]; outside of 0 .. n_codes - 1: adds nothing
  const void* codebooks;  // [n_stages, n_codes, width] of dtype
  DType dtype;
  void* y;  // [n, width] of dtype
};

void rvq_decode_cpu(const RvqDecodeParams& p);
int rvq_decode_cuda(const RvqDecodeParams& p, void* stream);  // returns a cudaError_t

}  // namespace sparsemoe
