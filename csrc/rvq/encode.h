// Residual vector quantization: the nearest code of each stage to what the stages before left.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/dtype.h"

namespace sparsemoe {

enum class Metric : int32_t { l2, cosine };

constexpr int64_t kMaxBeam = 32;

// Reals that are not of `dtype` are float, or double where dtype is f64.
struct RvqEncodeParams {
  int64_t n, width, n_stages, n_codes;
  const void* x;  // [n, width], rows x_stride elements apart
  int64_t x_stride;
  DType dtype;
  const void* codebooks;  // [n_stages, n_codes, width] reals
  Metric metric;
  bool exact;       // false: a GPU may leave codes that half precision cannot separate
  int32_t* codes;   // [n, n_stages]
  void* quantized;  // [n, width] of dtype
  void* errors;     // [n, n_stages] reals
  void* workspace;  // of a GPU: rvq_encode_workspace_bytes
};

// The codes given: the gradient of sum(grad_quantized * x) + sum over stages of grad_errors *
// |r_q|^2 to x, codes of earlier stages being constants.
struct RvqEncodeBackwardParams {
  int64_t n, width, n_stages, n_codes;
  const void* grad_quantized;  // [n, width] of dtype
  const void* grad_errors;     // [n, n_stages] reals
  const void* x;
  int64_t x_stride;
  DType dtype;
  const void* codebooks;
  const int32_t* codes;
  void* grad_x;  // [n, width] of dtype
};

struct RvqBeamParams {
  int64_t n, width, n_stages, n_codes, beam;
  const void* x;
  int64_t x_stride;
  DType dtype;
  const void* codebooks;
  int32_t* codes;   // [n, n_stages]
  void* quantized;  // [n, width] of dtype
  void* errors;     // [n, n_stages] reals
  void* workspace;  // of a GPU: rvq_beam_workspace_bytes
};

void rvq_encode_cpu(const RvqEncodeParams& p);
void rvq_encode_backward_cpu(const RvqEncodeBackwardParams& p);
void rvq_beam_encode_cpu(const RvqBeamParams& p);
// Return a cudaError_t.
int rvq_encode_cuda(const RvqEncodeParams& p, void* stream);
int rvq_encode_backward_cuda(const RvqEncodeBackwardParams& p, void* stream);
int rvq_beam_encode_cuda(const RvqBeamParams& p, void* stream);

}  // namespace sparsemoe
