// The tensors of a plan, as the bindings of several ops take them.
#pragma once

#include "common/tensor.h"
#include "moe/dispatch.h"

namespace sparsemoe {

// A plan's tensors, checked and kept alive while `map` points into them.
struct PlanTensors {
  Tensor row_token, row_pair, token_rows;
  OptionalTensor token_offsets;
  RowMap map;

  PlanTensors(const Tensor& row_token_in, const Tensor& row_pair_in, const Tensor& token_rows_in,
              const OptionalTensor& token_offsets_in, const Tensor& like, const char* like_name)
      : row_token(int32_input(row_token_in, like, "plan.row_token", like_name)),
        row_pair(int32_input(row_pair_in, like, "plan.row_pair", like_name)),
        token_rows(int32_input(token_rows_in, like, "plan.token_rows", like_name)) {
    check_dim(row_token, 1, "plan.row_token", "[rows]");
    check_dim(row_pair, 1, "plan.row_pair", "[rows]");
    check_size(row_pair, 0, row_token.size(0), "plan.row_pair", "[rows]");
    map.n_rows = row_token.size(0);
    if (token_offsets_in) {
      token_offsets = int32_input(*token_offsets_in, like, "plan.token_offsets", like_name);
      check_dim(*token_offsets, 1, "plan.token_offsets", "[tokens + 1]");
      check_dim(token_rows, 1, "plan.token_rows", "[rows]");
      check_size(token_rows, 0, map.n_rows, "plan.token_rows", "[rows]");
      SPARSEMOE_CHECK(token_offsets->size(0) >= 1,
                      "plan.token_offsets must have shape [tokens + 1], got [0]");
      map.n_tokens = token_offsets->size(0) - 1;
      map.top_k = 0;
    } else {
      check_dim(token_rows, 2, "plan.token_rows", "[tokens, top_k]");
      map.n_tokens = token_rows.size(0);
      map.top_k = token_rows.size(1);
    }
    map.row_token = pointer<int32_t>(row_token);
    map.row_pair = pointer<int32_t>(row_pair);
    map.token_rows = pointer<int32_t>(token_rows);
    map.token_offsets = pointer<int32_t>(token_offsets);
  }

  int64_t n_pairs() const { return token_rows.numel(); }
};

}  // namespace sparsemoe
