#include "moe/gate.h"

#include <cmath>
#include <tuple>

#include "common/tensor.h"

namespace sparsemoe {
namespace {

constexpr char kLogits[] = "[tokens, experts]";

Scoring parse_scoring(const std::string& name) {
  if (name == "softmax") return Scoring::softmax;
  if (name == "sigmoid") return Scoring::sigmoid;
  SPARSEMOE_CHECK(name == "softmax_after_topk",
                  "scoring must be 'softmax', 'sigmoid' or 'softmax_after_topk', got '", name, "'");
  return Scoring::softmax_after_topk;
}

std::tuple<Tensor, Tensor, Tensor> gate(const Tensor& logits_in, int64_t top_k, std::string scoring,
                                        bool renormalize, double scale,
                                        const OptionalTensor& bias_in, int64_t n_group,
                                        int64_t topk_group, const OptionalTensor& threshold_in,
                                        const OptionalTensor& mask_in) {
  check_dim(logits_in, 2, "logits", kLogits);
  const DType dtype = real_dtype(logits_in, "logits");
  const ScalarType real = accumulator_type(dtype);
  const int64_t n_tokens = logits_in.size(0), n_experts = logits_in.size(1);
  SPARSEMOE_CHECK(n_experts >= 1 && n_experts <= kMaxExperts, "logits must have 1 to ", kMaxExperts,
                  " experts, got shape ", shape_text(logits_in));
  SPARSEMOE_CHECK(top_k >= 1 && top_k <= std::min(n_experts, kMaxTopK),
                  "top_k must be from 1 to min(experts, ", kMaxTopK,
                  ") = ", std::min(n_experts, kMaxTopK), ", got ", top_k);
  SPARSEMOE_CHECK(std::isfinite(scale) && scale > 0, "scale must be finite and above 0, got ",
                  scale);
  SPARSEMOE_CHECK(n_group >= 1 && n_group <= kMaxGroups && n_experts % n_group == 0,
                  "n_group must be from 1 to ", kMaxGroups, " and divide the ", n_experts,
                  " experts, got ", n_group);
  SPARSEMOE_CHECK(topk_group >= 1 && topk_group <= n_group,
                  "topk_group must be from 1 to n_group = ", n_group, ", got ", topk_group);
  SPARSEMOE_CHECK(topk_group * (n_experts / n_group) >= top_k, "top_k must be at most the ",
                  topk_group * (n_experts / n_group), " experts of topk_group groups, got ", top_k);
  const Scoring scores = parse_scoring(scoring);
  const auto bias = checked(bias_in, logits_in, "logits", real, n_experts, "bias", "[experts]");
  const auto threshold =
      checked(threshold_in, logits_in, "logits", real, n_experts, "threshold", "[experts]");
  const auto mask =
      checked(mask_in, logits_in, "logits", ScalarType::Bool, n_tokens, "mask", "[tokens]");

  const Tensor logits = with_dense_rows(logits_in);
  Tensor weights = empty({n_tokens, top_k}, real, logits);
  Tensor experts = empty({n_tokens, top_k}, ScalarType::Int, logits);
  Tensor logsumexp = empty({n_tokens}, real, logits);
  if (n_tokens > 0) {
    GateParams p;
    p.n_tokens = n_tokens, p.n_experts = n_experts, p.top_k = top_k;
    p.logits = pointer(logits), p.logits_stride = row_stride(logits), p.dtype = dtype;
    p.scoring = scores, p.renormalize = renormalize, p.scale = scale;
    p.bias = pointer(bias), p.threshold = pointer(threshold), p.mask = pointer<bool>(mask);
    p.n_group = topk_group == n_group ? 1 : n_group, p.topk_group = topk_group;
    p.weights = mutable_pointer(weights), p.experts = mutable_pointer<int32_t>(experts);
    p.logsumexp = mutable_pointer(logsumexp);
    SPARSEMOE_RUN(gate, logits, p);
  }
  return {weights, experts, logsumexp};
}

Tensor gate_backward(const Tensor& grad_weights_in, const Tensor& grad_logsumexp_in,
                     const Tensor& logits_in, const Tensor& weights_in, const Tensor& experts_in,
                     const Tensor& logsumexp_in, std::string scoring, bool renormalize,
                     double scale, const OptionalTensor& mask_in) {
  check_dim(logits_in, 2, "logits", kLogits);
  check_dim(experts_in, 2, "experts", "[tokens, top_k]");
  const DType dtype = real_dtype(logits_in, "logits");
  const int64_t n_tokens = logits_in.size(0), n_experts = logits_in.size(1);
  const Tensor logits = with_dense_rows(logits_in);
  const Tensor grad_weights = as_contiguous(grad_weights_in);
  const Tensor grad_logsumexp = as_contiguous(grad_logsumexp_in);
  const Tensor weights = as_contiguous(weights_in);
  const Tensor logsumexp = as_contiguous(logsumexp_in);
  const Tensor experts = int32_input(experts_in, logits, "experts", "logits");
  check_size(experts, 0, n_tokens, "experts", "[tokens, top_k]");
  for (const Tensor* reals : {&grad_weights, &grad_logsumexp, &weights, &logsumexp}) {
    check_type(*reals, accumulator_type(dtype), "gradients and weights");
    check_device(*reals, logits, "gradients and weights", "logits");
  }
  const auto mask =
      checked(mask_in, logits, "logits", ScalarType::Bool, n_tokens, "mask", "[tokens]");
  Tensor grad_logits = empty({n_tokens, n_experts}, logits.scalar_type(), logits);
  if (n_tokens > 0) {
    GateBackwardParams p;
    p.n_tokens = n_tokens, p.n_experts = n_experts, p.top_k = experts.size(1);
    p.logits = pointer(logits), p.logits_stride = row_stride(logits), p.dtype = dtype;
    p.scoring = parse_scoring(scoring), p.renormalize = renormalize, p.scale = scale;
    p.grad_weights = pointer(grad_weights), p.grad_logsumexp = pointer(grad_logsumexp);
    p.weights = pointer(weights), p.experts = pointer<int32_t>(experts);
    p.logsumexp = pointer(logsumexp), p.mask = pointer<bool>(mask);
    p.grad_logits = mutable_pointer(grad_logits);
    SPARSEMOE_RUN(gate_backward, logits, p);
  }
  return grad_logits;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparsemoe, CPU, m) {
  m.impl("gate", TORCH_BOX(&gate));
  m.impl("gate_backward", TORCH_BOX(&gate_backward));
}
STABLE_TORCH_LIBRARY_IMPL(sparsemoe, CUDA, m) {
  m.impl("gate", TORCH_BOX(&gate));
  m.impl("gate_backward", TORCH_BOX(&gate_backward));
}

}  // namespace sparsemoe
