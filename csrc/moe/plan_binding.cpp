#include "moe/plan.h"

#include <algorithm>
#include <tuple>

#include "common/tensor.h"
#include "moe/gate.h"

namespace sparsemoe {
namespace {

// On the CPU a wrong index is refused; on a GPU, where looking would stall, it is left without row.
void check_indices(const Tensor& indices, int64_t end, const char* name) {
  if (indices.is_cuda()) return;
  const int32_t* values = pointer<int32_t>(indices);
  const int64_t n = indices.numel();
  bool valid = true;
  for (int64_t i = 0; i < n; ++i) valid &= values[i] >= -1 && values[i] < end;
  if (valid) return;
  const int32_t* bad =
      std::find_if(values, values + n, [=](int32_t v) { return v < -1 || v >= end; });
  SPARSEMOE_CHECK(false, name, " must hold indices from 0 to ", end - 1, ", or -1 for none, got ",
                  *bad, " at [", (bad - values) / indices.size(1), ", ",
                  (bad - values) % indices.size(1), "]");
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> plan(const Tensor& experts_in,
                                                        int64_t num_experts,
                                                        std::optional<int64_t> capacity,
                                                        const OptionalTensor& weights_in) {
  check_dim(experts_in, 2, "experts", "[tokens, top_k]");
  const Tensor experts = int32_input(experts_in, experts_in, "experts", "experts");
  SPARSEMOE_CHECK(num_experts >= 1 && num_experts <= kMaxExperts, "num_experts must be from 1 to ",
                  kMaxExperts, ", got ", num_experts);
  SPARSEMOE_CHECK(!capacity || *capacity >= 0, "capacity must be 0 or more, got ", *capacity);
  const int64_t n_tokens = experts.size(0), top_k = experts.size(1), n_pairs = n_tokens * top_k;
  SPARSEMOE_CHECK(n_pairs < INT32_MAX, "experts must hold fewer than 2^31 entries, got shape ",
                  shape_text(experts));
  OptionalTensor weights;
  if (weights_in) {
    SPARSEMOE_CHECK(capacity, "weights must come with a capacity: they say which pairs to drop");
    check_dim(*weights_in, 2, "weights", "[tokens, top_k]");
    check_size(*weights_in, 0, n_tokens, "weights", "[tokens, top_k]");
    check_size(*weights_in, 1, top_k, "weights", "[tokens, top_k]");
    check_type(*weights_in, ScalarType::Float, "weights");
    check_device(*weights_in, experts, "weights", "experts");
    weights = as_contiguous(*weights_in);
  }
  check_indices(experts, num_experts, "experts");
  // An expert can receive no more than all pairs.
  const int64_t rows_each = capacity ? std::min(*capacity, n_pairs) : -1;
  const int64_t n_rows = capacity ? std::min(n_pairs, num_experts * rows_each) : n_pairs;

  Tensor offsets = empty({num_experts + 1}, ScalarType::Int, experts);
  Tensor counts = empty({num_experts}, ScalarType::Int, experts);
  Tensor row_token = empty({n_rows}, ScalarType::Int, experts);
  Tensor row_pair = empty({n_rows}, ScalarType::Int, experts);
  Tensor token_rows = empty({n_tokens, top_k}, ScalarType::Int, experts);
  PlanParams p;
  p.n_tokens = n_tokens, p.top_k = top_k, p.n_experts = num_experts;
  p.experts = pointer<int32_t>(experts), p.capacity = rows_each;
  p.weights = pointer<float>(weights), p.n_rows = n_rows;
  p.offsets = mutable_pointer<int32_t>(offsets), p.counts = mutable_pointer<int32_t>(counts);
  p.row_token = mutable_pointer<int32_t>(row_token);
  p.row_pair = mutable_pointer<int32_t>(row_pair);
  p.token_rows = mutable_pointer<int32_t>(token_rows);
  const Tensor space = workspace(plan_workspace_bytes(p), experts);
  p.workspace = mutable_pointer(space);
  SPARSEMOE_RUN(plan, experts, p);
  return {offsets, counts, row_token, row_pair, token_rows};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> plan_from_tokens(const Tensor& tokens_in,
                                                                            int64_t num_tokens) {
  check_dim(tokens_in, 2, "tokens", "[experts, rows of each]");
  const Tensor tokens = int32_input(tokens_in, tokens_in, "tokens", "tokens");
  const int64_t n_experts = tokens.size(0), n_rows = tokens.numel();
  SPARSEMOE_CHECK(n_experts >= 1, "tokens must have at least one expert, got shape ",
                  shape_text(tokens));
  SPARSEMOE_CHECK(num_tokens >= 0 && num_tokens < INT32_MAX && n_rows < INT32_MAX,
                  "num_tokens and the rows must number fewer than 2^31, got ", num_tokens, " and ",
                  n_rows);
  check_indices(tokens, num_tokens, "tokens");
  Tensor offsets = empty({n_experts + 1}, ScalarType::Int, tokens);
  Tensor counts = empty({n_experts}, ScalarType::Int, tokens);
  Tensor row_token = empty({n_rows}, ScalarType::Int, tokens);
  Tensor row_pair = empty({n_rows}, ScalarType::Int, tokens);
  Tensor token_rows = empty({n_rows}, ScalarType::Int, tokens);
  Tensor token_offsets = empty({num_tokens + 1}, ScalarType::Int, tokens);
  const Tensor space = workspace(4 * num_tokens, tokens);
  TokenPlanParams p;
  p.n_tokens = num_tokens, p.n_experts = n_experts, p.per_expert = tokens.size(1);
  p.tokens = pointer<int32_t>(tokens);
  p.offsets = mutable_pointer<int32_t>(offsets), p.counts = mutable_pointer<int32_t>(counts);
  p.row_token = mutable_pointer<int32_t>(row_token);
  p.row_pair = mutable_pointer<int32_t>(row_pair);
  p.token_rows = mutable_pointer<int32_t>(token_rows);
  p.token_offsets = mutable_pointer<int32_t>(token_offsets);
  p.workspace = mutable_pointer<int32_t>(space);
  SPARSEMOE_RUN(plan_from_tokens, tokens, p);
  return {offsets, counts, row_token, row_pair, token_rows, token_offsets};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparsemoe, CPU, m) {
  m.impl("plan", TORCH_BOX(&plan));
  m.impl("plan_from_tokens", TORCH_BOX(&plan_from_tokens));
}
STABLE_TORCH_LIBRARY_IMPL(sparsemoe, CUDA, m) {
  m.impl("plan", TORCH_BOX(&plan));
  m.impl("plan_from_tokens", TORCH_BOX(&plan_from_tokens));
}

}  // namespace sparsemoe
