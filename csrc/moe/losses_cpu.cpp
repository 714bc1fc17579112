#include "moe/losses.h"

#define SPARSEMOE_THIS_FILE "moe/losses_cpu.cpp"
#include "common/for_each_isa.h"

#ifndef SPARSEMOE_DISPATCH
#include "common/lanes_cpu.h"

namespace sparsemoe {
namespace SPARSEMOE_ISA {

inline int64_t total(const int32_t* counts, int64_t n) {
  int64_t sum = 0;
  for (int64_t e = 0; e < n; ++e) sum += counts[e];
  return std::max<int64_t>(sum, 1);
}

inline int64_t unmasked(const bool* mask, int64_t n) {
  int64_t sum = n;
  if (mask) sum = std::count(mask, mask + n, true);
  return std::max<int64_t>(sum, 1);
}

// Shares of the tokens whose sums are added in order: the same bits for any number of threads.
constexpr int64_t kShares = 32;
static_assert(kShares <= kLossBlocks, "the workspace holds kLossBlocks sums");

template <class T>
void balance(const LoadBalanceParams& p) {
  using Real = acc_t<T>;
  const int64_t n = p.n_experts;
  Real* partial = static_cast<Real*>(p.workspace);
  const int64_t share = (p.n_tokens + kShares * kLanes - 1) / (kShares * kLanes) * kLanes;
  parallel_for(0, kShares, grain_for(share * n * 16), [&](int64_t begin, int64_t end) {
    std::vector<Real> rows(n * kLanes), sum(n * kLanes);
    for (int64_t block = begin; block < end; ++block) {
      std::fill(sum.begin(), sum.end(), Real(0));
      const int64_t stop = std::min(p.n_tokens, (block + 1) * share);
      for (int64_t first = block * share; first < stop; first += kLanes) {
        const int64_t count = std::min<int64_t>(kLanes, stop - first);
        load_lanes(static_cast<const T*>(p.logits) + first * p.logits_stride, p.logits_stride, n,
                   count, rows.data());
        softmax_lanes(rows.data(), n);
        int32_t counted[kLanes];
        for (int64_t i = 0; i < kLanes; ++i) {
          counted[i] = i < count && (!p.mask || p.mask[first + i]);
        }
        for (int64_t e = 0; e < n; ++e) {
          SPARSEMOE_LANES(i) {
            const Real probability = rows[e * kLanes + i];
            sum[e * kLanes + i] += counted[i] ? probability : Real(0);
          }
        }
      }
      for (int64_t e = 0; e < n; ++e) {
        Real total = 0;
        for (int32_t i = 0; i < kLanes; ++i) total += sum[e * kLanes + i];
        partial[block * n + e] = total;
      }
    }
  });
  const Real tokens = Real(unmasked(p.mask, p.n_tokens)), pairs = Real(total(p.counts, n));
  std::vector<Real> sum(n);
  for (int64_t block = 0; block < kShares; ++block) {
    for (int64_t e = 0; e < n; ++e) sum[e] += partial[block * n + e];
  }
  Real loss = 0;
  for (int64_t e = 0; e < n; ++e) loss += Real(p.counts[e]) / pairs * (sum[e] / tokens);
  *static_cast<Real*>(p.loss) = loss * Real(n);
}

template <class T>
void balance_backward(const LoadBalanceBackwardParams& p) {
  using Real = acc_t<T>;
  const int64_t n = p.n_experts;
  const Real factor = *static_cast<const Real*>(p.grad) * Real(n) /
                      (Real(unmasked(p.mask, p.n_tokens)) * Real(total(p.counts, n)));
  const auto gradient = [&](int64_t first, int64_t count, Real* rows) {
    Real inner[kLanes] = {};
    for (int64_t e = 0; e < n; ++e) {
      const Real c = Real(p.counts[e]);
      SPARSEMOE_LANES(i) inner[i] += rows[e * kLanes + i] * c;
    }
    for (int64_t e = 0; e < n; ++e) {
      const Real c = Real(p.counts[e]);
      SPARSEMOE_LANES(i) rows[e * kLanes + i] *= factor * (c - inner[i]);
    }
    T* out = static_cast<T*>(p.grad_logits) + first * n;
    store_lanes(rows, n, count, out, n);
    for (int64_t i = 0; p.mask && i < count; ++i) {
      if (!p.mask[first + i]) std::memset(static_cast<void*>(out + i * n), 0, n * sizeof(T));
    }
  };
  for_each_softmax(static_cast<const T*>(p.logits), p.logits_stride, p.n_tokens, n, gradient);
}

template <class Real>
void z_loss(const ZLossParams& p) {
  const Real* lse = static_cast<const Real*>(p.logsumexp);
  Real* partial = static_cast<Real*>(p.workspace);
  const int64_t per_block = (p.n_tokens + kLossBlocks - 1) / kLossBlocks;
  parallel_for(0, kLossBlocks, grain_for(per_block * 4), [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      Real sum = 0;
      const int64_t stop = std::min(p.n_tokens, (block + 1) * per_block);
      for (int64_t t = block * per_block; t < stop; ++t) {
        if (!p.mask || p.mask[t]) sum += lse[t] * lse[t];
      }
      partial[block] = sum;
    }
  });
  Real sum = 0;
  for (int64_t block = 0; block < kLossBlocks; ++block) sum += partial[block];
  *static_cast<Real*>(p.loss) = sum / Real(unmasked(p.mask, p.n_tokens));
}

template <class Real>
void z_loss_backward(const ZLossBackwardParams& p) {
  const Real* lse = static_cast<const Real*>(p.logsumexp);
  const Real factor = 2 * *static_cast<const Real*>(p.grad) / Real(unmasked(p.mask, p.n_tokens));
  for (int64_t t = 0; t < p.n_tokens; ++t) {
    static_cast<Real*>(p.grad_logsumexp)[t] = !p.mask || p.mask[t] ? factor * lse[t] : Real(0);
  }
}

template <class Real>
void update_bias(const UpdateBiasParams& p) {
  int64_t pairs = 0;
  for (int64_t e = 0; e < p.n_experts; ++e) pairs += p.counts[e];
  for (int64_t e = 0; e < p.n_experts; ++e) {
    const int64_t below = pairs - p.n_experts * p.counts[e];
    static_cast<Real*>(p.bias)[e] += Real(p.rate) * Real((below > 0) - (below < 0));
  }
}

void load_balance_loss(const LoadBalanceParams& p) {
  with_dtype(p.dtype, [&](auto* type) { balance<std::remove_pointer_t<decltype(type)>>(p); });
}
void load_balance_loss_backward(const LoadBalanceBackwardParams& p) {
  with_dtype(p.dtype,
             [&](auto* type) { balance_backward<std::remove_pointer_t<decltype(type)>>(p); });
}
void router_z_loss(const ZLossParams& p) {
  p.dtype == DType::f64 ? z_loss<double>(p) : z_loss<float>(p);
}
void router_z_loss_backward(const ZLossBackwardParams& p) {
  p.dtype == DType::f64 ? z_loss_backward<double>(p) : z_loss_backward<float>(p);
}
void update_expert_bias(const UpdateBiasParams& p) {
  p.dtype == DType::f64 ? update_bias<double>(p) : update_bias<float>(p);
}

}  // namespace SPARSEMOE_ISA
}  // namespace sparsemoe

#else
namespace sparsemoe {

void load_balance_loss_cpu(const LoadBalanceParams& p) { SPARSEMOE_BEST_ISA(load_balance_loss, p); }
void load_balance_loss_backward_cpu(const LoadBalanceBackwardParams& p) {
  SPARSEMOE_BEST_ISA(load_balance_loss_backward, p);
}
void router_z_loss_cpu(const ZLossParams& p) { SPARSEMOE_BEST_ISA(router_z_loss, p); }
void router_z_loss_backward_cpu(const ZLossBackwardParams& p) {
  SPARSEMOE_BEST_ISA(router_z_loss_backward, p);
}
void update_expert_bias_cpu(const UpdateBiasParams& p) {
  SPARSEMOE_BEST_ISA(update_expert_bias, p);
}

}  // namespace sparsemoe
#endif
