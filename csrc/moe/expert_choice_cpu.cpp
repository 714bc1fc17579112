#include "moe/expert_choice.h"

#define SPARSEMOE_THIS_FILE "moe/expert_choice_cpu.cpp"
#include "common/for_each_isa.h"

#ifndef SPARSEMOE_DISPATCH
#include "common/lanes_cpu.h"
#include "common/select_cpu.h"

namespace sparsemoe {
namespace SPARSEMOE_ISA {

template <class T>
void choose(const ExpertChoiceParams& p) {
  using Real = acc_t<T>;
  using Key = decltype(unsigned_key(Real()));
  const int64_t n_experts = p.n_experts, per_group = p.n_tokens / p.n_groups;
  Real* scores = static_cast<Real*>(p.workspace);  // [n_experts, n_tokens]
  for_each_softmax(static_cast<const T*>(p.logits), p.logits_stride, p.n_tokens, n_experts,
                   [&](int64_t first, int64_t count, const Real* block) {
                     for (int64_t e = 0; e < n_experts; ++e) {
                       std::copy_n(&block[e * kLanes], count, scores + e * p.n_tokens + first);
                     }
                   });

  parallel_for(0, n_experts * p.n_groups, 1, [&](int64_t begin, int64_t end) {
    std::vector<Key> keys(per_group), pool;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t e = i / p.n_groups, group = i % p.n_groups, first = group * per_group;
      const Real* score = scores + e * p.n_tokens + first;
      int64_t usable = per_group;
      for (int64_t t = 0; t < per_group; ++t) keys[t] = unsigned_key(score[t]);
      if (p.mask) {
        for (int64_t t = 0; t < per_group; ++t) {
          if (!p.mask[first + t]) {
            keys[t] = 0;  // below every score's key
            --usable;
          }
        }
      }
      Selection<Key> selection{0, 0};  // every usable token
      if (p.capacity > 0 && p.capacity < usable) {
        selection = select_largest(keys.data(), per_group, p.capacity, &pool);
      }
      Real* weights = static_cast<Real*>(p.weights) + i * p.capacity;
      int32_t* tokens = p.tokens + i * p.capacity;
      int64_t found = 0;
      for (int64_t t = 0; t < per_group && found < p.capacity; ++t) {
        const bool equal = keys[t] == selection.key && selection.n_equal > 0;
        if (keys[t] <= selection.key && !equal) continue;
        selection.n_equal -= equal;
        weights[found] = score[t];
        tokens[found++] = int32_t(first + t);
      }
      Real lowest = found < p.capacity || !found ? Real(0) : weights[0];
      for (int64_t c = 0; c < found && lowest != 0; ++c) {
        lowest = weights[c] != weights[c] || weights[c] < lowest ? weights[c] : lowest;
      }
      for (int64_t c = found; c < p.capacity; ++c) {
        weights[c] = 0;
        tokens[c] = -1;
      }
      static_cast<Real*>(p.threshold)[group * n_experts + e] = lowest;
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
      const int64_t token = uint32_t(p.tokens[i]);
      if (token < p.n_tokens) dense[token * n_experts + i / p.n_chosen] += grad_weights[i];
    }
  });
  const auto gradient = [&](int64_t first, int64_t count, const Real* score) {
    std::vector<Real> grad(n_experts * kLanes);
    load_lanes(dense + first * n_experts, n_experts, n_experts, count, grad.data());
    Real inner[kLanes] = {};
    int32_t chosen[kLanes] = {};
    for (int64_t e = 0; e < n_experts; ++e) {
      SPARSEMOE_LANES(i) {
        inner[i] += grad[e * kLanes + i] * score[e * kLanes + i];
        chosen[i] |= grad[e * kLanes + i] != 0;
      }
    }
    for (int64_t e = 0; e < n_experts; ++e) {
      SPARSEMOE_LANES(i) {
        const Real g = score[e * kLanes + i] * (grad[e * kLanes + i] - inner[i]);
        grad[e * kLanes + i] = chosen[i] ? g : Real(0);
      }
    }
    store_lanes(grad.data(), n_experts, count, static_cast<T*>(p.grad_logits) + first * n_experts,
                n_experts);
  };
  for_each_softmax(static_cast<const T*>(p.logits), p.logits_stride, p.n_tokens, n_experts,
                   gradient);
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
