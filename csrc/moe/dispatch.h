// Dispatch: each token's vector copied to its rows.
#pragma once

#include <cstdint>

namespace sparsemoe {

// The rows of each token: token_rows[t*top_k .. +top_k], or, with token_offsets,
// token_rows[token_offsets[t] .. token_offsets[t+1]]. -1 stands for none.
struct RowMap {
  int64_t n_tokens, top_k, n_rows;
  const int32_t* row_token;      // [n_rows]
  const int32_t* row_pair;       // [n_rows]; read only with token_offsets
  const int32_t* token_rows;     // [n_tokens, top_k] or [n_rows]
  const int32_t* token_offsets;  // [n_tokens + 1] or null
};

struct DispatchParams {
  RowMap map;
  const void* x;      // [n_tokens, row_bytes], rows x_stride_bytes apart
  int64_t row_bytes;  // of any element type
  int64_t x_stride_bytes;
  void* rows;  // [n_rows, row_bytes]; rows without a token become zero
};

void dispatch_cpu(const DispatchParams& p);
int dispatch_cuda(const DispatchParams& p, void* stream);

}  // namespace sparsemoe
