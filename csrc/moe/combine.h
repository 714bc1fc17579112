// Combine: each token's rows summed by weight, in a fixed order and in float32.
#pragma once

#include "common/dtype.h"
#include "moe/dispatch.h"

namespace sparsemoe {

struct CombineParams {
  RowMap map;
  int64_t width;
  DType dtype;
  const void* rows;  // [n_rows, width], rows_stride elements apart
  int64_t rows_stride;
  const void* weights;   // by pair, float (double where dtype is f64); null: ones
  void* y;               // [n_tokens, width]
  int64_t y_stride = 0;  // elements between rows of y; 0: width
};

struct CombineBackwardParams {
  RowMap map;
  int64_t width;
  DType dtype;
  const void* grad;  // [n_tokens, width], rows grad_stride elements apart
  int64_t grad_stride;
  const void* rows;  // [n_rows, width], rows_stride elements apart
  int64_t rows_stride;
  const void* weights;  // by pair
  void* grad_rows;      // [n_rows, width]; rows without a token become zero
  void* grad_weights;   // by pair; pairs without a row become zero
  int64_t n_pairs;
};

void combine_cpu(const CombineParams& p);
void combine_backward_cpu(const CombineBackwardParams& p);
int combine_cuda(const CombineParams& p, void* stream);
int combine_backward_cuda(const CombineBackwardParams& p, void* stream);

}  // namespace sparsemoe
