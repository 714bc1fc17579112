// Norms and powers of two of the kernels that bound their own errors.
#pragma once

#include "common/cuda.cuh"

namespace sparsemoe {

constexpr float kAbove = 1 + 1e-5f;  // covers the rounding of a norm

// The power of two that brings a norm to 4 .. 8.
__device__ inline float power_of_two_below_8(float norm) {
  const int exponent = int(__float_as_uint(norm) >> 23 & 255);  // norm < 2^(exponent - 126)
  const int wanted = 127 + 3 - (exponent - 126);
  return exponent == 0 ? 1.0f : __uint_as_float(uint32_t(min(max(wanted, 27), 227)) << 23);
}

__device__ inline float inverse_norm(float norm) { return 1 / fmaxf(norm, 1e-12f); }

// The larger, and NaN where either is.
__device__ inline float larger(float a, float b) { return a > b || a != a ? a : b; }

}  // namespace sparsemoe
