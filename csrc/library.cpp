// Every operator of torch.ops.sparsemoe. T tokens, E experts, k experts a token, R rows, H width.
// Arguments and results are described in python/sparsemoe/ops.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(sparsemoe, m) {
  // moe: choosing
  m.def(
      "gate(Tensor logits, int top_k, str scoring='softmax', bool renormalize=False, "
      "float scale=1.0, Tensor? bias=None, int n_group=1, int topk_group=1, "
      "Tensor? threshold=None, Tensor? mask=None) "
      "-> (Tensor weights, Tensor experts, Tensor logsumexp)");
  m.def(
      "gate_backward(Tensor grad_weights, Tensor grad_logsumexp, Tensor logits, Tensor weights, "
      "Tensor experts, Tensor logsumexp, str scoring, bool renormalize, float scale, "
      "Tensor? mask) -> Tensor");
  m.def(
      "expert_choice(Tensor logits, SymInt capacity, SymInt n_groups=1, Tensor? mask=None) "
      "-> (Tensor weights, Tensor tokens, Tensor threshold)");
  m.def("expert_choice_backward(Tensor grad_weights, Tensor logits, Tensor tokens) -> Tensor");

  // moe: where rows go
  m.def(
      "plan(Tensor experts, int num_experts, SymInt? capacity=None, Tensor? weights=None) "
      "-> (Tensor offsets, Tensor counts, Tensor row_token, Tensor row_pair, Tensor token_rows)");
  m.def(
      "plan_from_tokens(Tensor tokens, SymInt num_tokens) -> (Tensor offsets, Tensor counts, "
      "Tensor row_token, Tensor row_pair, Tensor token_rows, Tensor token_offsets)");
  m.def(
      "dispatch(Tensor x, Tensor row_token, Tensor row_pair, Tensor token_rows, "
      "Tensor? token_offsets=None) -> Tensor");
  m.def(
      "combine(Tensor rows, Tensor? weights, Tensor row_token, Tensor row_pair, "
      "Tensor token_rows, Tensor? token_offsets=None) -> Tensor");
  m.def(
      "combine_backward(Tensor grad, Tensor rows, Tensor weights, Tensor row_token, "
      "Tensor row_pair, Tensor token_rows, Tensor? token_offsets) "
      "-> (Tensor grad_rows, Tensor grad_weights)");

  // moe: experts. y[r] = weight[e] @ x[r] for the rows of expert e
  m.def("grouped_linear(Tensor x, Tensor weight, Tensor offsets) -> Tensor");
  m.def("grouped_linear_backward_x(Tensor grad, Tensor weight, Tensor offsets) -> Tensor");
  m.def("grouped_linear_backward_weight(Tensor grad, Tensor x, Tensor offsets) -> Tensor");

  // moe: keeping experts in balance
  m.def("load_balance_loss(Tensor logits, Tensor counts, Tensor? mask=None) -> Tensor");
  m.def(
      "load_balance_loss_backward(Tensor grad, Tensor logits, Tensor counts, Tensor? mask) "
      "-> Tensor");
  m.def("router_z_loss(Tensor logsumexp, Tensor? mask=None) -> Tensor");
  m.def("router_z_loss_backward(Tensor grad, Tensor logsumexp, Tensor? mask) -> Tensor");
  m.def("update_expert_bias_(Tensor(a!) bias, Tensor counts, float rate) -> ()");
}
