#include "moe/losses.h"

#include "common/tensor.h"
#include "moe/gate.h"

namespace sparsemoe {
namespace {

struct BalanceInputs {
  Tensor logits, counts;
  OptionalTensor mask;
  DType dtype;

  BalanceInputs(const Tensor& logits_in, const Tensor& counts_in, const OptionalTensor& mask_in)
      : logits(
            (check_dim(logits_in, 2, "logits", "[tokens, experts]"), with_dense_rows(logits_in))),
        counts(int32_input(counts_in, logits, "counts", "logits")),
        mask(checked(mask_in, logits, "logits", ScalarType::Bool, logits.size(0), "mask",
                     "[tokens]")),
        dtype(real_dtype(logits, "logits")) {
    SPARSEMOE_CHECK(logits.size(1) >= 1 && logits.size(1) <= kMaxExperts, "logits must have 1 to ",
                    kMaxExperts, " experts, got shape ", shape_text(logits));
    check_dim(counts, 1, "counts", "[experts]");
    check_size(counts, 0, logits.size(1), "counts", "[experts]");
  }

  template <class Params>
  void fill(Params* p) const {
    p->n_tokens = logits.size(0), p->n_experts = logits.size(1);
    p->logits = pointer(logits), p->logits_stride = row_stride(logits), p->dtype = dtype;
    p->counts = pointer<int32_t>(counts), p->mask = pointer<bool>(mask);
  }
};

Tensor load_balance_loss(const Tensor& logits, const Tensor& counts, const OptionalTensor& mask) {
  const BalanceInputs in(logits, counts, mask);
  Tensor loss = empty({}, accumulator_type(in.dtype), logits);
  const Tensor space = workspace(8 * kLossBlocks * (logits.size(1) + 1), logits);
  LoadBalanceParams p;
  in.fill(&p);
  p.loss = mutable_pointer(loss), p.workspace = mutable_pointer(space);
  SPARSEMOE_RUN(load_balance_loss, logits, p);
  return loss;
}

Tensor load_balance_loss_backward(const Tensor& grad, const Tensor& logits, const Tensor& counts,
                                  const OptionalTensor& mask) {
  const BalanceInputs in(logits, counts, mask);
  check_type(grad, accumulator_type(in.dtype), "grad");
  check_device(grad, logits, "grad", "logits");
  Tensor grad_logits = empty({logits.size(0), logits.size(1)}, logits.scalar_type(), logits);
  const Tensor space = workspace(8 * (logits.size(1) + 1), logits);
  if (grad_logits.numel() > 0) {
    LoadBalanceBackwardParams p;
    in.fill(&p);
    p.grad = pointer(grad), p.grad_logits = mutable_pointer(grad_logits);
    p.workspace = mutable_pointer(space);
    SPARSEMOE_RUN(load_balance_loss_backward, logits, p);
  }
  return grad_logits;
}

DType logsumexp_dtype(const Tensor& logsumexp) {
  check_dim(logsumexp, 1, "logsumexp", "[tokens]");
  const ScalarType type = logsumexp.scalar_type();
  SPARSEMOE_CHECK(type == ScalarType::Float || (type == ScalarType::Double && !logsumexp.is_cuda()),
                  "logsumexp must be float32, as gate returns it, got ", dtype_text(type));
  return real_dtype(logsumexp, "logsumexp");
}

Tensor router_z_loss(const Tensor& logsumexp_in, const OptionalTensor& mask_in) {
  const DType dtype = logsumexp_dtype(logsumexp_in);
  const Tensor logsumexp = as_contiguous(logsumexp_in);
  const auto mask = checked(mask_in, logsumexp, "logsumexp", ScalarType::Bool, logsumexp.size(0),
                            "mask", "[tokens]");
  Tensor loss = empty({}, logsumexp.scalar_type(), logsumexp);
  const Tensor space = workspace(16 * kLossBlocks, logsumexp);
  ZLossParams p;
  p.n_tokens = logsumexp.size(0), p.logsumexp = pointer(logsumexp), p.dtype = dtype;
  p.mask = pointer<bool>(mask), p.loss = mutable_pointer(loss);
  p.workspace = mutable_pointer(space);
  SPARSEMOE_RUN(router_z_loss, logsumexp, p);
  return loss;
}

Tensor router_z_loss_backward(const Tensor& grad, const Tensor& logsumexp_in,
                              const OptionalTensor& mask_in) {
  const DType dtype = logsumexp_dtype(logsumexp_in);
  const Tensor logsumexp = as_contiguous(logsumexp_in);
  check_type(grad, logsumexp.scalar_type(), "grad");
  const auto mask = checked(mask_in, logsumexp, "logsumexp", ScalarType::Bool, logsumexp.size(0),
                            "mask", "[tokens]");
  Tensor grad_logsumexp = empty({logsumexp.size(0)}, logsumexp.scalar_type(), logsumexp);
  if (logsumexp.size(0) > 0) {
    ZLossBackwardParams p;
    p.n_tokens = logsumexp.size(0), p.logsumexp = pointer(logsumexp), p.dtype = dtype;
    p.mask = pointer<bool>(mask), p.grad = pointer(grad);
    p.grad_logsumexp = mutable_pointer(grad_logsumexp);
    SPARSEMOE_RUN(router_z_loss_backward, logsumexp, p);
  }
  return grad_logsumexp;
}

void update_expert_bias_(const Tensor& bias, const Tensor& counts_in, double rate) {
  check_dim(bias, 1, "bias", "[experts]");
  const ScalarType type = bias.scalar_type();
  SPARSEMOE_CHECK(type == ScalarType::Float || (type == ScalarType::Double && !bias.is_cuda()),
                  "bias must be float32, got ", dtype_text(type));
  SPARSEMOE_CHECK(bias.is_contiguous(), "bias must be contiguous: it is changed in place");
  const Tensor counts = int32_input(counts_in, bias, "counts", "bias");
  check_dim(counts, 1, "counts", "[experts]");
  check_size(counts, 0, bias.size(0), "counts", "[experts]");
  SPARSEMOE_CHECK(bias.size(0) <= kMaxExperts, "bias must have at most ", kMaxExperts,
                  " experts, got shape ", shape_text(bias));
  if (bias.size(0) == 0) return;
  UpdateBiasParams p;
  p.n_experts = bias.size(0), p.counts = pointer<int32_t>(counts), p.rate = rate;
  p.dtype = real_dtype(bias, "bias"), p.bias = mutable_pointer(bias);
  SPARSEMOE_RUN(update_expert_bias, bias, p);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparsemoe, CPU, m) {
  m.impl("load_balance_loss", TORCH_BOX(&load_balance_loss));
  m.impl("load_balance_loss_backward", TORCH_BOX(&load_balance_loss_backward));
  m.impl("router_z_loss", TORCH_BOX(&router_z_loss));
  m.impl("router_z_loss_backward", TORCH_BOX(&router_z_loss_backward));
  m.impl("update_expert_bias_", TORCH_BOX(&update_expert_bias_));
}
STABLE_TORCH_LIBRARY_IMPL(sparsemoe, CUDA, m) {
  m.impl("load_balance_loss", TORCH_BOX(&load_balance_loss));
  m.impl("load_balance_loss_backward", TORCH_BOX(&load_balance_loss_backward));
  m.impl("router_z_loss", TORCH_BOX(&router_z_loss));
  m.impl("router_z_loss_backward", TORCH_BOX(&router_z_loss_backward));
  m.impl("update_expert_bias_", TORCH_BOX(&update_expert_bias_));
}

}  // namespace sparsemoe
