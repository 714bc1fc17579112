// Vectors of any type, and choices among distances.
#pragma once

#include "common/cuda.cuh"
#include "common/dtype.h"

namespace sparsemoe {

__device__ inline float element_of(const void* x, DType dtype, int64_t at) {
  if (dtype == DType::f32) return static_cast<const float*>(x)[at];
  return dtype == DType::f16 ? to_float(static_cast<const __half*>(x)[at])
                             : to_float(static_cast<const __nv_bfloat16*>(x)[at]);
}

// Calls f with a null pointer to the type.
template <class F>
__device__ inline void with_vector_type(DType dtype, const F& f) {
  if (dtype == DType::f32) {
    f(static_cast<float*>(nullptr));
  } else if (dtype == DType::f16) {
    f(static_cast<__half*>(nullptr));
  } else {
    f(static_cast<__nv_bfloat16*>(nullptr));
  }
}

__device__ inline bool nearer(float distance, int code, float than, int than_code) {
  return distance < than || (distance == than && code < than_code);
}

// The lower distance, or of equals the lower code, over so many neighbouring lanes.
__device__ inline void least_of(float& distance, int& code, int lanes) {
  for (int step = lanes / 2; step > 0; step /= 2) {
    const float other = __shfl_xor_sync(kFullWarp, distance, step);
    const int other_code = __shfl_xor_sync(kFullWarp, code, step);
    if (nearer(other, other_code, distance, code)) distance = other, code = other_code;
  }
}

}  // namespace sparsemoe
