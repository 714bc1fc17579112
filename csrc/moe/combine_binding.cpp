// dispatch, combine and the gradient of combine: the ops that move rows by a plan.
#include "moe/combine.h"

#include <tuple>

#include "moe/plan_tensors.h"

namespace sparsemoe {
namespace {

constexpr char kRows[] = "[rows, width]";

Tensor checked_weights(const Tensor& weights, const PlanTensors& plan, DType dtype,
                       const Tensor& rows) {
  check_type(weights, accumulator_type(dtype), "weights");
  check_device(weights, rows, "weights", "rows");
  SPARSEMOE_CHECK(weights.numel() == plan.n_pairs(), "weights must hold one value for each of the ",
                  plan.n_pairs(), " pairs of the plan, got shape ", shape_text(weights));
  return as_contiguous(weights);
}

Tensor dispatch(const Tensor& x_in, const Tensor& row_token, const Tensor& row_pair,
                const Tensor& token_rows, const OptionalTensor& token_offsets) {
  check_dim(x_in, 2, "x", "[tokens, width]");
  real_dtype(x_in, "x");
  SPARSEMOE_CHECK(x_in.size(1) < int64_t(1) << 31, "x must be less than 2^31 wide, got shape ",
                  shape_text(x_in));
  const PlanTensors plan(row_token, row_pair, token_rows, token_offsets, x_in, "x");
  check_size(x_in, 0, plan.map.n_tokens, "x", "[tokens, width]");
  const Tensor x = with_dense_rows(x_in);
  Tensor rows = empty({plan.map.n_rows, x.size(1)}, x.scalar_type(), x);
  if (rows.numel() > 0) {
    const int64_t bytes = int64_t(x.element_size());
    DispatchParams p;
    p.map = plan.map;
    p.x = pointer(x), p.row_bytes = x.size(1) * bytes, p.x_stride_bytes = row_stride(x) * bytes;
    p.rows = mutable_pointer(rows);
    SPARSEMOE_RUN(dispatch, x, p);
  }
  return rows;
}

Tensor combine(const Tensor& rows_in, const OptionalTensor& weights_in, const Tensor& row_token,
               const Tensor& row_pair, const Tensor& token_rows,
               const OptionalTensor& token_offsets) {
  check_dim(rows_in, 2, "rows", kRows);
  const DType dtype = real_dtype(rows_in, "rows");
  const PlanTensors plan(row_token, row_pair, token_rows, token_offsets, rows_in, "rows");
  check_size(rows_in, 0, plan.map.n_rows, "rows", kRows);
  OptionalTensor weights;
  if (weights_in) weights = checked_weights(*weights_in, plan, dtype, rows_in);
  const Tensor rows = with_dense_rows(rows_in);
  Tensor y = empty({plan.map.n_tokens, rows.size(1)}, rows.scalar_type(), rows);
  if (y.numel() > 0) {
    CombineParams p;
    p.map = plan.map, p.width = rows.size(1), p.dtype = dtype;
    p.rows = pointer(rows), p.rows_stride = row_stride(rows);
    p.weights = pointer(weights), p.y = mutable_pointer(y);
    SPARSEMOE_RUN(combine, rows, p);
  }
  return y;
}

std::tuple<Tensor, Tensor> combine_backward(const Tensor& grad_in, const Tensor& rows_in,
                                            const Tensor& weights_in, const Tensor& row_token,
                                            const Tensor& row_pair, const Tensor& token_rows,
                                            const OptionalTensor& token_offsets) {
  check_dim(rows_in, 2, "rows", kRows);
  check_dim(grad_in, 2, "grad", "[tokens, width]");
  const DType dtype = real_dtype(rows_in, "rows");
  const PlanTensors plan(row_token, row_pair, token_rows, token_offsets, rows_in, "rows");
  check_size(rows_in, 0, plan.map.n_rows, "rows", kRows);
  check_size(grad_in, 0, plan.map.n_tokens, "grad", "[tokens, width]");
  check_size(grad_in, 1, rows_in.size(1), "grad", "[tokens, width]");
  check_type(grad_in, rows_in.scalar_type(), "grad");
  check_device(grad_in, rows_in, "grad", "rows");
  const Tensor weights = checked_weights(weights_in, plan, dtype, rows_in);
  const Tensor rows = with_dense_rows(rows_in), grad = with_dense_rows(grad_in);
  Tensor grad_rows = empty({plan.map.n_rows, rows.size(1)}, rows.scalar_type(), rows);
  std::vector<int64_t> sizes(weights_in.sizes().begin(), weights_in.sizes().end());
  Tensor grad_weights = empty(sizes, weights.scalar_type(), rows);
  if (rows.numel() == 0 || plan.map.n_tokens == 0) {
    torch::stable::zero_(grad_rows);
    torch::stable::zero_(grad_weights);
    return {grad_rows, grad_weights};
  }
  CombineBackwardParams p;
  p.map = plan.map, p.width = rows.size(1), p.dtype = dtype;
  p.grad = pointer(grad), p.grad_stride = row_stride(grad);
  p.rows = pointer(rows), p.rows_stride = row_stride(rows);
  p.weights = pointer(weights), p.n_pairs = plan.n_pairs();
  p.grad_rows = mutable_pointer(grad_rows), p.grad_weights = mutable_pointer(grad_weights);
  SPARSEMOE_RUN(combine_backward, rows, p);
  return {grad_rows, grad_weights};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparsemoe, CPU, m) {
  m.impl("dispatch", TORCH_BOX(&dispatch));
  m.impl("combine", TORCH_BOX(&combine));
  m.impl("combine_backward", TORCH_BOX(&combine_backward));
}
STABLE_TORCH_LIBRARY_IMPL(sparsemoe, CUDA, m) {
  m.impl("dispatch", TORCH_BOX(&dispatch));
  m.impl("combine", TORCH_BOX(&combine));
  m.impl("combine_backward", TORCH_BOX(&combine_backward));
}

}  // namespace sparsemoe
