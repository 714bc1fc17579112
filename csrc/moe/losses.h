// The router's losses, and the bias of loss-free balancing.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace sparsemoe {

constexpr int64_t kLossBlocks = 512;  // partial sums, added in order

// n_experts * sum_e fraction(e) * mean probability(e); fraction(e) = counts[e] / sum(counts).
struct LoadBalanceParams {
  int64_t n_tokens, n_experts;
  const void* logits;
  int64_t logits_stride;
  DType dtype;
  const int32_t* counts;  // [n_experts]
  const bool* mask;       // [n_tokens] or null
  void* loss;             // scalar; float, or double where dtype is f64
  void* workspace;        // [kLossBlocks, n_experts + 1] reals: sums of probabilities, and tokens
};

struct LoadBalanceBackwardParams {
  int64_t n_tokens, n_experts;
  const void* logits;
  int64_t logits_stride;
  DType dtype;
  const int32_t* counts;
  const bool* mask;
  const void* grad;   // scalar
  void* grad_logits;  // [n_tokens, n_experts] of dtype
  void* workspace;    // [n_experts + 1] reals
};

// mean(logsumexp^2) over unmasked tokens.
struct ZLossParams {
  int64_t n_tokens;
  const void* logsumexp;
  DType dtype;  // f32 or f64
  const bool* mask;
  void* loss;
  void* workspace;  // [kLossBlocks, 2] reals
};

struct ZLossBackwardParams {
  int64_t n_tokens;
  const void* logsumexp;
  DType dtype;
  const bool* mask;
  const void* grad;
  void* grad_logsumexp;
};

// bias += rate * sign(mean(counts) - counts)
struct UpdateBiasParams {
  int64_t n_experts;
  const int32_t* counts;
  double rate;
  DType dtype;  // f32 or f64
  void* bias;
};

void load_balance_loss_cpu(const LoadBalanceParams& p);
void load_balance_loss_backward_cpu(const LoadBalanceBackwardParams& p);
void router_z_loss_cpu(const ZLossParams& p);
void router_z_loss_backward_cpu(const ZLossBackwardParams& p);
void update_expert_bias_cpu(const UpdateBiasParams& p);
int load_balance_loss_cuda(const LoadBalanceParams& p, void* stream);
int load_balance_loss_backward_cuda(const LoadBalanceBackwardParams& p, void* stream);
int router_z_loss_cuda(const ZLossParams& p, void* stream);
int router_z_loss_backward_cuda(const ZLossBackwardParams& p, void* stream);
int update_expert_bias_cuda(const UpdateBiasParams& p, void* stream);

}  // namespace sparsemoe
