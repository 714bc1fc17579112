// The arguments of the experts' ops, checked: what the bindings of every device share.
#pragma once

#include <string>
#include <vector>

#include "moe/experts.h"
#include "moe/plan_tensors.h"

namespace sparsemoe {

inline Activation parse_activation(const std::string& name) {
  if (name == "swiglu") return Activation::swiglu;
  if (name == "geglu") return Activation::geglu;
  if (name == "relu2") return Activation::relu2;
  if (name == "silu") return Activation::silu;
  SPARSEMOE_CHECK(name == "gelu",
                  "activation must be one of swiglu, geglu, relu2, silu, gelu, got '", name, "'");
  return Activation::gelu;
}

inline void check_shape(const Tensor& tensor, const std::vector<int64_t>& sizes, const char* name,
                        const std::string& reason = "") {
  bool right = tensor.dim() == int64_t(sizes.size());
  std::string text;
  for (size_t i = 0; i < sizes.size(); ++i) {
    right = right && tensor.size(int64_t(i)) == sizes[i];
    text += (i ? ", " : "") + std::to_string(sizes[i]);
  }
  SPARSEMOE_CHECK(right, name, " must have shape [", text, "]", reason, ", got ",
                  shape_text(tensor));
}

// Checks also the values, where the CPU holds them.
inline Tensor checked_offsets(const Tensor& offsets_in, int64_t n_experts, int64_t n_rows,
                              const Tensor& like, const char* name, const char* like_name) {
  const Tensor offsets = int32_input(offsets_in, like, name, like_name);
  check_shape(offsets, {n_experts + 1}, name, ", one more than the experts");
  if (offsets.is_cuda()) return offsets;
  const int32_t* values = pointer<int32_t>(offsets);
  for (int64_t e = 0; e <= n_experts; ++e) {
    SPARSEMOE_CHECK(values[e] <= n_rows && (e ? values[e] >= values[e - 1] : values[e] == 0), name,
                    " must ascend from 0 to at most the ", n_rows, " rows, got ", values[e],
                    " at [", e, "]");
  }
  return offsets;
}

// Of a stack of matrices: whether the elements of a row are adjacent.
inline bool has_dense_rows(const Tensor& stack) {
  const int64_t n = stack.size(1), m = stack.size(2);
  return (m <= 1 || stack.stride(2) == 1) && (n <= 1 || stack.stride(1) >= m);
}
inline bool has_dense_columns(const Tensor& stack) {
  const int64_t n = stack.size(1), m = stack.size(2);
  return (n <= 1 || stack.stride(1) == 1) && (m <= 1 || stack.stride(2) >= n);
}

// Itself where its rows or its columns are dense, else a contiguous copy.
inline Tensor with_dense_matrices(const Tensor& stack) {
  return has_dense_rows(stack) || has_dense_columns(stack) ? stack
                                                           : torch::stable::contiguous(stack);
}

// A stack of matrices as a GPU's kernels read it, and what holds it.
struct DenseStack {
  explicit DenseStack(const Tensor& stack) : tensor(with_dense_matrices(stack)) {
    const bool by_column = !has_dense_rows(tensor);
    const int64_t along = by_column ? 1 : 2, across = 3 - along;
    const bool one = tensor.size(across) <= 1;  // its stride says nothing
    const int64_t stride = one ? tensor.size(along) : tensor.stride(across);
    const bool alone = tensor.size(0) <= 1;
    matrices = {pointer(tensor), stride, alone ? tensor.size(across) * stride : tensor.stride(0),
                by_column};
  }

  Tensor tensor;
  Matrices matrices;
};

struct ExpertPlan : PlanTensors {
  Tensor offsets;

  ExpertPlan(const Tensor& offsets_in, const Tensor& row_token_in, const Tensor& row_pair_in,
             const Tensor& token_rows_in, const OptionalTensor& token_offsets_in, int64_t n_experts,
             const Tensor& x)
      : PlanTensors(row_token_in, row_pair_in, token_rows_in, token_offsets_in, x, "x"),
        offsets(checked_offsets(offsets_in, n_experts, map.n_rows, x, "plan.offsets", "x")) {}
};

// x has dense rows, the projections are as they came; everything else is contiguous.
struct ExpertInputs {
  Activation activation;
  DType dtype;
  Tensor x, gate_up, down;
  OptionalTensor gate_up_bias, down_bias, weights;
  int64_t n_experts, hidden, width, columns;  // columns of the first projection
  ExpertPlan plan;

  ExpertInputs(const Tensor& x_in, const Tensor& gate_up_in, const Tensor& down_in,
               const OptionalTensor& gate_up_bias_in, const OptionalTensor& down_bias_in,
               const OptionalTensor& weights_in, const Tensor& offsets, const Tensor& row_token,
               const Tensor& row_pair, const Tensor& token_rows,
               const OptionalTensor& token_offsets, const std::string& activation_name)
      : activation(parse_activation(activation_name)),
        dtype(real_dtype(x_in, "x")),
        x(x_in),
        gate_up(gate_up_in),
        down(down_in),
        n_experts((check_dim(gate_up, 3, "gate_up_proj", "[experts, 2 * intermediate, hidden]"),
                   gate_up.size(0))),
        hidden(gate_up.size(2)),
        width(gate_up.size(1) / columns_per_hidden(activation)),
        columns(gate_up.size(1)),
        plan((check_x(), offsets), row_token, row_pair, token_rows, token_offsets, n_experts, x) {
    SPARSEMOE_CHECK(x.size(0) == plan.map.n_tokens, "x must have the ", plan.map.n_tokens,
                    " tokens of the plan, got shape ", shape_text(x));
    SPARSEMOE_CHECK(width * columns_per_hidden(activation) == columns,
                    "gate_up_proj must have an even number of rows an expert with ",
                    activation_name, ", got shape ", shape_text(gate_up));
    check(gate_up, "gate_up_proj");
    check_shape(down, {n_experts, hidden, width}, "down_proj",
                " beside gate_up_proj " + shape_text(gate_up));
    check(down, "down_proj");
    gate_up_bias = checked_bias(gate_up_bias_in, columns, "gate_up_bias");
    down_bias = checked_bias(down_bias_in, hidden, "down_bias");
    if (weights_in) {
      check_type(*weights_in, accumulator_type(dtype), "weights");
      check_device(*weights_in, x, "weights", "x");
      SPARSEMOE_CHECK(weights_in->numel() == plan.n_pairs(),
                      "weights must hold one value for each of the ", plan.n_pairs(),
                      " pairs of the plan, got shape ", shape_text(*weights_in));
      weights = as_contiguous(*weights_in);
    }
    x = with_dense_rows(x);
  }

  // The gradient of y, with dense rows.
  Tensor checked_grad(const Tensor& grad) const {
    check_shape(grad, {plan.map.n_tokens, hidden}, "grad");
    check(grad, "grad");
    return with_dense_rows(grad);
  }

  // The forward pass's; null where it kept none.
  OptionalTensor checked_pre(const Tensor& pre) const {
    if (pre.dim() == 1 && pre.size(0) == 0) return std::nullopt;
    check_shape(pre, {plan.map.n_rows, columns}, "pre");
    check(pre, "pre");
    return as_contiguous(pre);
  }

  // A sum of gradients that is added to: as `like` in shape.
  OptionalTensor checked_sum(const OptionalTensor& sum, const Tensor& like,
                             const char* name) const {
    if (!sum) return std::nullopt;
    check_shape(*sum, {like.size(0), like.size(1), like.size(2)}, name);
    check_type(*sum, ScalarType::Float, name);
    check_device(*sum, x, name, "x");
    SPARSEMOE_CHECK(sum->is_contiguous(), name, " must be contiguous: it is added to in place");
    return sum;
  }

 private:
  void check(const Tensor& tensor, const char* name) const {
    check_type(tensor, x.scalar_type(), name);
    check_device(tensor, x, name, "x");
  }

  void check_x() const {
    SPARSEMOE_CHECK(x.dim() == 2 && x.size(1) == hidden, "x must have shape [tokens, ", hidden,
                    "], got ", shape_text(x));
  }

  OptionalTensor checked_bias(const OptionalTensor& bias, int64_t size, const char* name) const {
    if (!bias) return std::nullopt;
    check_shape(*bias, {n_experts, size}, name);
    check(*bias, name);
    return as_contiguous(*bias);
  }
};

inline void check_grouped_mm(const Tensor& a, const Tensor& b) {
  check_dim(a, 2, "a", "[rows, in]");
  real_dtype(a, "a");
  check_dim(b, 3, "b", "[experts, in, out]");
  SPARSEMOE_CHECK(a.size(1) == b.size(1), "a must have the ", b.size(1), " columns that b ",
                  shape_text(b), " takes, got shape ", shape_text(a));
  check_type(b, a.scalar_type(), "b");
  check_device(b, a, "b", "a");
}

inline void check_grouped_mm_backward_b(const Tensor& a, const Tensor& grad,
                                        const Tensor& offsets) {
  check_dim(a, 2, "a", "[rows, in]");
  real_dtype(a, "a");
  check_dim(grad, 2, "grad", "[rows, out]");
  check_size(grad, 0, a.size(0), "grad", "[rows, out]");
  check_type(grad, a.scalar_type(), "grad");
  check_device(grad, a, "grad", "a");
  check_dim(offsets, 1, "offsets", "[experts + 1]");
  SPARSEMOE_CHECK(offsets.size(0) >= 1, "offsets must have shape [experts + 1], got [0]");
}

}  // namespace sparsemoe
