#include "moe/gate.h"

#define SPARSEMOE_THIS_FILE "moe/gate_cpu.cpp"
#include "common/for_each_isa.h"

#ifndef SPARSEMOE_DISPATCH
namespace sparsemoe {
namespace SPARSEMOE_ISA {

// The largest key and, of equals, the lowest index. Two passes, each of which vectorises.
template <class Key>
int32_t argmax(const Key* keys, int32_t n, Key* largest) {
  Key best = lowest_key<Key>();
#pragma omp simd reduction(max : best)
  for (int32_t i = 0; i < n; ++i) best = std::max(best, keys[i]);
  int32_t index = n;
#pragma omp simd reduction(min : index)
  for (int32_t i = 0; i < n; ++i) index = std::min(index, keys[i] == best ? i : n);
  *largest = best;
  return index;
}

// Keeps the keys of the topk_group groups whose two best choices sum highest.
template <class Real>
void limit_groups(const Real* choice, key_t_<Real>* keys, const GateParams& p) {
  using Key = key_t_<Real>;
  const int32_t size = int32_t(p.n_experts / p.n_group);
  const Real lowest = -std::numeric_limits<Real>::infinity();
  Key group_keys[kMaxGroups];
  for (int32_t g = 0; g < p.n_group; ++g) {
    Real first = lowest, second = lowest;
    for (int32_t i = g * size; i < (g + 1) * size; ++i) {
      const Real value = choice[i];
      second = value > first ? first : value > second ? value : second;
      first = value > first ? value : first;
    }
    const Real sum = size > 1 ? first + second : first;
    group_keys[g] = order_key(sum != sum ? lowest : sum);
  }
  bool kept[kMaxGroups] = {};
  for (int64_t i = 0; i < p.topk_group; ++i) {
    Key key;
    const int32_t g = argmax(group_keys, int32_t(p.n_group), &key);
    group_keys[g] = lowest_key<Key>();
    kept[g] = true;
  }
  for (int32_t g = 0; g < p.n_group; ++g) {
    if (!kept[g]) std::fill(keys + g * size, keys + (g + 1) * size, lowest_key<Key>());
  }
}

template <class T>
void gate_token(const GateParams& p, int64_t t) {
  using Real = acc_t<T>;
  using Key = key_t_<Real>;
  const int32_t n = int32_t(p.n_experts), k = int32_t(p.top_k);
  const T* row = static_cast<const T*>(p.logits) + t * p.logits_stride;
  Real* weights = static_cast<Real*>(p.weights) + t * k;
  int32_t* experts = p.experts + t * k;
  Real* logsumexp = static_cast<Real*>(p.logsumexp) + t;
  if (p.mask && !p.mask[t]) {
    std::fill(weights, weights + k, Real(0));
    std::fill(experts, experts + k, -1);
    *logsumexp = 0;
    return;
  }

  alignas(64) Real logits[kMaxExperts];
  alignas(64) Real choice[kMaxExperts];
  alignas(64) Key keys[kMaxExperts];
  for (int32_t e = 0; e < n; ++e) logits[e] = load(row[e]);
  for (int32_t e = 0; e < n; ++e) keys[e] = order_key(logits[e]);

  // log-sum-exp, with the shift of torch.logsumexp: none where the largest is infinite.
  Key top_key;
  const Real top = logits[argmax(keys, n, &top_key)];
  const Real shift = std::isinf(top) ? Real(0) : top;
  Real sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int32_t e = 0; e < n; ++e) sum += exp_(logits[e] - shift);
  const Real lse = shift + std::log(sum);
  *logsumexp = lse;

  const Real* bias = static_cast<const Real*>(p.bias);
  const Real* threshold = static_cast<const Real*>(p.threshold);
  const bool softmax = p.scoring == Scoring::softmax, sigmoid = p.scoring == Scoring::sigmoid;
  if (bias || p.n_group > 1 || threshold) {
    // `choice` first holds the scores.
    if (softmax) {
      for (int32_t e = 0; e < n; ++e) choice[e] = exp_(logits[e] - lse);
    } else if (sigmoid) {
      for (int32_t e = 0; e < n; ++e) choice[e] = 1 / (1 + exp_(-logits[e]));
    } else {
      std::copy(logits, logits + n, choice);
    }
    bool below[kMaxExperts];
    if (threshold) {
      for (int32_t e = 0; e < n; ++e) below[e] = !(choice[e] >= threshold[e]);
    }
    if (bias || p.n_group > 1) {
      for (int32_t e = 0; e < n; ++e) {
        const Real value = choice[e] + (bias ? bias[e] : Real(0));
        choice[e] = value != value ? -std::numeric_limits<Real>::infinity() : value;
        keys[e] = order_key(choice[e]);
      }
    }
    if (p.n_group > 1) limit_groups(choice, keys, p);
    if (threshold) {
      for (int32_t e = 0; e < n; ++e) keys[e] = below[e] ? lowest_key<Key>() : keys[e];
    }
  }

  // Choose, then weigh.
  for (int32_t j = 0; j < k; ++j) {
    Key key;
    const int32_t e = argmax(keys, n, &key);
    const bool found = key > lowest_key<Key>();
    experts[j] = found ? e : -1;
    if (found) keys[e] = lowest_key<Key>();
  }
  const bool over_chosen = !sigmoid && (!softmax || p.renormalize);
  Real base = over_chosen ? -std::numeric_limits<Real>::infinity() : lse;
  if (over_chosen) {
    for (int32_t j = 0; j < k; ++j) {
      if (experts[j] >= 0) base = logits[experts[j]] > base ? logits[experts[j]] : base;
    }
  }
  Real total = 0;
  for (int32_t j = 0; j < k; ++j) {
    Real weight = 0;
    if (experts[j] >= 0) {
      const Real logit = logits[experts[j]];
      weight = sigmoid ? 1 / (1 + exp_(-logit)) : exp_(logit - base);
    }
    weights[j] = weight;
    total += weight;
  }
  Real factor = Real(p.scale);
  if (over_chosen) factor = experts[0] >= 0 ? factor / total : Real(0);
  if (sigmoid && p.renormalize) factor = factor / (total + Real(1e-20));
  for (int32_t j = 0; j < k; ++j) weights[j] *= factor;
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
    parallel_for(0, p.n_tokens, grain_for(64 * p.n_experts), [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) gate_token<T>(p, t);
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
