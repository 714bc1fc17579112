// The expert kernels for Hopper, one file of code for each of the heavy ones.
#pragma once

#include "moe/experts.h"

namespace sparsemoe {
namespace hopper {

// What a launch returns where the driver refuses to describe a tensor; else it is a CUDA error.
constexpr int kNotTaken = -1;

// T is __nv_bfloat16 or __half. Activations are for gathered rows.
template <class T, bool kGather, bool kByColumn, bool kGated>
int rows_product_launch(const RowsProductParams& params, void* stream);
template <class T, bool kByColumn, bool kGated>
int hidden_backward_launch(const HiddenBackwardParams& params, void* stream);
// With kTransposed it is b that is gathered.
template <class T, bool kGather, bool kTransposed>
int weight_grad_launch(const WeightGradParams& params, void* stream);

}  // namespace hopper
}  // namespace sparsemoe
