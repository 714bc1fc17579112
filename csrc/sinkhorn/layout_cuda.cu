#include "common/cuda.cuh"
#include "sinkhorn/layout.h"
#include "sinkhorn/rows.cuh"
#include "sinkhorn/small.h"

namespace sparsemoe {

SinkhornLayout::SinkhornLayout(const SinkhornProblems& in) {
  const int64_t all = multiprocessors();
  with_sinkhorn_tile<32>(in, [&](auto tile) {
    padded = decltype(tile)::kPadded;
    return 0;
  });
  // A block with fewer elements spends most of its time on exchanges; one with more, on reading.
  constexpr int64_t kElements = 4096, kMostOfOneBlock = 49152;
  const int64_t elements = in.n_rows * padded;
  const int64_t wanted = std::max<int64_t>(1, ceil_div(elements, kElements));
  clusters =
      runs_sm_90a() && !(elements <= kMostOfOneBlock && in.n_problems > all / 4) && wanted > 1;
  const int64_t unit = clusters ? 8 : 1;
  const int64_t units = all / unit;
  const int64_t each = std::max<int64_t>(1, units / std::min(in.n_problems, units));
  team_blocks = unit * std::min(each, ceil_div(wanted, unit));
  if (!runs_sm_90a() && elements <= kMostOfOneBlock) team_blocks = 1;
  n_teams = std::min(in.n_problems, all / team_blocks);
}

bool sinkhorn_backward_needs_history(const SinkhornProblems& in) {
  return !small_gradient_fits(in);
}
int64_t sinkhorn_workspace_bytes(const SinkhornProblems& in) {
  return SinkhornLayout(in).slot_bytes();
}
int64_t sinkhorn_backward_workspace_bytes(const SinkhornProblems& in) {
  const SinkhornLayout layout(in);
  return layout.slot_bytes() + layout.rows_bytes(in) + layout.columns_bytes(in);
}

}  // namespace sparsemoe
