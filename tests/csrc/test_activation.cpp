// What the experts do between their products, called as another host would call it.
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "check.h"
#include "moe/activation.h"

using namespace sparsemoe;

namespace {

const Activation kAll[] = {Activation::swiglu, Activation::geglu, Activation::relu2,
                           Activation::silu,   Activation::gelu,  Activation::none};

double activate_one(Activation activation, double gate, double up) {
  switch (activation) {
    case Activation::swiglu:
      return gate / (1 + std::exp(-gate)) * up;
    case Activation::geglu:
      return gate * 0.5 * std::erfc(-gate / std::sqrt(2.0)) * up;
    case Activation::relu2:
      return gate > 0 ? gate * gate : 0;
    case Activation::silu:
      return gate / (1 + std::exp(-gate));
    case Activation::gelu:
      return gate * 0.5 * std::erfc(-gate / std::sqrt(2.0));
    default:
      return gate;
  }
}

// -12 .. 12, with zero.
std::vector<float> range(int64_t n) {
  std::vector<float> values(n);
  for (int64_t i = 0; i < n; ++i) values[i] = float(i - n / 2) * (24.0f / float(n));
  return values;
}

}  // namespace

TEST(activations_are_right_from_end_to_end) {
  const int64_t rows = 5, width = 67;
  for (Activation activation : kAll) {
    const int64_t per_hidden = columns_per_hidden(activation), columns = width * per_hidden;
    std::vector<float> pre = range(rows * columns), bias(columns, 0.25f), before = pre;
    const int64_t stride = 80;
    std::vector<float> out(rows * stride, 7.0f);
    activate_cpu(
        {rows, width, DType::f32, activation, bias.data(), pre.data(), out.data(), stride});
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < stride; ++c) {
        const int64_t at = r * columns + c;
        const double gate = c < width ? before[at] + 0.25f : 0;
        const double up = c < width && per_hidden == 2 ? before[at + width] + 0.25f : 1;
        const double wanted = c < width ? activate_one(activation, gate, up) : 0;
        CHECK_NEAR(out[r * stride + c], wanted,
                   2e-7 * (1 + std::fabs(gate * up) + std::fabs(wanted)));
        if (c < width) CHECK_NEAR(pre[at], gate, 0);
      }
    }
  }
}

TEST(gradients_are_the_slopes) {
  const int64_t rows = 3, width = 50;
  for (Activation activation : kAll) {
    const int64_t columns = width * columns_per_hidden(activation), stride = columns + 6;
    const std::vector<float> given = range(rows * columns);
    const std::vector<double> pre(given.begin(), given.end()), weights{0.5, -2, 0};
    std::vector<double> hidden(rows * width), grad_pre(rows * stride, 7), inner(rows), d;
    for (size_t i = 0; i < hidden.size(); ++i) hidden[i] = double(i % 7) - 3;
    d = hidden;
    activate_backward_cpu({rows, width, DType::f64, activation, pre.data(), columns, weights.data(),
                           hidden.data(), grad_pre.data(), stride, inner.data()});
    for (int64_t r = 0; r < rows; ++r) {
      double sum = 0;
      for (int64_t c = 0; c < width; ++c) {
        const double gate = pre[r * columns + c];
        const double up = columns > width ? pre[r * columns + width + c] : 1;
        const double value = activate_one(activation, gate, up), step = 1e-6;
        const double slope = (activate_one(activation, gate + step, up) -
                              activate_one(activation, gate - step, up)) /
                             (2 * step);
        const double grad = d[r * width + c];
        sum += grad * value;
        CHECK_NEAR(hidden[r * width + c], weights[r] * value, 1e-12);
        if (gate != 0 || activation != Activation::relu2) {
          CHECK_NEAR(grad_pre[r * stride + c], weights[r] * grad * slope, 1e-6);
        }
        if (columns > width) {
          CHECK_NEAR(grad_pre[r * stride + width + c],
                     weights[r] * grad * activate_one(activation, gate, 1), 1e-12);
        }
      }
      CHECK_NEAR(inner[r], sum, 1e-10);
      for (int64_t c = columns; c < stride; ++c) CHECK_NEAR(grad_pre[r * stride + c], 0, 0);
    }
  }
}

TEST(activations_keep_nan_and_end_in_zero) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  for (Activation activation : {Activation::relu2, Activation::silu, Activation::gelu}) {
    std::vector<float> pre{nan, -1e30f, -200, 0, 1e10f}, out(5);
    activate_cpu({1, 5, DType::f32, activation, nullptr, pre.data(), out.data(), 5});
    CHECK(std::isnan(out[0]));
    for (int i = 1; i < 4; ++i) CHECK_NEAR(out[i], 0, 0);
    CHECK(out[4] >= 1e10f);
  }
}

TEST(rows_are_summed_by_weight_with_their_inner_products) {
  const int64_t rows = 300, width = 21, stride = 24;
  std::vector<float> values = range(rows * stride), weights(rows), sum(width), inner(rows, 1.0f);
  std::vector<float> bias(width, 0.5f);
  for (int64_t r = 0; r < rows; ++r) weights[r] = float(r % 3);
  sum_rows_cpu({rows, width, DType::f32, values.data(), stride, weights.data(), sum.data(),
                bias.data(), inner.data()});
  for (int64_t c = 0; c < width; ++c) {
    double wanted = 0;
    for (int64_t r = 0; r < rows; ++r) wanted += double(weights[r]) * values[r * stride + c];
    CHECK_NEAR(sum[c], wanted, 1e-3);
  }
  for (int64_t r = 0; r < rows; ++r) {
    double wanted = 1;
    for (int64_t c = 0; c < width; ++c) wanted += 0.5 * values[r * stride + c];
    CHECK_NEAR(inner[r], wanted, 1e-4);
  }
}

TEST(biases_and_sums_are_added) {
  std::vector<float> rows{1, 2, 9, 3, 4, 9}, bias{10, 20};
  add_bias_cpu({2, 2, DType::f32, bias.data(), rows.data(), 3});
  CHECK(rows == (std::vector<float>{11, 22, 9, 13, 24, 9}));
  std::vector<float> total{1, 2, 3, 4, 5, 6};
  add_to_cpu({6, DType::f32, rows.data(), total.data()});
  CHECK(total == (std::vector<float>{12, 24, 12, 17, 29, 15}));
}
