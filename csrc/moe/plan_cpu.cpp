// Integer work without arithmetic to vectorise: one variant serves every processor.
#include "moe/plan.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "common/parallel.h"

namespace sparsemoe {
namespace {

constexpr int64_t kPairsPerBlock = 2048;

// A stable counting sort of the pairs by expert.
void sort_pairs(const PlanParams& p, int32_t* offsets, int32_t* row_pair) {
  const int64_t n_pairs = p.n_tokens * p.top_k, n_experts = p.n_experts;
  const int64_t per_block = std::max(kPairsPerBlock, (n_pairs + kPlanBlocks - 1) / kPlanBlocks);
  const int64_t n_blocks = (n_pairs + per_block - 1) / per_block;
  int32_t* next = static_cast<int32_t*>(p.workspace);  // [n_blocks, n_experts]

  parallel_for(0, n_blocks, 1, [&](int64_t begin, int64_t end) {
    std::fill(next + begin * n_experts, next + end * n_experts, 0);
    for (int64_t block = begin; block < end; ++block) {
      int32_t* count = next + block * n_experts;
      const int64_t stop = std::min(n_pairs, (block + 1) * per_block);
      for (int64_t i = block * per_block; i < stop; ++i) {
        if (uint32_t(p.experts[i]) < uint64_t(n_experts)) ++count[p.experts[i]];
      }
    }
  });
  std::fill(p.counts, p.counts + n_experts, 0);
  for (int64_t block = 0; block < n_blocks; ++block) {
    for (int64_t e = 0; e < n_experts; ++e) {
      const int32_t before = p.counts[e];
      p.counts[e] += next[block * n_experts + e];
      next[block * n_experts + e] = before;
    }
  }
  offsets[0] = 0;
  for (int64_t e = 0; e < n_experts; ++e) offsets[e + 1] = offsets[e] + p.counts[e];
  const bool final = p.capacity < 0;
  parallel_for(0, n_blocks, 1, [&](int64_t begin, int64_t end) {
    std::vector<int32_t> cursor(n_experts);
    for (int64_t block = begin; block < end; ++block) {
      for (int64_t e = 0; e < n_experts; ++e) cursor[e] = offsets[e] + next[block * n_experts + e];
      const int64_t stop = std::min(n_pairs, (block + 1) * per_block);
      for (int64_t i = block * per_block; i < stop; ++i) {
        const bool valid = uint32_t(p.experts[i]) < uint64_t(n_experts);
        const int32_t row = valid ? cursor[p.experts[i]]++ : -1;
        if (valid) row_pair[row] = int32_t(i);
        if (final) {
          p.token_rows[i] = row;
          if (valid) p.row_token[row] = int32_t(i / p.top_k);
        }
      }
    }
  });
}

// Writes the `capacity` best pairs of each expert, in the order of the pairs.
void keep_best(const PlanParams& p, const int32_t* offsets, const int32_t* pairs) {
  using Candidate = std::pair<float, int32_t>;
  p.offsets[0] = 0;
  for (int64_t e = 0; e < p.n_experts; ++e) {
    p.offsets[e + 1] = p.offsets[e] + int32_t(std::min<int64_t>(p.counts[e], p.capacity));
  }
  std::fill(p.token_rows, p.token_rows + p.n_tokens * p.top_k, -1);
  parallel_for(0, p.n_experts, 1, [&](int64_t begin, int64_t end) {
    std::vector<Candidate> candidates;
    for (int64_t e = begin; e < end; ++e) {
      candidates.clear();
      for (int32_t i = offsets[e]; i < offsets[e + 1]; ++i) {
        const float weight = p.weights ? p.weights[pairs[i]] : float(-(pairs[i] % p.top_k));
        candidates.emplace_back(weight == weight ? weight : -1.0f / 0.0f, pairs[i]);
      }
      const int64_t kept = p.offsets[e + 1] - p.offsets[e];
      if (kept < int64_t(candidates.size())) {
        std::nth_element(candidates.begin(), candidates.begin() + kept, candidates.end(),
                         [](const Candidate& a, const Candidate& b) {
                           return a.first != b.first ? a.first > b.first : a.second < b.second;
                         });
        candidates.resize(kept);
        std::sort(candidates.begin(), candidates.end(),
                  [](const Candidate& a, const Candidate& b) { return a.second < b.second; });
      }
      for (int64_t i = 0; i < kept; ++i) {
        const int32_t row = int32_t(p.offsets[e] + i), pair = candidates[i].second;
        p.row_pair[row] = pair;
        p.row_token[row] = int32_t(pair / p.top_k);
        p.token_rows[pair] = row;
      }
    }
  });
}

}  // namespace

void plan_cpu(const PlanParams& p) {
  if (p.capacity < 0) {
    sort_pairs(p, p.offsets, p.row_pair);
  } else {
    int32_t* offsets = static_cast<int32_t*>(p.workspace) + kPlanBlocks * p.n_experts;
    int32_t* pairs = offsets + p.n_experts + 1;
    sort_pairs(p, offsets, pairs);
    keep_best(p, offsets, pairs);
  }
  const int32_t used = p.offsets[p.n_experts];
  std::fill(p.row_token + used, p.row_token + p.n_rows, -1);
  std::fill(p.row_pair + used, p.row_pair + p.n_rows, -1);
}

void plan_from_tokens_cpu(const TokenPlanParams& p) {
  const int64_t n_rows = p.n_experts * p.per_expert;
  int32_t* cursor = p.workspace;
  std::fill(cursor, cursor + p.n_tokens, 0);
  std::fill(p.counts, p.counts + p.n_experts, 0);
  for (int64_t row = 0; row < n_rows; ++row) {
    const int32_t token = p.tokens[row];
    const bool valid = uint32_t(token) < uint64_t(p.n_tokens);
    p.row_token[row] = valid ? token : -1;
    p.row_pair[row] = valid ? int32_t(row) : -1;
    if (valid) {
      ++cursor[token];
      ++p.counts[row / p.per_expert];
    }
  }
  for (int64_t e = 0; e <= p.n_experts; ++e) p.offsets[e] = int32_t(e * p.per_expert);
  p.token_offsets[0] = 0;
  for (int64_t t = 0; t < p.n_tokens; ++t) {
    p.token_offsets[t + 1] = p.token_offsets[t] + cursor[t];
    cursor[t] = p.token_offsets[t];
  }
  for (int64_t row = 0; row < n_rows; ++row) {
    if (p.row_token[row] >= 0) p.token_rows[cursor[p.row_token[row]]++] = int32_t(row);
  }
  std::fill(p.token_rows + p.token_offsets[p.n_tokens], p.token_rows + n_rows, -1);
}

}  // namespace sparsemoe
