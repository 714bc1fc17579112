#include "sinkhorn/sinkhorn.h"

#include <cmath>
#include <tuple>

#include "common/tensor.h"

namespace sparsemoe {
namespace {

constexpr char kLogits[] = "[..., tokens, experts]";

// The sizes of `tensor` but for its last `last` dimensions, and then those of `more`.
std::vector<int64_t> leading_sizes(const Tensor& tensor, int64_t last,
                                   const std::vector<int64_t>& more = {}) {
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i + last < tensor.dim(); ++i) sizes.push_back(tensor.size(i));
  sizes.insert(sizes.end(), more.begin(), more.end());
  return sizes;
}

int64_t product(const std::vector<int64_t>& sizes) {
  int64_t all = 1;
  for (const int64_t size : sizes) all *= size;
  return all;
}

// The inputs, checked.
struct Problems {
  DType dtype;
  Tensor logits;
  OptionalTensor row_marginals, col_marginals, mask;
  SinkhornProblems fields;

  Problems(const Tensor& logits_in, int64_t n_iters, std::optional<double> tolerance,
           double temperature, const OptionalTensor& rows_in, const OptionalTensor& columns_in,
           const OptionalTensor& mask_in)
      : dtype(real_dtype(logits_in, "logits")) {
    SPARSEMOE_CHECK(logits_in.dim() >= 2, "logits must have shape ", kLogits, ", got ",
                    shape_text(logits_in));
    const int64_t n_rows = logits_in.size(logits_in.dim() - 2);
    const int64_t n_columns = logits_in.size(logits_in.dim() - 1);
    SPARSEMOE_CHECK(n_columns >= 1 && n_columns <= kMaxColumns, "logits must have 1 to ",
                    kMaxColumns, " experts, got shape ", shape_text(logits_in));
    SPARSEMOE_CHECK(n_iters >= 1, "n_iters must be 1 or more, got ", n_iters);
    SPARSEMOE_CHECK(!tolerance || (std::isfinite(*tolerance) && *tolerance >= 0),
                    "tolerance must be None or finite and 0 or more, got ", tolerance.value_or(0));
    SPARSEMOE_CHECK(std::isfinite(temperature) && temperature > 0,
                    "temperature must be finite and above 0, got ", temperature);
    const ScalarType real = accumulator_type(dtype);
    const auto of_rows = leading_sizes(logits_in, 2, {n_rows});
    row_marginals = vector(rows_in, logits_in, of_rows, real, "row_marginals", "[..., tokens]");
    col_marginals = vector(columns_in, logits_in, leading_sizes(logits_in, 2, {n_columns}), real,
                           "col_marginals", "[..., experts]");
    mask = vector(mask_in, logits_in, of_rows, ScalarType::Bool, "mask", "[..., tokens]");
    logits = as_contiguous(logits_in);
    fields.n_problems = product(leading_sizes(logits, 2));
    fields.n_rows = n_rows, fields.n_columns = n_columns;
    fields.logits = pointer(logits), fields.dtype = dtype;
    fields.temperature = temperature, fields.n_iters = n_iters;
    fields.tolerance = tolerance.value_or(-1);
    fields.row_marginals = pointer(row_marginals);
    fields.col_marginals = pointer(col_marginals);
    fields.mask = pointer<bool>(mask);
  }

  static OptionalTensor vector(const OptionalTensor& tensor, const Tensor& logits,
                               const std::vector<int64_t>& sizes, ScalarType type, const char* name,
                               const char* shape) {
    if (!tensor) return std::nullopt;
    check_dim(*tensor, int64_t(sizes.size()), name, shape);
    for (size_t i = 0; i < sizes.size(); ++i) check_size(*tensor, i, sizes[i], name, shape);
    check_type(*tensor, type, name);
    check_device(*tensor, logits, name, "logits");
    return as_contiguous(*tensor);
  }

  bool gradient_needs_history() const {
    if (logits.is_cuda()) return sinkhorn_backward_needs_history(fields);
    return fields.n_rows > kSmallSize || fields.n_columns > kSmallSize;
  }
};

struct Outputs {
  Tensor plan, log_u, log_v, error, state, history;

  Outputs(const Problems& of, bool keep, bool measure) {
    const Tensor& like = of.logits;
    const ScalarType real = accumulator_type(of.dtype);
    const std::vector<int64_t> none = {0};
    plan = empty(leading_sizes(like, 0), real, like);
    log_u = empty(measure ? leading_sizes(like, 1) : none, real, like);
    log_v = empty(measure ? leading_sizes(like, 2, {of.fields.n_columns}) : none, real, like);
    error = empty(measure ? leading_sizes(like, 2) : none, real, like);
    state = empty(leading_sizes(like, 2, {2}), ScalarType::Int, like);
    history = empty(keep ? leading_sizes(like, 2, {of.fields.n_iters, of.fields.n_columns}) : none,
                    ScalarType::Double, like);
  }
};

Outputs balance(const Problems& of, bool keep, bool measure) {
  Outputs out(of, keep, measure);
  if (of.fields.n_rows == 0) {
    for (Tensor* zeros : {&out.log_v, &out.error, &out.history}) torch::stable::zero_(*zeros);
    torch::stable::fill_(out.state, of.fields.tolerance < 0 ? double(of.fields.n_iters) : 0);
  } else if (of.fields.n_problems > 0) {
    const Tensor space =
        workspace(of.logits.is_cuda() ? sinkhorn_workspace_bytes(of.fields) : 0, of.logits);
    SinkhornParams p;
    p.in = of.fields, p.measures = measure;
    p.plan = mutable_pointer(out.plan);
    p.log_u = measure ? mutable_pointer(out.log_u) : nullptr;
    p.log_v = measure ? mutable_pointer(out.log_v) : nullptr;
    p.error = measure ? mutable_pointer(out.error) : nullptr;
    p.state = mutable_pointer<int32_t>(out.state);
    p.history = keep ? mutable_pointer<double>(out.history) : nullptr;
    p.workspace = mutable_pointer(space);
    SPARSEMOE_RUN(sinkhorn, of.logits, p);
  }
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> sinkhorn(
    const Tensor& logits, int64_t n_iters, std::optional<double> tolerance, double temperature,
    const OptionalTensor& row_marginals, const OptionalTensor& col_marginals,
    const OptionalTensor& mask, bool keep, bool measure) {
  const Problems problems(logits, n_iters, tolerance, temperature, row_marginals, col_marginals,
                          mask);
  const Outputs out = balance(problems, keep, measure);
  return {out.plan, out.log_u, out.log_v, out.error, out.state, out.history};
}

Tensor sinkhorn_backward(const Tensor& grad_in, const Tensor& logits, int64_t n_iters,
                         std::optional<double> tolerance, double temperature,
                         const OptionalTensor& row_marginals, const OptionalTensor& col_marginals,
                         const OptionalTensor& mask, const Tensor& state_in,
                         const Tensor& history_in) {
  const Problems problems(logits, n_iters, tolerance, temperature, row_marginals, col_marginals,
                          mask);
  check_type(grad_in, accumulator_type(problems.dtype), "grad");
  check_device(grad_in, logits, "grad", "logits");
  SPARSEMOE_CHECK(leading_sizes(grad_in, 0) == leading_sizes(logits, 0),
                  "grad must have the logits' shape ", shape_text(logits), ", got ",
                  shape_text(grad_in));
  SPARSEMOE_CHECK(state_in.numel() == 2 * problems.fields.n_problems,
                  "state must have shape [..., 2], got ", shape_text(state_in));
  const bool kept = history_in.numel() > 0;
  SPARSEMOE_CHECK(!kept || history_in.numel() ==
                               problems.fields.n_problems * n_iters * problems.fields.n_columns,
                  "history must have shape [..., n_iters, experts] or [0], got ",
                  shape_text(history_in));
  check_type(history_in, ScalarType::Double, "history");
  check_device(history_in, logits, "history", "logits");
  const Tensor grad = as_contiguous(grad_in);
  const Tensor grad_logits =
      empty(leading_sizes(logits, 0), problems.logits.scalar_type(), problems.logits);
  if (grad_logits.numel() > 0) {
    Tensor state = int32_input(state_in, logits, "state", "logits");
    Tensor history = as_contiguous(history_in);
    if (!kept && problems.gradient_needs_history()) {
      const Outputs again = balance(problems, true, false);
      state = again.state, history = again.history;
    }
    const Tensor space = workspace(
        logits.is_cuda() ? sinkhorn_backward_workspace_bytes(problems.fields) : 0, logits);
    SinkhornBackwardParams p;
    p.in = problems.fields, p.grad = pointer(grad), p.state = pointer<int32_t>(state);
    p.history = history.numel() > 0 ? pointer<double>(history) : nullptr;
    p.grad_logits = mutable_pointer(grad_logits), p.workspace = mutable_pointer(space);
    SPARSEMOE_RUN(sinkhorn_backward, logits, p);
  }
  return grad_logits;
}

}  // namespace

#ifndef USE_CUDA
bool sinkhorn_backward_needs_history(const SinkhornProblems&) { return true; }
int64_t sinkhorn_workspace_bytes(const SinkhornProblems&) { return 0; }
int64_t sinkhorn_backward_workspace_bytes(const SinkhornProblems&) { return 0; }
#endif

STABLE_TORCH_LIBRARY_IMPL(sparsemoe, CPU, m) {
  m.impl("sinkhorn", TORCH_BOX(&sinkhorn));
  m.impl("sinkhorn_backward", TORCH_BOX(&sinkhorn_backward));
}
STABLE_TORCH_LIBRARY_IMPL(sparsemoe, CUDA, m) {
  m.impl("sinkhorn", TORCH_BOX(&sinkhorn));
  m.impl("sinkhorn_backward", TORCH_BOX(&sinkhorn_backward));
}

}  // namespace sparsemoe
