// The experts' activations and their slopes in float, from the two approximate instructions for 2^x
// and 1/x. The error of a value is at most 8e-7 of it for |gate| < 3, that of a slope 4e-7. Large
// gates saturate; infinite ones give NaN wherever torch does.
#pragma once

#include <type_traits>

#include "common/ptx.cuh"
#include "moe/experts.h"

namespace sparsemoe {

template <Activation A>
constexpr bool kGated = A == Activation::swiglu || A == Activation::geglu;

// value = f(gate), slope = f'(gate). A gated activation is f(gate) * up.
template <Activation A>
__device__ void act_value_slope(float gate, float& value, float& slope) {
  if constexpr (A == Activation::swiglu || A == Activation::silu) {
    // 1 / (1 + infinity) is zero.
    const float sigmoid = reciprocal_approx(1.0f + exp2_approx(-1.44269504f * gate));
    value = gate * sigmoid;
    slope = fmaf(value, 1.0f - sigmoid, sigmoid);
  } else if constexpr (A == Activation::geglu || A == Activation::gelu) {
    // The normal distribution below -x is exp(-x^2 / 2) u p(u), with u = 1 / (1 + 0.27 x) and the p
    // of degree 8 whose relative error is the least, 2.4e-8.
    const float u = reciprocal_approx(fmaf(0.27f, fabsf(gate), 1.0f));
    const float gauss = exp2_approx(-0.721347520f * (gate * gate));
    float p = 0.0289954692f;
    p = fmaf(p, u, -0.126658484f);
    p = fmaf(p, u, 0.170155749f);
    p = fmaf(p, u, -0.0696502998f);
    p = fmaf(p, u, 0.108142339f);
    p = fmaf(p, u, 0.0719084069f);
    p = fmaf(p, u, 0.10184855f);
    p = fmaf(p, u, 0.107537277f);
    p = fmaf(p, u, 0.107721008f);
    const float tail = p * u * gauss;
    const float below = gate < 0 ? tail : 1.0f - tail;
    value = gate * below;
    slope = fmaf(gate, 0.398942280f * gauss, below);
  } else if constexpr (A == Activation::relu2) {
    const float positive = gate < 0 ? 0.0f : gate;  // NaN stays
    value = positive * positive;
    slope = 2.0f * positive;
  } else {
    value = gate;
    slope = 1.0f;
  }
}

template <Activation A>
__device__ float act_value(float gate) {
  float value, slope;
  act_value_slope<A>(gate, value, slope);
  return value;
}

// Calls f with the activation as an integral_constant.
#ifdef __CUDACC__
#pragma nv_exec_check_disable
#endif
template <class F>
__host__ __device__ auto with_activation(Activation activation, F f) {
  switch (activation) {
    case Activation::swiglu:
      return f(std::integral_constant<Activation, Activation::swiglu>());
    case Activation::geglu:
      return f(std::integral_constant<Activation, Activation::geglu>());
    case Activation::relu2:
      return f(std::integral_constant<Activation, Activation::relu2>());
    case Activation::silu:
      return f(std::integral_constant<Activation, Activation::silu>());
    case Activation::gelu:
      return f(std::integral_constant<Activation, Activation::gelu>());
    default:
      return f(std::integral_constant<Activation, Activation::none>());
  }
}

}  // namespace sparsemoe
