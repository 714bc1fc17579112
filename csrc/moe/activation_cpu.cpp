#include "moe/activation.h"

#define SPARSEMOE_THIS_FILE "moe/activation_cpu.cpp"
#include "common/for_each_isa.h"

#ifndef SPARSEMOE_DISPATCH

namespace sparsemoe {
namespace SPARSEMOE_ISA {

// erf to 2 ulp of 1: the rational function of Eigen and XLA, in which 4 stands for infinity.
inline float erf_(float x) {
  x = x < -4.0f ? -4.0f : x;
  x = x > 4.0f ? 4.0f : x;
  const float s = x * x;
  float p = -2.72614225801306e-10f;
  p = p * s + 2.77068142495902e-08f;
  p = p * s - 2.10102402082508e-06f;
  p = p * s - 5.69250639462346e-05f;
  p = p * s - 7.34990630326855e-04f;
  p = p * s - 2.95459980854025e-03f;
  p = p * s - 1.60960333262415e-02f;
  float q = -1.45660718464996e-05f;
  q = q * s - 2.13374055278905e-04f;
  q = q * s - 1.68282697438203e-03f;
  q = q * s - 7.37332916720468e-03f;
  q = q * s - 1.42647390514189e-02f;
  return x * p / q;
}
inline double erf_(double x) { return std::erf(x); }

// value(x), and value and slope together.
struct Silu {
  template <class Real>
  static Real value(Real x) {
    return x / (1 + exp_(-x));
  }
  template <class Real>
  static void both(Real x, Real* value, Real* slope) {
    const Real sigmoid = 1 / (1 + exp_(-x));
    *value = x * sigmoid;
    *slope = sigmoid * (1 + x * (1 - sigmoid));
  }
};

struct Gelu {
  template <class Real>
  static Real value(Real x) {
    return x * (Real(0.5) + Real(0.5) * erf_(x * Real(0.70710678118654752440)));
  }
  template <class Real>
  static void both(Real x, Real* value, Real* slope) {
    const Real below = Real(0.5) + Real(0.5) * erf_(x * Real(0.70710678118654752440));
    *value = x * below;
    *slope = below + x * Real(0.39894228040143267794) * exp_(x * x * Real(-0.5));
  }
};

struct Relu2 {
  template <class Real>
  static Real value(Real x) {
    const Real positive = x < 0 ? Real(0) : x;
    return positive * positive;
  }
  template <class Real>
  static void both(Real x, Real* value, Real* slope) {
    const Real positive = x < 0 ? Real(0) : x;
    *value = positive * positive;
    *slope = 2 * positive;
  }
};

struct Identity {
  template <class Real>
  static Real value(Real x) {
    return x;
  }
  template <class Real>
  static void both(Real x, Real* value, Real* slope) {
    *value = x, *slope = 1;
  }
};

// Calls f(function, gated).
template <class F>
void with_activation(Activation activation, F f) {
  switch (activation) {
    case Activation::swiglu:
      return f(Silu(), std::true_type());
    case Activation::geglu:
      return f(Gelu(), std::true_type());
    case Activation::relu2:
      return f(Relu2(), std::false_type());
    case Activation::silu:
      return f(Silu(), std::false_type());
    case Activation::gelu:
      return f(Gelu(), std::false_type());
    case Activation::none:
      return f(Identity(), std::false_type());
  }
}

// One row; `bias` is null or as wide as pre.
template <class T, class Function, class Gated>
void activate_row(Function, Gated, int64_t width, const T* bias, T* pre, T* out) {
  using Real = acc_t<T>;
  const int64_t columns = Gated::value ? 2 * width : width;
  if (bias) {
#pragma omp simd
    for (int64_t c = 0; c < columns; ++c) store(pre + c, load(pre[c]) + load(bias[c]));
  }
#pragma omp simd
  for (int64_t c = 0; c < width; ++c) {
    Real value = Function::value(Real(load(pre[c])));
    if constexpr (Gated::value) value *= load(pre[width + c]);
    store(out + c, value);
  }
}

template <class T, class Function, class Gated>
acc_t<T> activate_row_backward(Function, Gated, int64_t width, acc_t<T> weight, const T* pre,
                               T* hidden, T* grad_pre) {
  using Real = acc_t<T>;
  Real inner = 0;
#pragma omp simd reduction(+ : inner)
  for (int64_t c = 0; c < width; ++c) {
    const Real grad = load(hidden[c]);
    Real value, slope;
    Function::both(Real(load(pre[c])), &value, &slope);
    if constexpr (Gated::value) {
      const Real up = load(pre[width + c]);
      store(grad_pre + width + c, weight * grad * value);
      slope *= up;
      value *= up;
    }
    store(grad_pre + c, weight * grad * slope);
    store(hidden + c, weight * value);
    inner += grad * value;
  }
  return inner;
}

// Calls f with a null pointer of the element type, the function, and whether it is gated.
template <class F>
void with_types(DType dtype, Activation activation, F f) {
  with_dtype(dtype, [&](auto* type) {
    with_activation(activation, [&](auto function, auto gated) { f(type, function, gated); });
  });
}

void activate(const ActivateParams& p) {
  with_types(p.dtype, p.activation, [&](auto* type, auto function, auto gated) {
    using T = std::remove_pointer_t<decltype(type)>;
    const int64_t columns = p.width * columns_per_hidden(p.activation);
    parallel_for(0, p.n_rows, grain_for(p.width * 64), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        T* out = static_cast<T*>(p.out) + r * p.out_stride;
        activate_row(function, gated, p.width, static_cast<const T*>(p.bias),
                     static_cast<T*>(p.pre) + r * columns, out);
        std::fill(out + p.width, out + p.out_stride, T{});
      }
    });
  });
}

void activate_backward(const ActivateBackwardParams& p) {
  with_types(p.dtype, p.activation, [&](auto* type, auto function, auto gated) {
    using T = std::remove_pointer_t<decltype(type)>;
    using Real = acc_t<T>;
    const int64_t columns = p.width * columns_per_hidden(p.activation);
    const Real* weights = static_cast<const Real*>(p.weights);
    Real* inner = static_cast<Real*>(p.inner);
    parallel_for(0, p.n_rows, grain_for(p.width * 64), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        T* grad_pre = static_cast<T*>(p.grad_pre) + r * p.grad_pre_stride;
        const Real sum =
            activate_row_backward(function, gated, p.width, weights ? weights[r] : Real(1),
                                  static_cast<const T*>(p.pre) + r * p.pre_stride,
                                  static_cast<T*>(p.hidden) + r * p.width, grad_pre);
        std::fill(grad_pre + columns, grad_pre + p.grad_pre_stride, T{});
        if (inner) inner[r] = sum;
      }
    });
  });
}

template <class T>
void add_bias(const AddBiasParams& p) {
  const T* bias = static_cast<const T*>(p.bias);
  parallel_for(0, p.n_rows, grain_for(p.width * 8), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      T* row = static_cast<T*>(p.rows) + r * p.stride;
#pragma omp simd
      for (int64_t c = 0; c < p.width; ++c) store(row + c, load(row[c]) + load(bias[c]));
    }
  });
}

template <class T>
void sum_rows(const SumRowsParams& p) {
  using Real = acc_t<T>;
  const Real* weights = static_cast<const Real*>(p.weights);
  std::vector<Real> sum(p.width);
  for (int64_t r = 0; r < p.n_rows; ++r) {
    const T* row = static_cast<const T*>(p.rows) + r * p.stride;
    const Real weight = weights ? weights[r] : Real(1);
    if (p.sum) {
#pragma omp simd
      for (int64_t c = 0; c < p.width; ++c) sum[c] += weight * load(row[c]);
    }
    if (p.bias) {
      const T* bias = static_cast<const T*>(p.bias);
      Real inner = 0;
#pragma omp simd reduction(+ : inner)
      for (int64_t c = 0; c < p.width; ++c) inner += load(row[c]) * load(bias[c]);
      static_cast<Real*>(p.inner)[r] += inner;
    }
  }
  for (int64_t c = 0; p.sum && c < p.width; ++c) store(static_cast<T*>(p.sum) + c, sum[c]);
}

template <class T>
void add_to(const AddToParams& p) {
  const T* values = static_cast<const T*>(p.values);
  parallel_for(0, p.n, grain_for(8), [&](int64_t begin, int64_t end) {
#pragma omp simd
    for (int64_t i = begin; i < end; ++i) p.sum[i] += float(load(values[i]));
  });
}

void add_bias_to_rows(const AddBiasParams& p) {
  with_dtype(p.dtype, [&](auto* type) { add_bias<std::remove_pointer_t<decltype(type)>>(p); });
}
void sum_rows_of_expert(const SumRowsParams& p) {
  with_dtype(p.dtype, [&](auto* type) { sum_rows<std::remove_pointer_t<decltype(type)>>(p); });
}
void add_to_sum(const AddToParams& p) {
  with_dtype(p.dtype, [&](auto* type) { add_to<std::remove_pointer_t<decltype(type)>>(p); });
}

}  // namespace SPARSEMOE_ISA
}  // namespace sparsemoe

#else
namespace sparsemoe {

void activate_cpu(const ActivateParams& p) { SPARSEMOE_BEST_ISA(activate, p); }
void activate_backward_cpu(const ActivateBackwardParams& p) {
  SPARSEMOE_BEST_ISA(activate_backward, p);
}
void add_bias_cpu(const AddBiasParams& p) { SPARSEMOE_BEST_ISA(add_bias_to_rows, p); }
void sum_rows_cpu(const SumRowsParams& p) { SPARSEMOE_BEST_ISA(sum_rows_of_expert, p); }
void add_to_cpu(const AddToParams& p) { SPARSEMOE_BEST_ISA(add_to_sum, p); }

}  // namespace sparsemoe
#endif
