#include "moe/expert_choice.h"

#define SPARSEMOE_THIS_FILE "moe/expert_choice_cpu.cpp"
#include "common/for_each_isa.h"

#ifndef SPARSEMOE_DISPATCH
namespace sparsemoe {
namespace SPARSEMOE_ISA {

// softmax of one row of logits.
template <class T, class Real>
void softmax_row(const T* row, int32_t n, Real* out) {
  Real top = -std::numeric_limits<Real>::infinity();
  for (int32_t e = 0; e < n; ++e) {
    out[e] = load(row[e]);
    top = out[e] > top ? out[e] : top;
  }
  Real sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int32_t e = 0; e < n; ++e) {
    out[e] = exp_(out[e] - top);
    sum += out[e];
  }
  const Real inverse = 1 / sum;
  for (int32_t e = 0; e < n; ++e) out[e] *= inverse;
}

template <class T>
void choose(const ExpertChoiceParams& p) {
  using Real = acc_t<T>;
  using Candidate = std::pair<key_t_<Real>, int32_t>;  // key of the score, position in the group
  const int64_t n_experts = p.n_experts, per_group = p.n_tokens / p.n_groups;
  Real* scores = static_cast<Real*>(p.workspace);  // [n_experts, n_tokens]
  parallel_for(0, p.n_tokens, grain_for(64 * n_experts), [&](int64_t begin, int64_t end) {
    std::vector<Real> row(n_experts);
    for (int64_t t = begin; t < end; ++t) {
      softmax_row(static_cast<const T*>(p.logits) + t * p.logits_stride, int32_t(n_experts),
                  row.data());
      for (int64_t e = 0; e < n_experts; ++e) scores[e * p.n_tokens + t] = row[e];
    }
  });

  parallel_for(0, n_experts * p.n_groups, 1, [&](int64_t begin, int64_t end) {
    std::vector<Candidate> candidates;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t e = i / p.n_groups, group = i % p.n_groups, first = group * per_group;
      const Real* score = scores + e * p.n_tokens + first;
      candidates.clear();
      for (int64_t t = 0; t < per_group; ++t) {
        if (!p.mask || p.mask[first + t]) candidates.emplace_back(order_key(score[t]), int32_t(t));
      }
      const int64_t found = std::min<int64_t>(p.capacity, candidates.size());
      const auto better = [](const Candidate& a, const Candidate& b) {
        return a.first != b.first ? a.first > b.first : a.second < b.second;
      };
      if (found < int64_t(candidates.size())) {
        std::nth_element(candidates.begin(), candidates.begin() + found, candidates.end(), better);
        candidates.resize(found);
      }
      std::sort(candidates.begin(), candidates.end(),
                [](const Candidate& a, const Candidate& b) { return a.second < b.second; });
      Real* weights = static_cast<Real*>(p.weights) + i * p.capacity;
      int32_t* tokens = p.tokens + i * p.capacity;
      Real lowest = std::numeric_limits<Real>::infinity();
      for (int64_t c = 0; c < p.capacity; ++c) {
        const bool used = c < found;
        weights[c] = used ? score[candidates[c].second] : Real(0);
        tokens[c] = used ? int32_t(first + candidates[c].second) : -1;
        lowest = weights[c] != weights[c] || weights[c] < lowest ? weights[c] : lowest;
      }
      static_cast<Real*>(p.threshold)[group * n_experts + e] = p.capacity ? lowest : Real(0);
    }
  });
}

template <class T>
void choose_backward(const ExpertChoiceBackwardParams& p) {
  using Real = acc_t<T>;
  const int64_t n_experts = p.n_experts;
  Real* dense = static_cast<Real*>(p.workspace);  // [n_tokens, n_experts] gradient of the scores
  std::fill(dense, dense + p.n_tokens * n_experts, Real(0));
  const Real* grad_weights = static_cast<const Real*>(p.grad_weights);
  parallel_for(0, n_experts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * p.n_chosen; i < end * p.n_chosen; ++i) {
      const int32_t token = p.tokens[i];
      if (token >= 0) dense[token * n_experts + i / p.n_chosen] += grad_weights[i];
    }
  });
  parallel_for(0, p.n_tokens, grain_for(64 * n_experts), [&](int64_t begin, int64_t end) {
    std::vector<Real> row(n_experts);
    for (int64_t t = begin; t < end; ++t) {
      Real* grad = dense + t * n_experts;
      T* out = static_cast<T*>(p.grad_logits) + t * n_experts;
      softmax_row(static_cast<const T*>(p.logits) + t * p.logits_stride, int32_t(n_experts),
                  row.data());
      Real inner = 0;
      bool chosen = false;
      for (int64_t e = 0; e < n_experts; ++e) {
        inner += grad[e] * row[e];
        chosen |= grad[e] != 0;
      }
      for (int64_t e = 0; e < n_experts; ++e) {
        store(out + e, chosen ? row[e] * (grad[e] - inner) : Real(0));
      }
    }
  });
}

void expert_choice(const ExpertChoiceParams& p) {
  with_dtype(p.dtype, [&](auto* type) { choose<std::remove_pointer_t<decltype(type)>>(p); });
}

void expert_choice_backward(const ExpertChoiceBackwardParams& p) {
  with_dtype(p.dtype,
             [&](auto* type) { choose_backward<std::remove_pointer_t<decltype(type)>>(p); });
}

}  // namespace SPARSEMOE_ISA
}  // namespace sparsemoe

#else
namespace sparsemoe {

void expert_choice_cpu(const ExpertChoiceParams& p) { SPARSEMOE_BEST_ISA(expert_choice, p); }
void expert_choice_backward_cpu(const ExpertChoiceBackwardParams& p) {
  SPARSEMOE_BEST_ISA(expert_choice_backward, p);
}

}  // namespace sparsemoe
#endif
