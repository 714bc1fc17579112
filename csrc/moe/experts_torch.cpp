// The experts on the CPU, by torch's matrix products. A thread takes an expert, gathers its rows,
// and multiplies and activates them while they are in its cache.
#include <cstring>
#include <tuple>

#include "moe/activation.h"
#include "moe/combine.h"
#include "moe/expert_inputs.h"
#include "moe/products_torch.h"

namespace sparsemoe {
namespace {

// Rows of an expert that go through the forward pass together: enough for a product to be fast.
constexpr int64_t kBlockRows = 1024;

// Calls f(first, rows) for the blocks of n rows.
template <class F>
void for_each_block(int64_t n, F f) {
  const int64_t n_blocks = (n + kBlockRows - 1) / kBlockRows;
  const int64_t size = (n + n_blocks - 1) / n_blocks;
  for (int64_t first = 0; first < n; first += size) f(first, std::min(size, n - first));
}

Tensor sum_by_token(const Tensor& rows, const OptionalTensor& weights, const RowMap& map,
                    DType dtype) {
  Tensor y = empty({map.n_tokens, rows.size(1)}, rows.scalar_type(), rows);
  if (y.numel() > 0) {
    CombineParams p;
    p.map = map, p.width = rows.size(1), p.dtype = dtype;
    p.rows = pointer(rows), p.rows_stride = rows.size(1);
    p.weights = pointer(weights), p.y = mutable_pointer(y);
    combine_cpu(p);
  }
  return y;
}

// The inputs, and what both passes do with them.
struct Layer : ExpertInputs {
  using ExpertInputs::ExpertInputs;

  ScalarType type = x.scalar_type();
  int64_t item = int64_t(x.element_size());
  // By columns or by rows, as they came.
  Tensor first = with_dense_matrices(gate_up), second = with_dense_matrices(down);

  const int32_t* offsets() const { return pointer<int32_t>(plan.offsets); }
  Matrix gate_up_of(int64_t expert) const { return matrix_of(first, expert); }
  Matrix down_of(int64_t expert) const { return matrix_of(second, expert); }
  const void* bias_of(const OptionalTensor& bias, int64_t expert) const {
    return bias ? pointer<char>(*bias) + expert * bias->size(1) * item : nullptr;
  }

  Tensor none() const { return empty({0}, type, x); }
  Tensor new_rows(int64_t n_columns, bool wanted = true) const {
    return wanted ? empty({plan.map.n_rows, n_columns}, type, x) : none();
  }

  // Scratch memory for the left factor of a product, and for other rows.
  int64_t left_bytes(int64_t n_rows, int64_t n_columns) const {
    return Scratch::padded(n_rows * safe_stride(n_columns, type) * item);
  }
  Matrix take_left(Scratch& scratch, int64_t n_rows, int64_t n_columns) const {
    char* data = scratch.take(left_bytes(n_rows, n_columns));
    return {data, n_rows, n_columns, safe_stride(n_columns, type), 1, type, item};
  }
  Matrix take(Scratch& scratch, int64_t n_rows, int64_t n_columns) const {
    char* data = scratch.take(n_rows * n_columns * item);
    return {data, n_rows, n_columns, n_columns, 1, type, item};
  }

  // to[r] = data[row_token[row + r]], zero for a row without a token and past the columns.
  void gather(const Tensor& data, int64_t row, const Matrix& to) const {
    const int64_t bytes = to.columns * item, to_bytes = to.row_stride * item;
    const int64_t from_bytes = row_stride(data) * item;
    const char* from = pointer<char>(data);
    parallel_for(0, to.rows, grain_for(bytes), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        const int64_t token = uint32_t(plan.map.row_token[row + r]);
        const int64_t copied = token < plan.map.n_tokens ? bytes : 0;
        if (copied) std::memcpy(to.data + r * to_bytes, from + token * from_bytes, copied);
        std::memset(to.data + r * to_bytes + copied, 0, to_bytes - copied);
      }
    });
  }

  void add_bias(const OptionalTensor& bias, int64_t expert, const Matrix& rows) const {
    if (!bias) return;
    add_bias_cpu(
        {rows.rows, rows.columns, dtype, bias_of(bias, expert), rows.data, rows.row_stride});
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
  const Tensor rows = in.new_rows(in.hidden), pre = in.new_rows(in.columns, keep);
  for_each_expert(in.offsets(), in.n_experts, in.x, [&](const ExpertTask& task) {
    for_each_block(task.n, [&](int64_t skipped, int64_t n) {
      const int64_t first = task.first + skipped, e = task.expert;
      Scratch& scratch = task.scratch;
      scratch.reserve(in.left_bytes(n, in.hidden) + in.left_bytes(n, in.width) +
                      (keep ? 0 : Scratch::padded(n * in.columns * in.item)));
      const Matrix tokens = in.take_left(scratch, n, in.hidden);
      const Matrix hidden = in.take_left(scratch, n, in.width);
      const Matrix before =
          keep ? matrix_of(pre).some_rows(first, n) : in.take(scratch, n, in.columns);
      const Matrix after = matrix_of(rows).some_rows(first, n);
      in.gather(in.x, first, tokens);
      task.multiply(before, tokens, in.gate_up_of(e).transposed());
      activate_cpu({n, in.width, in.dtype, in.activation, in.bias_of(in.gate_up_bias, e),
                    before.data, hidden.data, hidden.row_stride});
      task.multiply(after, hidden, in.down_of(e).transposed());
      in.add_bias(in.down_bias, e, after);
    });
  });
  if (keep) clear_rows_past(pre, in.offsets()[in.n_experts]);
  return {sum_by_token(rows, in.weights, in.plan.map, in.dtype), pre};
}

class Backward {
 public:
  Backward(const Layer& in, const Tensor& grad, const Tensor& pre, bool need_x, bool need_gate_up,
           bool need_down, const OptionalTensor& gate_up_sum, const OptionalTensor& down_sum)
      : in_(in),
        grad_(in.checked_grad(grad)),
        pre_(in.checked_pre(pre)),
        need_x_(need_x),
        need_gate_up_(need_gate_up),
        need_down_(need_down),
        gate_up_sum_(in.checked_sum(gate_up_sum, in.gate_up, "gate_up_sum")),
        down_sum_(in.checked_sum(down_sum, in.down, "down_sum")),
        grad_rows_(in.new_rows(in.hidden, need_x)),
        grad_gate_up_(like(in.gate_up, need_gate_up && !gate_up_sum)),
        grad_down_(like(in.down, need_down && !down_sum)),
        grad_gate_up_bias_(like(in.gate_up_bias, need_gate_up)),
        grad_down_bias_(like(in.down_bias, need_down)),
        grad_weights_(empty(sizes_of(in.weights), accumulator_type(in.dtype), in.x)) {
    // Pairs without a row keep the zero.
    std::memset(mutable_pointer<char>(grad_weights_), 0, grad_weights_.numel() * real_);
  }

  std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> run() const {
    for_each_expert(in_.offsets(), in_.n_experts, in_.x,
                    [&](const ExpertTask& task) { run_expert(task); });
    const Tensor grad_x =
        need_x_ ? sum_by_token(grad_rows_, std::nullopt, in_.plan.map, in_.dtype) : grad_rows_;
    return {grad_x, grad_gate_up_, grad_down_, grad_gate_up_bias_, grad_down_bias_, grad_weights_};
  }

 private:
  static std::vector<int64_t> sizes_of(const OptionalTensor& tensor) {
    if (!tensor) return {0};
    return {tensor->sizes().begin(), tensor->sizes().end()};
  }

  // A gradient: [0] where it is not wanted, zero for experts without rows.
  Tensor like(const OptionalTensor& argument, bool wanted) const {
    if (!argument || !wanted) return in_.none();
    const Tensor grad = empty(sizes_of(argument), in_.type, in_.x);
    clear_unused_experts(grad, in_.offsets());
    return grad;
  }

  void run_expert(const ExpertTask& task) const {
    const Layer& in = in_;
    const int64_t e = task.expert, n = task.n;
    Scratch& scratch = task.scratch;
    const int64_t sum_size = std::max(gate_up_sum_ ? in.columns : 0, down_sum_ ? in.width : 0);
    scratch.reserve(in.left_bytes(n, in.hidden) + in.left_bytes(n, in.columns) +
                    Scratch::padded(n * in.width * in.item) +
                    Scratch::padded(sum_size * in.hidden * in.item) +
                    2 * Scratch::padded(n * real_));
    const Matrix tokens = in.take_left(scratch, n, in.hidden);
    const Matrix grad_pre = in.take_left(scratch, n, in.columns);
    const Matrix hidden = in.take(scratch, n, in.width);
    char* space = scratch.take(sum_size * in.hidden * in.item);
    char* weight = in.weights ? scratch.take(n * real_) : nullptr;
    char* inner = in.weights ? scratch.take(n * real_) : nullptr;

    Matrix pre = grad_pre;
    if (pre_) {
      pre = matrix_of(*pre_).some_rows(task.first, n);
    } else {
      in.gather(in.x, task.first, tokens);
      for_each_block(n, [&](int64_t first, int64_t count) {
        task.multiply(pre.some_rows(first, count), tokens.some_rows(first, count),
                      in.gate_up_of(e).transposed());
      });
      in.add_bias(in.gate_up_bias, e, pre);
    }

    if (weight)
      in.dtype == DType::f64 ? load_weights<double>(task, weight)
                             : load_weights<float>(task, weight);
    in.gather(grad_, task.first, tokens);
    task.multiply(hidden, tokens, in.down_of(e));
    activate_backward_cpu({n, in.width, in.dtype, in.activation, pre.data, pre.row_stride, weight,
                           hidden.data, grad_pre.data, grad_pre.row_stride, inner});
    if (need_down_) add_outer(task, tokens, hidden, grad_down_, down_sum_, space);
    if (in.down_bias) {
      char* sum = need_down_ ? row_of(grad_down_bias_, e) : nullptr;
      const void* bias = inner ? in.bias_of(in.down_bias, e) : nullptr;
      sum_rows_cpu(
          {n, in.hidden, in.dtype, tokens.data, tokens.row_stride, weight, sum, bias, inner});
    }
    if (inner)
      in.dtype == DType::f64 ? store_inner<double>(task, inner) : store_inner<float>(task, inner);

    if (need_gate_up_) {
      in.gather(in.x, task.first, tokens);
      add_outer(task, grad_pre, tokens, grad_gate_up_, gate_up_sum_, space);
      if (in.gate_up_bias) {
        sum_rows_cpu({n, in.columns, in.dtype, grad_pre.data, grad_pre.row_stride, nullptr,
                      row_of(grad_gate_up_bias_, e), nullptr, nullptr});
      }
    }
    if (need_x_) {
      task.multiply(matrix_of(grad_rows_).some_rows(task.first, n), grad_pre, in.gate_up_of(e));
    }
  }

  // out[e] = a^T @ b, or sum[e] += that: `space` holds it on its way there.
  void add_outer(const ExpertTask& task, const Matrix& a, const Matrix& b, const Tensor& out,
                 const OptionalTensor& sum, char* space) const {
    const int64_t size = a.columns * b.columns, first = task.expert * size;
    char* to = sum ? space : mutable_pointer<char>(out) + first * in_.item;
    task.multiply({to, a.columns, b.columns, b.columns, 1, in_.type, in_.item}, a.transposed(), b);
    if (sum) add_to_cpu({size, in_.dtype, to, mutable_pointer<float>(*sum) + first});
  }

  char* row_of(const Tensor& rows, int64_t row) const {
    return mutable_pointer<char>(rows) + row * rows.size(1) * in_.item;
  }

  // Of the task's rows. A row without a pair has weight zero.
  template <class Real>
  void load_weights(const ExpertTask& task, void* weights) const {
    for (int64_t r = 0; r < task.n; ++r) {
      const int64_t pair = uint32_t(in_.plan.map.row_pair[task.first + r]);
      const bool known = pair < in_.plan.n_pairs();
      static_cast<Real*>(weights)[r] = known ? pointer<Real>(in_.weights)[pair] : Real(0);
    }
  }
  template <class Real>
  void store_inner(const ExpertTask& task, const void* inner) const {
    for (int64_t r = 0; r < task.n; ++r) {
      const int64_t pair = uint32_t(in_.plan.map.row_pair[task.first + r]);
      if (pair >= in_.plan.n_pairs()) continue;
      mutable_pointer<Real>(grad_weights_)[pair] = static_cast<const Real*>(inner)[r];
    }
  }

  const Layer& in_;
  Tensor grad_;
  OptionalTensor pre_;
  bool need_x_, need_gate_up_, need_down_;
  OptionalTensor gate_up_sum_, down_sum_;
  Tensor grad_rows_, grad_gate_up_, grad_down_, grad_gate_up_bias_, grad_down_bias_, grad_weights_;
  int64_t real_ = in_.dtype == DType::f64 ? 8 : 4;
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> experts_backward(
    const Tensor& grad, const Tensor& x, const Tensor& gate_up, const Tensor& down,
    const OptionalTensor& gate_up_bias, const OptionalTensor& down_bias,
    const OptionalTensor& weights, const Tensor& offsets, const Tensor& row_token,
    const Tensor& row_pair, const Tensor& token_rows, const OptionalTensor& token_offsets,
    std::string activation, const Tensor& pre, bool need_x, bool need_gate_up, bool need_down,
    const OptionalTensor& gate_up_sum, const OptionalTensor& down_sum) {
  const Layer in(x, gate_up, down, gate_up_bias, down_bias, weights, offsets, row_token, row_pair,
                 token_rows, token_offsets, activation);
  return Backward(in, grad, pre, need_x, need_gate_up, need_down, gate_up_sum, down_sum).run();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparsemoe, CPU, m) {
  m.impl("experts", TORCH_BOX(&experts));
  m.impl("experts_backward", TORCH_BOX(&experts_backward));
}

}  // namespace sparsemoe
