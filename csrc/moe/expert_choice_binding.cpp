#include "moe/expert_choice.h"

#include <tuple>

#include "common/tensor.h"
#include "moe/gate.h"

namespace sparsemoe {
namespace {

void check_logits(const Tensor& logits) {
  check_dim(logits, 2, "logits", "[tokens, experts]");
  SPARSEMOE_CHECK(logits.size(1) >= 1 && logits.size(1) <= kMaxExperts, "logits must have 1 to ",
                  kMaxExperts, " experts, got shape ", shape_text(logits));
  SPARSEMOE_CHECK(logits.size(0) < INT32_MAX, "logits must have fewer than 2^31 tokens, got ",
                  logits.size(0));
}

std::tuple<Tensor, Tensor, Tensor> expert_choice(const Tensor& logits_in, int64_t capacity,
                                                 int64_t n_groups, const OptionalTensor& mask_in) {
  check_logits(logits_in);
  const DType dtype = real_dtype(logits_in, "logits");
  const int64_t n_tokens = logits_in.size(0), n_experts = logits_in.size(1);
  SPARSEMOE_CHECK(n_groups >= 1 && n_tokens % n_groups == 0, "n_groups must divide the ", n_tokens,
                  " tokens, got ", n_groups);
  SPARSEMOE_CHECK(capacity >= 0 && capacity <= n_tokens / n_groups,
                  "capacity must be from 0 to the ", n_tokens / n_groups,
                  " tokens of a group, got ", capacity);
  SPARSEMOE_CHECK(capacity * n_groups * n_experts < INT32_MAX,
                  "capacity must give fewer than 2^31 rows in all, got ", capacity);
  const auto mask =
      checked(mask_in, logits_in, "logits", ScalarType::Bool, n_tokens, "mask", "[tokens]");
  const Tensor logits = with_dense_rows(logits_in);
  const ScalarType real = accumulator_type(dtype);
  Tensor weights = empty({n_experts, n_groups * capacity}, real, logits);
  Tensor tokens = empty({n_experts, n_groups * capacity}, ScalarType::Int, logits);
  Tensor threshold = empty({n_groups, n_experts}, real, logits);
  const Tensor space = workspace(expert_choice_workspace_bytes(n_tokens, n_experts, dtype), logits);
  ExpertChoiceParams p;
  p.n_tokens = n_tokens, p.n_experts = n_experts, p.n_groups = n_groups, p.capacity = capacity;
  p.logits = pointer(logits), p.logits_stride = row_stride(logits), p.dtype = dtype;
  p.mask = pointer<bool>(mask);
  p.weights = mutable_pointer(weights), p.tokens = mutable_pointer<int32_t>(tokens);
  p.threshold = mutable_pointer(threshold), p.workspace = mutable_pointer(space);
  SPARSEMOE_RUN(expert_choice, logits, p);
  return {weights, tokens, threshold};
}

Tensor expert_choice_backward(const Tensor& grad_weights_in, const Tensor& logits_in,
                              const Tensor& tokens_in) {
  check_logits(logits_in);
  const DType dtype = real_dtype(logits_in, "logits");
  const Tensor logits = with_dense_rows(logits_in);
  const Tensor tokens = int32_input(tokens_in, logits, "tokens", "logits");
  const Tensor grad_weights = as_contiguous(grad_weights_in);
  check_type(grad_weights, accumulator_type(dtype), "grad_weights");
  const int64_t n_tokens = logits.size(0), n_experts = logits.size(1);
  Tensor grad_logits = empty({n_tokens, n_experts}, logits.scalar_type(), logits);
  if (n_tokens > 0) {
    const Tensor space =
        workspace(expert_choice_workspace_bytes(n_tokens, n_experts, dtype), logits);
    ExpertChoiceBackwardParams p;
    p.n_tokens = n_tokens, p.n_experts = n_experts, p.n_chosen = tokens.size(1);
    p.logits = pointer(logits), p.logits_stride = row_stride(logits), p.dtype = dtype;
    p.grad_weights = pointer(grad_weights), p.tokens = pointer<int32_t>(tokens);
    p.grad_logits = mutable_pointer(grad_logits), p.workspace = mutable_pointer(space);
    SPARSEMOE_RUN(expert_choice_backward, logits, p);
  }
  return grad_logits;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparsemoe, CPU, m) {
  m.impl("expert_choice", TORCH_BOX(&expert_choice));
  m.impl("expert_choice_backward", TORCH_BOX(&expert_choice_backward));
}
STABLE_TORCH_LIBRARY_IMPL(sparsemoe, CUDA, m) {
  m.impl("expert_choice", TORCH_BOX(&expert_choice));
  m.impl("expert_choice_backward", TORCH_BOX(&expert_choice_backward));
}

}  // namespace sparsemoe
