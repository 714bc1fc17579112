// What the experts do between their matrix products on the CPU, row by row.
#pragma once

#include <cstdint>

#include "moe/experts.h"

namespace sparsemoe {

// out[r] = activation(pre[r] + bias). The sum is also written to pre.
struct ActivateParams {
  int64_t n_rows, width;  // of out; pre is width * columns_per_hidden wide
  DType dtype;
  Activation activation;
  const void* bias;    // [pre's width] or null
  void* pre;           // [n_rows, ..], contiguous
  void* out;           // [n_rows, width]
  int64_t out_stride;  // between rows, in elements; past the width they become zero
};

// With d the gradient of activation(pre[r]) where the row had weight 1:
//   grad_pre[r] = weight[r] * d * activation'(pre[r])
//   hidden[r] = weight[r] * activation(pre[r])
//   inner[r] = <d, activation(pre[r])>
struct ActivateBackwardParams {
  int64_t n_rows, width;
  DType dtype;
  Activation activation;
  const void* pre;
  int64_t pre_stride;
  const void* weights;      // [n_rows] float, double where dtype is f64; null: ones
  void* hidden;             // contiguous; holds d, and then the hidden rows
  void* grad_pre;           // may be pre
  int64_t grad_pre_stride;  // past the width rows become zero
  void* inner;              // [n_rows] as weights, or null
};

// For the rows of one expert: rows[r] += bias.
struct AddBiasParams {
  int64_t n_rows, width;
  DType dtype;
  const void* bias;  // [width]
  void* rows;
  int64_t stride;
};

// sum = sum over r of weight[r] * rows[r], where it is given; with bias, inner[r] += <rows[r],
// bias>.
struct SumRowsParams {
  int64_t n_rows, width;
  DType dtype;
  const void* rows;
  int64_t stride;
  const void* weights;  // as above
  void* sum;            // [width] of dtype, or null
  const void* bias;     // [width] or null
  void* inner;
};

// sum += values, in float.
struct AddToParams {
  int64_t n;
  DType dtype;  // of values
  const void* values;
  float* sum;
};

void activate_cpu(const ActivateParams& p);
void activate_backward_cpu(const ActivateBackwardParams& p);
void add_bias_cpu(const AddBiasParams& p);
void sum_rows_cpu(const SumRowsParams& p);
void add_to_cpu(const AddToParams& p);

}  // namespace sparsemoe
