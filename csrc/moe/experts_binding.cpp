// The experts and grouped_mm on a GPU.
#include "moe/experts.h"

#include <tuple>

#include "moe/combine.h"
#include "moe/expert_inputs.h"

namespace sparsemoe {
namespace {

#ifdef USE_CUDA
#define SPARSEMOE_RUN_CUDA(op, like, params) \
  run(#op, like, decltype(cpu_of(&op##_cuda))(nullptr), op##_cuda, params)
#else
#define SPARSEMOE_RUN_CUDA(op, like, params) \
  run(#op, like, decltype(cpu_of(&op##_cuda))(nullptr), decltype (&op##_cuda)(nullptr), params)
#endif
template <class Params>
auto cpu_of(int (*)(const Params&, void*)) -> void (*)(const Params&);

// Expanded rows above so many bytes are made and summed in two parts of their columns. The way back
// needs more memory elsewhere, and in one part it reads its wider rows once.
constexpr int64_t kManyBytes = int64_t(256) << 20, kManyBytesBack = int64_t(1) << 30;

std::vector<int64_t> sizes_of(const OptionalTensor& tensor) {
  if (!tensor) return {0};
  return {tensor->sizes().begin(), tensor->sizes().end()};
}

Tensor zeros(const std::vector<int64_t>& sizes, ScalarType type, const Tensor& like) {
  Tensor tensor = empty(sizes, type, like);
  torch::stable::zero_(tensor);
  return tensor;
}

// Zeros for kernels that hand out many tiles.
class Counters {
 public:
  Counters(int64_t n_rows, int count, const Tensor& like) {
    if (n_rows >= kManyRows) zeros_ = zeros({count}, ScalarType::Int, like);
  }
  int32_t* take() { return zeros_ ? mutable_pointer<int32_t>(*zeros_) + taken_++ : nullptr; }

 private:
  static constexpr int64_t kManyRows = 1024;
  OptionalTensor zeros_;
  int taken_ = 0;
};

struct Layer : ExpertInputs {
  using ExpertInputs::ExpertInputs;

  DenseStack first{gate_up}, second{down};
  ScalarType type = x.scalar_type();
  int64_t n_rows = plan.map.n_rows, n_tokens = plan.map.n_tokens;
  ExpertRows experts{pointer<int32_t>(plan.offsets), n_experts, n_rows};
  mutable Counters counters{n_rows, 7, x};  // of no pass more kernels ask
  bool nothing = n_rows == 0 || n_tokens == 0 || hidden == 0 || n_experts == 0;

  Tensor none() const { return empty({0}, type, x); }
  Tensor new_rows(int64_t n_columns) const { return empty({n_rows, n_columns}, type, x); }

  Rows gathered(const Tensor& by_token) const {
    return {pointer(by_token), row_stride(by_token), n_tokens, plan.map.row_token};
  }
  Rows all(const Tensor& rows) const { return {pointer(rows), rows.size(1), n_rows, nullptr}; }

  // out = activation(x @ gate_up^T + bias); pre may be null.
  void first_product(const Tensor* pre, const Tensor& out, Activation act) const {
    RowsProductParams p{experts, counters.take(), dtype, gathered(x), hidden, columns};
    p.b = first.matrices.transposed();
    p.bias = pointer(gate_up_bias), p.bias_stride = columns;
    p.activation = act;
    p.pre = pre ? mutable_pointer(*pre) : nullptr;
    p.out = mutable_pointer(out), p.out_stride = out.size(1);
    SPARSEMOE_RUN_CUDA(rows_product, x, p);
  }

  // The sum by token of rows @ b[e] + bias[e], each b[e] `hidden` wide.
  Tensor sum_of_products(const Tensor& rows, const Matrices& b, const OptionalTensor& bias,
                         const OptionalTensor& by_weight, int64_t many_bytes) const {
    const Tensor y = empty({n_tokens, hidden}, type, x);
    if (b.by_column && few_rows(experts, rows.size(1), hidden) && rows.size(1) > 0 &&
        plan.map.top_k <= kFewRows && n_tokens <= kFewRows) {
      TokenSumsParams p{experts, dtype, plan.map, rows.size(1), hidden};
      p.rows = pointer(rows), p.b = b, p.bias = pointer(bias);
      p.weights = pointer<float>(by_weight), p.y = mutable_pointer(y);
      SPARSEMOE_RUN_CUDA(token_sums_few, x, p);
      return y;
    }
    const int64_t k = rows.size(1), item = int64_t(x.element_size());
    const bool halve = n_rows * hidden * item > many_bytes;
    const int64_t part = halve ? std::min((hidden / 2 + 255) / 256 * 256, hidden) : hidden;
    const Tensor products = new_rows(part);
    for (int64_t column = 0; column < hidden; column += part) {
      const int64_t n = std::min(part, hidden - column);
      RowsProductParams p{experts, counters.take(), dtype, all(rows), k, n};
      p.b = b;
      p.b.data = static_cast<const char*>(b.data) + column * item * (b.by_column ? b.stride : 1);
      if (bias) p.bias = pointer<char>(*bias) + column * item, p.bias_stride = hidden;
      p.activation = Activation::none;
      p.out = mutable_pointer(products), p.out_stride = part;
      SPARSEMOE_RUN_CUDA(rows_product, x, p);
      CombineParams c;
      c.map = plan.map, c.width = n, c.dtype = dtype;
      c.rows = pointer(products), c.rows_stride = part;
      c.weights = pointer(by_weight);
      c.y = mutable_pointer<char>(y) + column * item, c.y_stride = hidden;
      SPARSEMOE_RUN_CUDA(combine, x, c);
    }
    return y;
  }

  // outer(a[r], b[r]) summed over the rows of each expert: stored as `of`, or added to `sum`.
  Tensor weight_grad(Rows a, Rows b, int64_t m, int64_t n, const DenseStack& of,
                     const OptionalTensor& sum) const {
    const bool by_column = of.matrices.by_column && !sum;
    if (by_column) std::swap(a, b), std::swap(m, n);
    const Tensor out = sum ? *sum : empty({n_experts, m, n}, type, x);
    WeightGradParams p{experts, counters.take(),      dtype,          a, b, m,
                       n,       mutable_pointer(out), sum.has_value()};
    SPARSEMOE_RUN_CUDA(weight_grad, x, p);
    if (sum) return none();
    return by_column ? torch::stable::transpose(out, 1, 2) : out;
  }

  Tensor no_weight_grad(const DenseStack& of) const {
    const Tensor& like = of.tensor;
    if (!of.matrices.by_column) return zeros(sizes_of(like), type, x);
    return torch::stable::transpose(zeros({n_experts, like.size(2), like.size(1)}, type, x), 1, 2);
  }

  Tensor bias_grad(const Rows& a, int64_t n, const OptionalTensor& by_weight) const {
    const Tensor out = empty({n_experts, n}, type, x);
    BiasGradParams p{experts, dtype, a, n};
    p.weights = pointer<float>(by_weight);
    p.row_pair = plan.map.row_pair, p.n_pairs = plan.n_pairs();
    p.out = mutable_pointer(out);
    SPARSEMOE_RUN_CUDA(bias_grad, x, p);
    return out;
  }
};

std::tuple<Tensor, Tensor> experts(const Tensor& x, const Tensor& gate_up, const Tensor& down,
                                   const OptionalTensor& gate_up_bias,
                                   const OptionalTensor& down_bias, const OptionalTensor& weights,
                                   const Tensor& offsets, const Tensor& row_token,
                                   const Tensor& row_pair, const Tensor& token_rows,
                                   const OptionalTensor& token_offsets, std::string activation,
                                   bool keep) {
  const Layer in(x, gate_up, down, gate_up_bias, down_bias, weights, offsets, row_token, row_pair,
                 token_rows, token_offsets, activation);
  const Tensor pre = keep ? in.new_rows(in.columns) : in.none();
  if (in.nothing) {
    return {zeros({in.n_tokens, in.hidden}, in.type, in.x), pre};
  }
  const Tensor hidden = in.new_rows(in.width);
  in.first_product(keep ? &pre : nullptr, hidden, in.activation);
  return {in.sum_of_products(hidden, in.second.matrices.transposed(), in.down_bias, in.weights,
                             kManyBytes),
          pre};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> experts_backward(
    const Tensor& grad_in, const Tensor& x, const Tensor& gate_up, const Tensor& down,
    const OptionalTensor& gate_up_bias, const OptionalTensor& down_bias,
    const OptionalTensor& weights, const Tensor& offsets, const Tensor& row_token,
    const Tensor& row_pair, const Tensor& token_rows, const OptionalTensor& token_offsets,
    std::string activation, const Tensor& pre_in, bool need_x, bool need_gate_up, bool need_down,
    const OptionalTensor& gate_up_sum_in, const OptionalTensor& down_sum_in) {
  const Layer in(x, gate_up, down, gate_up_bias, down_bias, weights, offsets, row_token, row_pair,
                 token_rows, token_offsets, activation);
  const Tensor grad = in.checked_grad(grad_in);
  OptionalTensor pre = in.checked_pre(pre_in);
  const OptionalTensor gate_up_sum = in.checked_sum(gate_up_sum_in, in.gate_up, "gate_up_sum");
  const OptionalTensor down_sum = in.checked_sum(down_sum_in, in.down, "down_sum");

  Tensor grad_x = in.none(), grad_gate_up = in.none(), grad_down = in.none();
  Tensor grad_gate_up_bias = in.none(), grad_down_bias = in.none();
  Tensor grad_weights = empty(sizes_of(weights), ScalarType::Float, in.x);
  if (in.nothing) {
    torch::stable::zero_(grad_weights);
    if (need_x) grad_x = zeros(sizes_of(in.x), in.type, in.x);
    if (need_gate_up && !gate_up_sum) grad_gate_up = in.no_weight_grad(in.first);
    if (need_down && !down_sum) grad_down = in.no_weight_grad(in.second);
    if (need_gate_up && in.gate_up_bias) {
      grad_gate_up_bias = zeros(sizes_of(in.gate_up_bias), in.type, in.x);
    }
    if (need_down && in.down_bias) {
      grad_down_bias = zeros(sizes_of(in.down_bias), in.type, in.x);
    }
    return {grad_x, grad_gate_up, grad_down, grad_gate_up_bias, grad_down_bias, grad_weights};
  }

  if (!pre) {
    pre = in.new_rows(in.columns);
    in.first_product(nullptr, *pre, Activation::none);
  }
  const Tensor grad_pre = in.new_rows(in.columns);
  OptionalTensor hidden = in.new_rows(in.width);
  {
    const int64_t parts = inner_parts(in.width);
    OptionalTensor inner;
    if (weights) inner = empty({parts, in.n_rows}, ScalarType::Float, in.x);
    HiddenBackwardParams p{in.experts,        in.counters.take(), in.dtype,
                           in.gathered(grad), in.hidden,          in.width};
    p.down = in.second.matrices;
    p.pre = pointer(*pre), p.activation = in.activation;
    p.weights = pointer<float>(in.weights);
    p.row_pair = in.plan.map.row_pair, p.n_pairs = in.plan.n_pairs();
    p.grad_pre = mutable_pointer(grad_pre), p.hidden = mutable_pointer(*hidden);
    p.inner = inner ? mutable_pointer<float>(*inner) : nullptr;
    SPARSEMOE_RUN_CUDA(hidden_backward, in.x, p);
    if (weights) {
      PairGradParams g{in.experts, in.dtype, p.inner, parts};
      g.row_pair = p.row_pair, g.n_pairs = p.n_pairs;
      g.down_bias = pointer(in.down_bias), g.grad = p.grad, g.h = in.hidden;
      g.grad_weights = mutable_pointer<float>(grad_weights);
      SPARSEMOE_RUN_CUDA(pair_grad, in.x, g);
    }
  }
  // What is not needed any more is given back before the next is made.
  pre.reset();
  if (need_down) {
    grad_down = in.weight_grad(in.gathered(grad), in.all(*hidden), in.hidden, in.width, in.second,
                               down_sum);
    if (in.down_bias) grad_down_bias = in.bias_grad(in.gathered(grad), in.hidden, in.weights);
  }
  hidden.reset();
  if (need_x) {
    grad_x =
        in.sum_of_products(grad_pre, in.first.matrices, std::nullopt, std::nullopt, kManyBytesBack);
  }
  if (need_gate_up) {
    grad_gate_up = in.weight_grad(in.all(grad_pre), in.gathered(in.x), in.columns, in.hidden,
                                  in.first, gate_up_sum);
    if (in.gate_up_bias) {
      grad_gate_up_bias = in.bias_grad(in.all(grad_pre), in.columns, std::nullopt);
    }
  }
  return {grad_x, grad_gate_up, grad_down, grad_gate_up_bias, grad_down_bias, grad_weights};
}

Tensor grouped_mm(const Tensor& a_in, const Tensor& b_in, const Tensor& offsets_in) {
  check_grouped_mm(a_in, b_in);
  const Tensor offsets =
      checked_offsets(offsets_in, b_in.size(0), a_in.size(0), a_in, "offsets", "a");
  const Tensor a = with_dense_rows(a_in);
  const DenseStack b(b_in);
  const int64_t n_experts = b_in.size(0), n_rows = a.size(0), k = a.size(1), n = b_in.size(2);
  Tensor y = empty({n_rows, n}, a.scalar_type(), a);
  if (y.numel() == 0) return y;
  if (k == 0 || n_experts == 0) {
    torch::stable::zero_(y);
    return y;
  }
  const int32_t* rows_of = pointer<int32_t>(offsets);
  Counters counters(n_rows, 1, a);
  RowsProductParams p{{rows_of, n_experts, n_rows},
                      counters.take(),
                      real_dtype(a, "a"),
                      {pointer(a), row_stride(a), n_rows, nullptr},
                      k,
                      n};
  p.b = b.matrices;
  p.activation = Activation::none;
  p.out = mutable_pointer(y), p.out_stride = n;
  SPARSEMOE_RUN_CUDA(rows_product, a, p);
  ClearTailParams tail{rows_of + n_experts, n_rows, n * int64_t(a.element_size()),
                       mutable_pointer(y)};
  SPARSEMOE_RUN_CUDA(clear_tail, a, tail);
  return y;
}

Tensor grouped_mm_backward_b(const Tensor& a_in, const Tensor& grad_in, const Tensor& offsets_in,
                             bool by_column) {
  check_grouped_mm_backward_b(a_in, grad_in, offsets_in);
  const int64_t n_experts = offsets_in.size(0) - 1, n_rows = a_in.size(0);
  const Tensor offsets = checked_offsets(offsets_in, n_experts, n_rows, a_in, "offsets", "a");
  const Tensor a = with_dense_rows(a_in), grad = with_dense_rows(grad_in);
  Rows left{pointer(a), row_stride(a), n_rows, nullptr};
  Rows right{pointer(grad), row_stride(grad), n_rows, nullptr};
  int64_t m = a.size(1), n = grad.size(1);
  if (by_column) std::swap(left, right), std::swap(m, n);
  Tensor out = empty({n_experts, m, n}, a.scalar_type(), a);
  Counters counters(n_rows, 1, a);
  WeightGradParams p{{pointer<int32_t>(offsets), n_experts, n_rows},
                     counters.take(),
                     real_dtype(a, "a"),
                     left,
                     right,
                     m,
                     n,
                     mutable_pointer(out),
                     false};
  SPARSEMOE_RUN_CUDA(weight_grad, a, p);
  return by_column ? torch::stable::transpose(out, 1, 2) : out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparsemoe, CUDA, m) {
  m.impl("experts", TORCH_BOX(&experts));
  m.impl("experts_backward", TORCH_BOX(&experts_backward));
  m.impl("grouped_mm", TORCH_BOX(&grouped_mm));
  m.impl("grouped_mm_backward_b", TORCH_BOX(&grouped_mm_backward_b));
}

}  // namespace sparsemoe
