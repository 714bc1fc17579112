#include "common/cuda.cuh"
#include "moe/experts_portable.h"

namespace sparsemoe {

int rows_product_portable(const RowsProductParams& p, void* stream) {
  return with_cuda_dtype(p.dtype, [&](auto* type) {
    return portable::rows_product<std::remove_pointer_t<decltype(type)>>(p, stream);
  });
}

int hidden_backward_portable(const HiddenBackwardParams& p, void* stream) {
  return with_cuda_dtype(p.dtype, [&](auto* type) {
    return portable::hidden_backward<std::remove_pointer_t<decltype(type)>>(p, stream);
  });
}

int weight_grad_portable(const WeightGradParams& p, void* stream) {
  return with_cuda_dtype(p.dtype, [&](auto* type) {
    return portable::weight_grad<std::remove_pointer_t<decltype(type)>>(p, stream);
  });
}

}  // namespace sparsemoe
