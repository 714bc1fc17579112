// The CPU kernels of the moe family, called as another host would call them.
#include <algorithm>
#include <cstdint>
#include <limits>
#include <set>
#include <vector>

#include "check.h"
#include "moe/combine.h"
#include "moe/dispatch.h"
#include "moe/gate.h"
#include "moe/plan.h"

using namespace sparsemoe;

namespace {

struct Gated {
  std::vector<float> weights, logsumexp;
  std::vector<int32_t> experts;
};

Gated gate(const std::vector<float>& logits, int64_t n_experts, int64_t top_k,
           Scoring scoring = Scoring::softmax, bool renormalize = false) {
  const int64_t n_tokens = int64_t(logits.size()) / n_experts;
  Gated out{std::vector<float>(n_tokens * top_k), std::vector<float>(n_tokens),
            std::vector<int32_t>(n_tokens * top_k)};
  GateParams p{};
  p.n_tokens = n_tokens;
  p.n_experts = n_experts;
  p.top_k = top_k;
  p.logits = logits.data();
  p.logits_stride = n_experts;
  p.dtype = DType::f32;
  p.scoring = scoring;
  p.renormalize = renormalize;
  p.scale = 1;
  p.n_group = p.topk_group = 1;
  p.weights = out.weights.data();
  p.experts = out.experts.data();
  p.logsumexp = out.logsumexp.data();
  gate_cpu(p);
  return out;
}

struct Planned {
  std::vector<int32_t> offsets, counts, row_token, row_pair, token_rows;
  RowMap map;
};

Planned plan(const std::vector<int32_t>& experts, int64_t top_k, int64_t n_experts,
             int64_t capacity = -1, const float* weights = nullptr) {
  const int64_t n_pairs = int64_t(experts.size());
  PlanParams p{};
  p.n_tokens = n_pairs / top_k;
  p.top_k = top_k;
  p.n_experts = n_experts;
  p.experts = experts.data();
  p.capacity = capacity;
  p.weights = weights;
  p.n_rows = capacity < 0 ? n_pairs : std::min(n_pairs, n_experts * capacity);
  Planned out;
  out.offsets.resize(n_experts + 1);
  out.counts.resize(n_experts);
  out.row_token.resize(p.n_rows);
  out.row_pair.resize(p.n_rows);
  out.token_rows.resize(n_pairs);
  std::vector<char> workspace(plan_workspace_bytes(p));
  p.offsets = out.offsets.data();
  p.counts = out.counts.data();
  p.row_token = out.row_token.data();
  p.row_pair = out.row_pair.data();
  p.token_rows = out.token_rows.data();
  p.workspace = workspace.data();
  plan_cpu(p);
  out.map = RowMap{p.n_tokens, top_k, p.n_rows, p.row_token, p.row_pair, p.token_rows, nullptr};
  return out;
}

using Ints = std::vector<int32_t>;

}  // namespace

TEST(gate_takes_the_largest) {
  const Gated out = gate({0, 2, 1, -1}, 4, 2);
  CHECK(out.experts == (Ints{1, 2}));
  const double sum = std::exp(0.0) + std::exp(2.0) + std::exp(1.0) + std::exp(-1.0);
  CHECK_NEAR(out.weights[0], std::exp(2.0) / sum, 1e-6);
  CHECK_NEAR(out.weights[1], std::exp(1.0) / sum, 1e-6);
  CHECK_NEAR(out.logsumexp[0], std::log(sum), 1e-6);
}

TEST(gate_renormalises) {
  const Gated out = gate({0, 2, 1, -1}, 4, 2, Scoring::softmax, true);
  CHECK_NEAR(out.weights[0], 1 / (1 + std::exp(-1.0)), 1e-6);
  CHECK_NEAR(out.weights[0] + out.weights[1], 1, 1e-6);
}

TEST(gate_breaks_ties_towards_the_lower_expert) {
  CHECK(gate({3, 5, 5, 5}, 4, 2).experts == (Ints{1, 2}));
}

TEST(gate_survives_nan_and_infinity) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const float inf = std::numeric_limits<float>::infinity();
  for (const std::vector<float>& logits :
       {std::vector<float>{nan, nan, nan, nan}, {inf, -inf, nan, 0}, {-inf, -inf, -inf, -inf}}) {
    const Gated out = gate(logits, 4, 3);
    std::set<int32_t> seen;
    for (int32_t expert : out.experts) {
      CHECK(expert >= -1 && expert < 4);
      CHECK(expert == -1 || seen.insert(expert).second);
    }
  }
}

TEST(plan_sorts_by_expert) {
  const Planned out = plan({2, 0, 0, 1, 2, 0}, 2, 4);
  CHECK(out.offsets == (Ints{0, 3, 4, 6, 6}));
  CHECK(out.counts == (Ints{3, 1, 2, 0}));
  CHECK(out.row_token == (Ints{0, 1, 2, 1, 0, 2}));
  CHECK(out.row_pair == (Ints{1, 2, 5, 3, 0, 4}));
  CHECK(out.token_rows == (Ints{4, 0, 1, 3, 5, 2}));
}

TEST(plan_leaves_out_what_has_no_expert) {
  const Planned out = plan({-1, 0, 7, 1}, 2, 2);
  CHECK(out.offsets == (Ints{0, 1, 2}));
  CHECK(out.token_rows == (Ints{-1, 0, -1, 1}));
  CHECK(out.row_token == (Ints{0, 1, -1, -1}));
}

TEST(plan_with_a_capacity_keeps_first_choices_first) {
  // Token 0 has expert 0 as its second choice, tokens 1 and 2 as their first.
  const Planned out = plan({1, 0, 0, 1, 0, 1}, 2, 2, 2);
  CHECK(out.counts == (Ints{3, 3}));
  CHECK(out.offsets == (Ints{0, 2, 4}));
  CHECK(out.token_rows == (Ints{2, -1, 0, 3, 1, -1}));
}

TEST(plan_with_weights_keeps_the_heaviest) {
  const float weights[] = {0.1f, 0.5f, 0.3f};
  const Planned out = plan({0, 0, 0}, 1, 1, 2, weights);
  CHECK(out.row_token == (Ints{1, 2}));
}

TEST(plan_of_no_tokens) {
  const Planned out = plan({}, 1, 3);
  CHECK(out.offsets == (Ints{0, 0, 0, 0}));
}

TEST(dispatch_and_combine_round_trip) {
  const int64_t n_tokens = 1000, width = 37, top_k = 3, n_experts = 11;
  Ints experts(n_tokens * top_k);
  for (int64_t i = 0; i < n_tokens * top_k; ++i) {
    experts[i] = int32_t((i / top_k * 7 + i % top_k) % n_experts);
  }
  const Planned planned = plan(experts, top_k, n_experts);
  std::vector<float> x(n_tokens * width), rows(n_tokens * top_k * width), y(x.size());
  for (size_t i = 0; i < x.size(); ++i) x[i] = float(i % 251);
  std::vector<float> weights(n_tokens * top_k);
  for (size_t i = 0; i < weights.size(); ++i) weights[i] = float(i % top_k + 1);

  DispatchParams d{};
  d.map = planned.map;
  d.x = x.data();
  d.row_bytes = d.x_stride_bytes = width * 4;
  d.rows = rows.data();
  dispatch_cpu(d);
  CombineParams c{};
  c.map = planned.map;
  c.width = c.rows_stride = width;
  c.dtype = DType::f32;
  c.rows = rows.data();
  c.weights = weights.data();
  c.y = y.data();
  combine_cpu(c);
  for (size_t i = 0; i < x.size(); ++i) CHECK_NEAR(y[i], 6 * x[i], 0);
}
