// The plan of a layer: rows sorted by expert, and the way back from tokens to rows.
#pragma once

#include <cstdint>

namespace sparsemoe {

struct PlanParams {
  int64_t n_tokens, top_k, n_experts;
  const int32_t* experts;  // [n_tokens, top_k]; outside 0 .. n_experts-1: no row
  int64_t capacity;        // rows an expert keeps; -1: all
  const float* weights;    // [n_tokens, top_k]: keep the heaviest; null: keep first choices first
  int64_t n_rows;          // n_tokens * top_k, or at most n_experts * capacity
  // Outputs.
  int32_t* offsets;     // [n_experts + 1]
  int32_t* counts;      // [n_experts]
  int32_t* row_token;   // [n_rows]
  int32_t* row_pair;    // [n_rows]
  int32_t* token_rows;  // [n_tokens, top_k]
  void* workspace;      // plan_workspace_bytes
};

struct TokenPlanParams {
  int64_t n_tokens, n_experts, per_expert;
  const int32_t* tokens;  // [n_experts, per_expert]; outside 0 .. n_tokens-1: none
  // Outputs.
  int32_t* offsets;        // [n_experts + 1]
  int32_t* counts;         // [n_experts]
  int32_t* row_token;      // [n_experts * per_expert]
  int32_t* row_pair;       // likewise
  int32_t* token_rows;     // likewise
  int32_t* token_offsets;  // [n_tokens + 1]
  int32_t* workspace;      // [n_tokens]
};

// Blocks of pairs that are counted by themselves; the last term holds the dropless plan that a
// capacity is applied to.
constexpr int64_t kPlanBlocks = 256;
inline int64_t plan_workspace_bytes(const PlanParams& p) {
  const int64_t dropless = p.capacity < 0 ? 0 : p.n_tokens * p.top_k + p.n_experts + 1;
  return 4 * (kPlanBlocks * p.n_experts + dropless);
}

void plan_cpu(const PlanParams& p);
void plan_from_tokens_cpu(const TokenPlanParams& p);
int plan_cuda(const PlanParams& p, void* stream);
int plan_from_tokens_cuda(const TokenPlanParams& p, void* stream);

}  // namespace sparsemoe
