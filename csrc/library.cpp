// Every operator of torch.ops.sparsemoe. T tokens, E experts, k experts a token, R rows, H width.
// Arguments and results are described in python/sparsemoe/ops.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(sparsemoe, m) {
  // moe: choosing
  m.def("router_linear(Tensor x, Tensor weight) -> Tensor");
  m.def("router_linear_backward(Tensor grad, Tensor x, Tensor weight) -> (Tensor, Tensor)");
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

  // moe: the experts. `pre`, what the first projection gave, is kept for the way back or is [0]:
  // then it is computed again. Gradients that are not wanted are [0]; so is one that was added to a
  // sum
  m.def(
      "experts(Tensor x, Tensor gate_up_proj, Tensor down_proj, Tensor? gate_up_bias, "
      "Tensor? down_bias, Tensor? weights, Tensor offsets, Tensor row_token, Tensor row_pair, "
      "Tensor token_rows, Tensor? token_offsets, str activation, bool keep) "
      "-> (Tensor y, Tensor pre)");
  m.def(
      "experts_backward(Tensor grad, Tensor x, Tensor gate_up_proj, Tensor down_proj, "
      "Tensor? gate_up_bias, Tensor? down_bias, Tensor? weights, Tensor offsets, "
      "Tensor row_token, Tensor row_pair, Tensor token_rows, Tensor? token_offsets, "
      "str activation, Tensor pre, bool need_x, bool need_gate_up, bool need_down, "
      "Tensor(a!)? gate_up_sum, Tensor(b!)? down_sum) "
      "-> (Tensor grad_x, Tensor grad_gate_up_proj, Tensor grad_down_proj, "
      "Tensor grad_gate_up_bias, Tensor grad_down_bias, Tensor grad_weights)");

  // moe: y[r] = a[r] @ b[e] for the rows of expert e, and its gradient to b
  m.def("grouped_mm(Tensor a, Tensor b, Tensor offsets) -> Tensor");
  m.def("grouped_mm_backward_b(Tensor a, Tensor grad, Tensor offsets, bool by_column) -> Tensor");

  // moe: keeping experts in balance
  m.def("load_balance_loss(Tensor logits, Tensor counts, Tensor? mask=None) -> Tensor");
  m.def(
      "load_balance_loss_backward(Tensor grad, Tensor logits, Tensor counts, Tensor? mask) "
      "-> Tensor");
  m.def("router_z_loss(Tensor logsumexp, Tensor? mask=None) -> Tensor");
  m.def("router_z_loss_backward(Tensor grad, Tensor logsumexp, Tensor? mask) -> Tensor");
  m.def("update_expert_bias_(Tensor(a!) bias, Tensor counts, float rate) -> ()");

  // rvq: residual vector quantization. N vectors, D width, Q stages, K codes a stage
  m.def(
      "rvq_encode(Tensor x, Tensor codebooks, SymInt n_stages, str metric='l2', bool exact=True) "
      "-> (Tensor codes, Tensor quantized, Tensor errors)");
  m.def(
      "rvq_encode_backward(Tensor grad_quantized, Tensor grad_errors, Tensor x, Tensor codebooks, "
      "Tensor codes) -> Tensor");
  m.def(
      "rvq_beam_encode(Tensor x, Tensor codebooks, SymInt n_stages, int beam) "
      "-> (Tensor codes, Tensor quantized, Tensor errors)");
  m.def("rvq_decode(Tensor codes, Tensor codebooks) -> Tensor");
  m.def(
      "rvq_code_sums(Tensor x, Tensor codes, SymInt num_codes, Tensor? codebooks=None, "
      "Tensor? weights=None, bool after=False) -> (Tensor sums, Tensor counts)");
  m.def(
      "rvq_ema_(Tensor(a!) codebooks, Tensor(b!) cluster_size, Tensor(c!) embed_sum, Tensor sums, "
      "Tensor counts, float decay, float epsilon) -> ()");

  // sinkhorn: balanced assignment. What was not to be measured is [0]. `history` is kept for the
  // way back or is [0]: then it is computed again
  m.def(
      "sinkhorn(Tensor logits, int n_iters=8, float? tolerance=None, float temperature=1.0, "
      "Tensor? row_marginals=None, Tensor? col_marginals=None, Tensor? mask=None, "
      "bool keep=False, bool measure=False) -> (Tensor plan, Tensor log_u, Tensor log_v, "
      "Tensor error, Tensor state, Tensor history)");
  m.def(
      "sinkhorn_backward(Tensor grad, Tensor logits, int n_iters, float? tolerance, "
      "float temperature, Tensor? row_marginals, Tensor? col_marginals, Tensor? mask, "
      "Tensor state, Tensor history) -> Tensor");
}
