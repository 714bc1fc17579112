// What moves codes: the sums of the vectors that chose each, and the moving averages of those.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace sparsemoe {

// sums[q][j] = sum of weights[n][q] * v over the rows n with codes[n][q] == j, v being x[n] without
// codebooks, else the residual before stage q or, with `after`, after it. In a fixed order. Reals
// are float, or double where dtype is f64.
struct RvqCodeSumsParams {
  int64_t n, width, n_stages, n_codes;
  const void* x;  // [n, width], rows x_stride elements apart
  int64_t x_stride;
  DType dtype;
  const int32_t* codes;   // [n, n_stages]; outside of 0 .. n_codes - 1: takes no part
  const void* codebooks;  // [n_stages, n_codes, width] reals, or null
  const void* weights;    // [n, n_stages] reals, or null
  bool after;
  void* sums;       // [n_stages, n_codes, width] reals
  void* counts;     // [n_stages, n_codes] reals
  void* workspace;  // of a GPU: rvq_code_sums_workspace_bytes
};

// cluster_size <- decay * cluster_size + (1 - decay) * counts, embed_sum alike with sums, and
// codebooks = embed_sum / smoothed cluster_size.
struct RvqEmaParams {
  int64_t width, n_stages, n_codes;
  double decay, epsilon;
  DType dtype;         // f32 or f64: of all
  void* codebooks;     // [n_stages, n_codes, width]
  void* cluster_size;  // [n_stages, n_codes]
  void* embed_sum;     // [n_stages, n_codes, width]
  const void* sums;
  const void* counts;
};

void rvq_code_sums_cpu(const RvqCodeSumsParams& p);
void rvq_ema_cpu(const RvqEmaParams& p);
// Return a cudaError_t.
int rvq_code_sums_cuda(const RvqCodeSumsParams& p, void* stream);
int rvq_ema_cuda(const RvqEmaParams& p, void* stream);

}  // namespace sparsemoe
