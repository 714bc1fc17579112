// Expert choice: every expert takes the tokens of each group that score highest for it.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace sparsemoe {

struct ExpertChoiceParams {
  int64_t n_tokens, n_experts, n_groups, capacity;  // n_groups divides n_tokens
  const void* logits;                               // [n_tokens, n_experts]
  int64_t logits_stride;
  DType dtype;
  const bool* mask;  // [n_tokens] or null
  // Outputs. Reals are float, or double where dtype is f64.
  void* weights;    // [n_experts, n_groups, capacity]
  int32_t* tokens;  // likewise
  void* threshold;  // [n_groups, n_experts]
  void* workspace;  // expert_choice_workspace_bytes
};

struct ExpertChoiceBackwardParams {
  int64_t n_tokens, n_experts, n_chosen;  // n_chosen = n_groups * capacity
  const void* logits;
  int64_t logits_stride;
  DType dtype;
  const void* grad_weights;  // [n_experts, n_chosen]
  const int32_t* tokens;     // [n_experts, n_chosen]
  void* grad_logits;         // [n_tokens, n_experts] of dtype
  void* workspace;           // expert_choice_workspace_bytes
};

// A [n_experts, n_tokens] matrix of reals.
inline int64_t expert_choice_workspace_bytes(int64_t n_tokens, int64_t n_experts, DType dtype) {
  return n_tokens * n_experts * (dtype == DType::f64 ? 8 : 4);
}

void expert_choice_cpu(const ExpertChoiceParams& p);
void expert_choice_backward_cpu(const ExpertChoiceBackwardParams& p);
int expert_choice_cuda(const ExpertChoiceParams& p, void* stream);
int expert_choice_backward_cuda(const ExpertChoiceBackwardParams& p, void* stream);

}  // namespace sparsemoe
