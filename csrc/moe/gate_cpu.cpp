#include "moe/gate.h"

#define SPARSEMOE_THIS_FILE "moe/gate_cpu.cpp"
#include "common/for_each_isa.h"

#ifndef SPARSEMOE_DISPATCH
#include "common/lanes_cpu.h"

namespace sparsemoe {
namespace SPARSEMOE_ISA {

// Space for a block of tokens, [experts][lanes].
template <class Real>
struct Block {
  std::vector<Real> logits, choice;
  std::vector<key_t_<Real>> keys;
  std::vector<uint8_t> below;

  explicit Block(int64_t n_experts)
      : logits(n_experts * kLanes),
        choice(n_experts * kLanes),
        keys(n_experts * kLanes),
        below(n_experts * kLanes) {}
};

// Leaves the keys of the topk_group groups whose two best choices sum highest, of one lane.
template <class Real>
void limit_groups(Block<Real>* block, int32_t lane, const GateParams& p) {
  using Key = key_t_<Real>;
  const int64_t size = p.n_experts / p.n_group;
  const Real lowest = -std::numeric_limits<Real>::infinity();
  Key group_keys[kMaxGroups];
  for (int64_t g = 0; g < p.n_group; ++g) {
    Real first = lowest, second = lowest;
    for (int64_t e = g * size; e < (g + 1) * size; ++e) {
      const Real value = block->choice[e * kLanes + lane];
      second = value > first ? first : value > second ? value : second;
      first = value > first ? value : first;
    }
    const Real sum = size > 1 ? first + second : first;
    group_keys[g] = order_key(sum != sum ? lowest : sum);
  }
  bool kept[kMaxGroups] = {};
  for (int64_t i = 0; i < p.topk_group; ++i) {
    const int64_t g = std::max_element(group_keys, group_keys + p.n_group) - group_keys;
    group_keys[g] = lowest_key<Key>();
    kept[g] = true;
  }
  for (int64_t e = 0; e < p.n_experts; ++e) {
    if (!kept[e / size]) block->keys[e * kLanes + lane] = lowest_key<Key>();
  }
}

template <class Real>
Real sigmoid_(Real x) {
  return 1 / (1 + exp_(-x));
}

// Scores, plus the bias, as keys; experts outside the best groups or below the threshold get the
// lowest key.
template <class Real>
void choose_by_score(Block<Real>* block, const Real* lse, const GateParams& p) {
  using Key = key_t_<Real>;
  const Real* bias = static_cast<const Real*>(p.bias);
  const Real* threshold = static_cast<const Real*>(p.threshold);
  const bool by_logit = !bias && p.n_group == 1;
  const Real lowest = -std::numeric_limits<Real>::infinity();
  for (int64_t e = 0; e < p.n_experts; ++e) {
    const Real* logit = &block->logits[e * kLanes];
    Real* choice = &block->choice[e * kLanes];
    Key* key = &block->keys[e * kLanes];
    if (p.scoring == Scoring::softmax) {
      SPARSEMOE_LANES(i) choice[i] = exp_(logit[i] - lse[i]);
    } else if (p.scoring == Scoring::sigmoid) {
      SPARSEMOE_LANES(i) choice[i] = sigmoid_(logit[i]);
    } else {
      SPARSEMOE_LANES(i) choice[i] = logit[i];
    }
    if (threshold) {
      SPARSEMOE_LANES(i) { block->below[e * kLanes + i] = !(choice[i] >= threshold[e]); }
    }
    if (by_logit) continue;
    const Real add = bias ? bias[e] : Real(0);
    SPARSEMOE_LANES(i) {
      const Real value = choice[i] + add;
      choice[i] = value == value ? value : lowest;
      key[i] = order_key(choice[i]);
    }
  }
  if (p.n_group > 1) {
    for (int32_t i = 0; i < kLanes; ++i) limit_groups(block, i, p);
  }
  if (threshold) {
    for (int64_t i = 0; i < p.n_experts * kLanes; ++i) {
      if (block->below[i]) block->keys[i] = lowest_key<Key>();
    }
  }
}

// The gate of up to kLanes tokens from `first` on.
template <class T>
void gate_block(const GateParams& p, int64_t first, Block<acc_t<T>>* block) {
  using Real = acc_t<T>;
  using Key = key_t_<Real>;
  const int32_t n = int32_t(p.n_experts), k = int32_t(p.top_k);
  const int32_t count = int32_t(std::min<int64_t>(kLanes, p.n_tokens - first));
  const Real lowest = -std::numeric_limits<Real>::infinity();
  Real* logits = block->logits.data();
  Key* keys = block->keys.data();
  load_lanes(static_cast<const T*>(p.logits) + first * p.logits_stride, p.logits_stride, n, count,
             logits);

  Key top[kLanes];
  std::fill(top, top + kLanes, lowest_key<Key>());
  for (int32_t e = 0; e < n; ++e) {
    SPARSEMOE_LANES(i) {
      const Real logit = logits[e * kLanes + i];
      const Key key = order_key(logit == logit ? logit : lowest);  // NaN as -infinity
      keys[e * kLanes + i] = key;
      top[i] = std::max(top[i], key);
    }
  }
  // log-sum-exp, with the shift of torch.logsumexp: none where the largest is infinite.
  Real shift[kLanes], sum[kLanes] = {}, lse[kLanes];
  SPARSEMOE_LANES(i) {
    shift[i] = key_to_real(top[i]);
    shift[i] = std::isinf(shift[i]) ? Real(0) : shift[i];
  }
  for (int32_t e = 0; e < n; ++e) {
    SPARSEMOE_LANES(i) sum[i] += exp_(logits[e * kLanes + i] - shift[i]);
  }
  SPARSEMOE_LANES(i) lse[i] = shift[i] + std::log(sum[i]);
  if (p.bias || p.n_group > 1 || p.threshold) choose_by_score(block, lse, p);

  // Sorted lists of the k best, into which every expert is pushed from the top: an equal key stays
  // below, so of equals the lower expert comes first.
  Key best[kMaxTopK][kLanes];
  int32_t index[kMaxTopK][kLanes];
  for (int32_t j = 0; j < k; ++j) {
    std::fill(best[j], best[j] + kLanes, lowest_key<Key>());
    std::fill(index[j], index[j] + kLanes, -1);
  }
  for (int32_t e = 0; e < n; ++e) {
    Key key[kLanes];
    int32_t expert[kLanes];
    SPARSEMOE_LANES(i) {
      key[i] = keys[e * kLanes + i];
      expert[i] = e;
    }
    for (int32_t j = 0; j < k; ++j) {
      SPARSEMOE_LANES(i) {
        const Key other = best[j][i];
        const int32_t other_expert = index[j][i];
        const bool above = key[i] > other;
        best[j][i] = above ? key[i] : other;
        index[j][i] = above ? expert[i] : other_expert;
        key[i] = above ? other : key[i];
        expert[i] = above ? other_expert : expert[i];
      }
    }
  }

  const bool sigmoid = p.scoring == Scoring::sigmoid;
  const bool over_chosen = !sigmoid && (p.scoring != Scoring::softmax || p.renormalize);
  Real weight[kMaxTopK][kLanes], base[kLanes], total[kLanes] = {};
  SPARSEMOE_LANES(i) base[i] = over_chosen ? lowest : lse[i];
  for (int32_t j = 0; j < k; ++j) {
    SPARSEMOE_LANES(i) {
      weight[j][i] = index[j][i] >= 0 ? logits[index[j][i] * kLanes + i] : lowest;
      if (over_chosen) base[i] = weight[j][i] > base[i] ? weight[j][i] : base[i];
    }
  }
  for (int32_t j = 0; j < k; ++j) {
    SPARSEMOE_LANES(i) {
      const Real value = sigmoid ? sigmoid_(weight[j][i]) : exp_(weight[j][i] - base[i]);
      weight[j][i] = index[j][i] >= 0 ? value : Real(0);
      total[i] += weight[j][i];
    }
  }
  for (int32_t i = 0; i < count; ++i) {
    const int64_t t = first + i;
    const bool masked = p.mask && !p.mask[t];
    const bool any = index[0][i] >= 0 && !masked;
    Real factor = Real(p.scale);
    if (over_chosen) factor /= total[i];
    if (sigmoid && p.renormalize) factor /= total[i] + Real(1e-20);
    static_cast<Real*>(p.logsumexp)[t] = masked ? Real(0) : lse[i];
    for (int32_t j = 0; j < k; ++j) {
      static_cast<Real*>(p.weights)[t * k + j] = any ? weight[j][i] * factor : Real(0);
      p.experts[t * k + j] = masked ? -1 : index[j][i];
    }
  }
}

template <class T>
void gate_backward_token(const GateBackwardParams& p, int64_t t) {
  using Real = acc_t<T>;
  const int32_t n = int32_t(p.n_experts), k = int32_t(p.top_k);
  const T* row = static_cast<const T*>(p.logits) + t * p.logits_stride;
  T* out = static_cast<T*>(p.grad_logits) + t * n;
  alignas(64) Real grad[kMaxExperts];
  if (p.mask && !p.mask[t]) {
    for (int32_t e = 0; e < n; ++e) store(out + e, Real(0));
    return;
  }
  const Real* grad_weights = static_cast<const Real*>(p.grad_weights) + t * k;
  const Real* weights = static_cast<const Real*>(p.weights) + t * k;
  const int32_t* experts = p.experts + t * k;
  const Real lse = static_cast<const Real*>(p.logsumexp)[t];
  const Real grad_lse = static_cast<const Real*>(p.grad_logsumexp)[t];
  const bool softmax = p.scoring == Scoring::softmax, sigmoid = p.scoring == Scoring::sigmoid;
  const bool over_chosen = !sigmoid && (!softmax || p.renormalize);

  Real inner = 0;  // <grad_weights, weights>
  for (int32_t j = 0; j < k; ++j) inner += experts[j] >= 0 ? grad_weights[j] * weights[j] : Real(0);
  // d logsumexp / d logit is the probability; so is the dense part of an unnormalised softmax.
  const Real dense = grad_lse - (softmax && !p.renormalize ? inner : Real(0));
  for (int32_t e = 0; e < n; ++e) grad[e] = dense == 0 ? Real(0) : dense * exp_(load(row[e]) - lse);
  const Real mean = over_chosen || (sigmoid && p.renormalize) ? inner / Real(p.scale) : Real(0);
  for (int32_t j = 0; j < k; ++j) {
    if (experts[j] < 0) continue;
    Real g = weights[j] * (grad_weights[j] - mean);
    if (sigmoid) g *= 1 - 1 / (1 + exp_(-load(row[experts[j]])));
    grad[experts[j]] += g;
  }
  for (int32_t e = 0; e < n; ++e) store(out + e, grad[e]);
}

void gate(const GateParams& p) {
  with_dtype(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const int64_t n_blocks = (p.n_tokens + kLanes - 1) / kLanes;
    const int64_t grain = grain_for(kLanes * 64 * p.n_experts);
    parallel_for(0, n_blocks, grain, [&](int64_t begin, int64_t end) {
      Block<acc_t<T>> space(p.n_experts);
      for (int64_t block = begin; block < end; ++block) gate_block<T>(p, block * kLanes, &space);
    });
  });
}

void gate_backward(const GateBackwardParams& p) {
  with_dtype(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    parallel_for(0, p.n_tokens, grain_for(64 * p.n_experts), [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) gate_backward_token<T>(p, t);
    });
  });
}

}  // namespace SPARSEMOE_ISA
}  // namespace sparsemoe

#else
namespace sparsemoe {

void gate_cpu(const GateParams& p) { SPARSEMOE_BEST_ISA(gate, p); }
void gate_backward_cpu(const GateBackwardParams& p) { SPARSEMOE_BEST_ISA(gate_backward, p); }

}  // namespace sparsemoe
#endif
