// Token choice: the k best experts of every token, their weights, and the log-sum-exp of the
// logits.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace sparsemoe {

enum class Scoring : int32_t { softmax, sigmoid, softmax_after_topk };

constexpr int64_t kMaxExperts = 1024;
constexpr int64_t kMaxTopK = 32;
constexpr int64_t kMaxGroups = 32;

struct GateParams {
  int64_t n_tokens, n_experts, top_k;
  const void* logits;  // [n_tokens, n_experts], rows logits_stride elements apart
  int64_t logits_stride;
  DType dtype;
  Scoring scoring;
  bool renormalize;
  double scale;
  const void* bias;       // [n_experts] or null
  const void* threshold;  // [n_experts] or null
  const bool* mask;       // [n_tokens] or null
  int64_t n_group, topk_group;
  // Outputs. Reals are float, or double where dtype is f64; so are bias and threshold.
  void* weights;     // [n_tokens, top_k]
  int32_t* experts;  // [n_tokens, top_k]
  void* logsumexp;   // [n_tokens]
};

struct GateBackwardParams {
  int64_t n_tokens, n_experts, top_k;
  const void* logits;
  int64_t logits_stride;
  DType dtype;
  Scoring scoring;
  bool renormalize;
  double scale;
  const void* grad_weights;    // [n_tokens, top_k]
  const void* grad_logsumexp;  // [n_tokens]
  const void* weights;
  const int32_t* experts;
  const void* logsumexp;
  const bool* mask;
  void* grad_logits;  // [n_tokens, n_experts] of dtype
};

void gate_cpu(const GateParams& p);
void gate_backward_cpu(const GateBackwardParams& p);
// Returns a cudaError_t.
int gate_cuda(const GateParams& p, void* stream);
int gate_backward_cuda(const GateBackwardParams& p, void* stream);

}  // namespace sparsemoe
