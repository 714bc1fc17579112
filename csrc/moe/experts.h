// The experts: matrix products each of whose rows belongs to an expert, with what can be done in
// the same pass. R rows, E experts, H model width, F expert width.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/dtype.h"
#include "moe/dispatch.h"

namespace sparsemoe {

enum class Activation : int32_t { none, swiglu, geglu, relu2, silu, gelu };

// Columns of the first projection for each column of the second: the gate's come first.
inline int64_t columns_per_hidden(Activation a) {
  return a == Activation::swiglu || a == Activation::geglu ? 2 : 1;
}

// Expert e has the rows offsets[e] <= r < offsets[e+1]. On a GPU, offsets are read by kernels only.
struct ExpertRows {
  const int32_t* offsets;  // [n_experts + 1], ascending from 0 to at most n_rows
  int64_t n_experts, n_rows;
};

// R rows of a matrix: row r is data[r], or data[index[r]]. An index outside 0..n-1 is a row of
// zeros.
struct Rows {
  const void* data;  // [n, width], rows `stride` elements apart
  int64_t stride, n;
  const int32_t* index;  // [R] or null
};

// A matrix [k, n] for each expert. Element (i, j) of that of expert e lies at
// data[e * expert_stride + i * stride + j], by column at data[e * expert_stride + j * stride + i].
struct Matrices {
  const void* data;
  int64_t stride, expert_stride;
  bool by_column;

  Matrices transposed() const { return {data, stride, expert_stride, !by_column}; }
};

// For r of expert e: pre[r] = a[r] @ b[e] + bias[e]; out[r] = activation(pre[r]).
struct RowsProductParams {
  ExpertRows experts;
  int32_t* counter;  // zero before the kernel, for handing out tiles; or null
  DType dtype;       // of everything; sums are float
  Rows a;
  int64_t k, n;      // pre is n wide, out n / columns_per_hidden(activation)
  Matrices b;        // [k, n]
  const void* bias;  // [E, n], rows bias_stride apart, or null
  int64_t bias_stride;
  Activation activation;
  void* pre;  // [R, n] or null; null where activation is none
  void* out;  // rows out_stride apart. Rows of no expert are left as they are
  int64_t out_stride;
};

// No token has more than kFewRows rows. For each token t: y[t] = the sum over its rows r, of expert
// e, of weight[r] * (rows[r] @ b[e] + bias[e]).
struct TokenSumsParams {
  ExpertRows experts;
  DType dtype;  // as above
  RowMap map;
  int64_t k, n;
  const void* rows;      // [R, k]
  Matrices b;            // [k, n], by column
  const void* bias;      // [E, n] or null
  const float* weights;  // by pair, or null: ones
  void* y;               // [n_tokens, n]
};

// The way back through the second projection, weighting and activation. With
// d hidden[r] = grad[r] @ down[e]:
//   grad_pre[r] = weight[r] * d hidden[r] * activation'(pre[r])
//   hidden[r] = weight[r] * activation(pre[r])
//   inner[i][r], summed over i, is <d hidden[r], activation(pre[r])>
struct HiddenBackwardParams {
  ExpertRows experts;
  int32_t* counter;  // as above
  DType dtype;
  Rows grad;  // [.., h]
  int64_t h, f;
  Matrices down;    // [h, f]
  const void* pre;  // [R, f * columns_per_hidden]
  Activation activation;
  const float* weights;     // by pair, or null: ones
  const int32_t* row_pair;  // [R]: weight[r] = weights[row_pair[r]]; outside 0..n_pairs-1: zero
  int64_t n_pairs;
  void* grad_pre;  // as pre
  void* hidden;    // [R, f]
  float* inner;    // [inner_parts(f), R] or null
};
constexpr int64_t kInnerColumns = 256;  // columns of hidden that one part of `inner` sums over
inline int64_t inner_parts(int64_t f) { return (f + kInnerColumns - 1) / kInnerColumns; }

// out[e] = sum over the rows r of expert e of outer(a[r], b[r]). Zero for an expert without rows.
struct WeightGradParams {
  ExpertRows experts;
  int32_t* counter;  // as above
  DType dtype;
  Rows a, b;
  int64_t m, n;
  void* out;  // [E, m, n] of dtype; with `accumulate` of float, and added to
  bool accumulate;
};

// out[e] = sum over the rows r of expert e of weight[r] * a[r].
struct BiasGradParams {
  ExpertRows experts;
  DType dtype;
  Rows a;
  int64_t n;
  const float* weights;  // as above
  const int32_t* row_pair;
  int64_t n_pairs;
  void* out;  // [E, n] of dtype
};

// grad_weights[row_pair[r]] = sum over i of inner[i][r], plus <grad[r], down_bias[e]> where there
// is a bias; zero for pairs without a row.
struct PairGradParams {
  ExpertRows experts;
  DType dtype;
  const float* inner;
  int64_t n_parts;
  const int32_t* row_pair;
  int64_t n_pairs;
  const void* down_bias;  // [E, h] or null
  Rows grad;
  int64_t h;
  float* grad_weights;  // [n_pairs]
};

// Clears the rows *end .. n_rows - 1.
struct ClearTailParams {
  const int32_t* end;
  int64_t n_rows, row_bytes;
  void* rows;
};

int rows_product_cuda(const RowsProductParams& p, void* stream);
int hidden_backward_cuda(const HiddenBackwardParams& p, void* stream);
int weight_grad_cuda(const WeightGradParams& p, void* stream);
int bias_grad_cuda(const BiasGradParams& p, void* stream);
int pair_grad_cuda(const PairGradParams& p, void* stream);
int clear_tail_cuda(const ClearTailParams& p, void* stream);

// For few rows, whose experts are mostly different. b by column.
constexpr int64_t kFewRows = 32;
inline bool few_rows(const ExpertRows& experts, int64_t k, int64_t n) {
  return experts.n_rows <= kFewRows && experts.n_rows <= experts.n_experts &&
         std::max(k, n) < (int64_t(1) << 19);  // so that k is an int, and the blocks fit a grid
}
int rows_product_few(const RowsProductParams& p, void* stream);
// Must follow the kernel that makes `rows`: it reads all else while that kernel still runs.
int token_sums_few_cuda(const TokenSumsParams& p, void* stream);

// Any GPU of compute capability 8.0 or later, any width, also float.
int rows_product_portable(const RowsProductParams& p, void* stream);
int hidden_backward_portable(const HiddenBackwardParams& p, void* stream);
int weight_grad_portable(const WeightGradParams& p, void* stream);

}  // namespace sparsemoe
