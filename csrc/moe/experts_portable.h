// The expert kernels for any GPU of compute capability 8.0 or later, compiled by element type.
#pragma once

#include "moe/experts.h"

namespace sparsemoe {
namespace portable {

// T is __nv_bfloat16, __half or float. Each returns a CUDA error.
template <class T>
int rows_product(const RowsProductParams& p, void* stream);
template <class T>
int hidden_backward(const HiddenBackwardParams& p, void* stream);
template <class T>
int weight_grad(const WeightGradParams& p, void* stream);

}  // namespace portable
}  // namespace sparsemoe
