// grouped_mm on the CPU, by torch's matrix products.
#include <cstring>

#include "moe/expert_inputs.h"
#include "moe/products_torch.h"

namespace sparsemoe {
namespace {

// The task's rows of a, in a copy where they may not be the left factor of a product as they are.
Matrix left_factor(const Tensor& a, const ExpertTask& task) {
  const Matrix rows = matrix_of(a).some_rows(task.first, task.n);
  const int64_t stride = safe_stride(rows.columns, rows.type);
  if (stride == rows.columns) return rows;
  task.scratch.reserve(task.n * stride * rows.item);
  char* to = task.scratch.take(task.n * stride * rows.item);
  const int64_t bytes = rows.columns * rows.item, to_bytes = stride * rows.item;
  parallel_for(0, task.n, grain_for(bytes), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      std::memcpy(to + r * to_bytes, rows.data + r * rows.row_stride * rows.item, bytes);
      std::memset(to + r * to_bytes + bytes, 0, to_bytes - bytes);
    }
  });
  return {to, task.n, rows.columns, stride, 1, rows.type, rows.item};
}

Tensor grouped_mm(const Tensor& a_in, const Tensor& b_in, const Tensor& offsets_in) {
  check_grouped_mm(a_in, b_in);
  const int64_t n_experts = b_in.size(0), n_rows = a_in.size(0);
  const Tensor offsets = checked_offsets(offsets_in, n_experts, n_rows, a_in, "offsets", "a");
  const Tensor a = with_dense_rows(a_in), b = with_dense_matrices(b_in);
  const Tensor y = empty({n_rows, b.size(2)}, a.scalar_type(), a);
  const int32_t* bounds = pointer<int32_t>(offsets);
  for_each_expert(bounds, n_experts, a, [&](const ExpertTask& task) {
    task.multiply(matrix_of(y).some_rows(task.first, task.n), left_factor(a, task),
                  matrix_of(b, task.expert));
  });
  clear_rows_past(y, bounds[n_experts]);
  return y;
}

Tensor grouped_mm_backward_b(const Tensor& a_in, const Tensor& grad_in, const Tensor& offsets_in,
                             bool by_column) {
  check_grouped_mm_backward_b(a_in, grad_in, offsets_in);
  const int64_t n_experts = offsets_in.size(0) - 1, n_rows = a_in.size(0);
  const Tensor offsets = checked_offsets(offsets_in, n_experts, n_rows, a_in, "offsets", "a");
  const Tensor a = with_dense_rows(a_in), grad = with_dense_rows(grad_in);
  const Tensor& left = by_column ? grad : a;
  const Tensor& right = by_column ? a : grad;
  const Tensor out = empty({n_experts, left.size(1), right.size(1)}, a.scalar_type(), a);
  const int32_t* bounds = pointer<int32_t>(offsets);
  clear_unused_experts(out, bounds);
  for_each_expert(bounds, n_experts, a, [&](const ExpertTask& task) {
    task.multiply(matrix_of(out, task.expert),
                  matrix_of(left).some_rows(task.first, task.n).transposed(),
                  matrix_of(right).some_rows(task.first, task.n));
  });
  return by_column ? torch::stable::transpose(out, 1, 2) : out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparsemoe, CPU, m) {
  m.impl("grouped_mm", TORCH_BOX(&grouped_mm));
  m.impl("grouped_mm_backward_b", TORCH_BOX(&grouped_mm_backward_b));
}

}  // namespace sparsemoe
