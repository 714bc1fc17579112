// Element types that kernels accept, named without any framework.
#pragma once

#include <cstdint>

namespace sparsemoe {

enum class DType : int32_t { f32, f16, bf16, f64 };

inline int64_t element_size(DType dtype) {
  return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2;
}

}  // namespace sparsemoe
