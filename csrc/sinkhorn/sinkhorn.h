// Sinkhorn balancing: P = diag(u) K diag(v) with K = exp(logits / temperature), whose rows sum to r
// and whose columns come to sum to c. With v_0 = 1:
//
//   u_0 = r / (K v_0);  v_i = c / (K^T u_{i-1}),  u_i = r / (K v_i)  for i = 1 .. iterations
//
// The columns' error after iteration i, sum_e |c - sum_t P| / sum(r), can end it early. A row or a
// column in which nothing is allowed holds zeros; so does a row whose r is 0 or whose mask is
// false, and of it c knows nothing.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace sparsemoe {

constexpr int64_t kMaxColumns = 1024;
// Up to so many rows and columns a problem is small: its scalings are not kept but computed again.
constexpr int64_t kSmallSize = 64;

struct SinkhornProblems {
  int64_t n_problems, n_rows, n_columns;
  const void* logits;  // [n_problems, n_rows, n_columns]
  DType dtype;
  double temperature;
  int64_t n_iters;
  double tolerance;           // below 0: none
  const void* row_marginals;  // r, [n_problems, n_rows], or null: ones
  const void* col_marginals;  // c, [n_problems, n_columns], or null: sum(r) / n_columns
  const bool* mask;           // [n_problems, n_rows] or null
};

// Reals are float, or double where dtype is f64; so are the marginals.
struct SinkhornParams {
  SinkhornProblems in;
  bool measures;    // whether log_u, log_v and error are wanted; else they are null
  void* plan;       // [n_problems, n_rows, n_columns]
  void* log_u;      // [n_problems, n_rows]
  void* log_v;      // [n_problems, n_columns]
  void* error;      // [n_problems]
  int32_t* state;   // [n_problems, 2]: iterations, and how `history` is written
  double* history;  // [n_problems, n_iters, n_columns] for the backward pass, or null
  void* workspace;  // of sinkhorn_workspace_bytes
};

struct SinkhornBackwardParams {
  SinkhornProblems in;
  const void* grad;  // of plan
  const int32_t* state;
  const double* history;  // null for small problems
  void* grad_logits;      // [n_problems, n_rows, n_columns] of dtype
  void* workspace;        // of sinkhorn_backward_workspace_bytes
};

void sinkhorn_cpu(const SinkhornParams& p);
void sinkhorn_backward_cpu(const SinkhornBackwardParams& p);
// Of the kernels for a GPU; those for the CPU need no workspace, and of small problems no history.
bool sinkhorn_backward_needs_history(const SinkhornProblems& in);
int64_t sinkhorn_workspace_bytes(const SinkhornProblems& in);
int64_t sinkhorn_backward_workspace_bytes(const SinkhornProblems& in);
// Each returns a cudaError_t.
int sinkhorn_cuda(const SinkhornParams& p, void* stream);
int sinkhorn_backward_cuda(const SinkhornBackwardParams& p, void* stream);

}  // namespace sparsemoe
