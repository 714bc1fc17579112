// Small problems, as there are many at once: each is balanced within a warp.
#pragma once

#include "sinkhorn/sinkhorn.h"

namespace sparsemoe {

constexpr int64_t kMostSmallGradientColumns = 32;

inline bool is_small(const SinkhornProblems& in) {
  return in.n_rows <= kSmallSize && in.n_columns <= kSmallSize;
}
// Whether the gradient needs no history; it keeps the columns' scalings in shared memory.
bool small_gradient_fits(const SinkhornProblems& in);

int small_cuda(const SinkhornParams& p, void* stream);
int small_backward_cuda(const SinkhornBackwardParams& p, void* stream);

}  // namespace sparsemoe
