#include "moe/dispatch.h"

#include "moe/rows.cuh"

namespace sparsemoe {
namespace {

// Packs of a token's vector that a lane holds while it writes the rows.
constexpr int kHeld = 4;

// One warp a token and piece of 32 * kHeld packs; then the clearing warps.
template <class P>
__global__ void __launch_bounds__(kRowThreads)
    dispatch_kernel(const RowMap map, const P* x, int64_t x_stride, P* rows, int64_t width,
                    int64_t pieces) {
  const int64_t warp = blockIdx.x * int64_t(kRowWarps) + warp_id();
  if (warp >= map.n_tokens * pieces) {
    clear_unused(map, warp - map.n_tokens * pieces, rows, width, [](int64_t) {});
    return;
  }
  const int64_t token = warp / pieces;
  const int64_t column = (warp - token * pieces) * (32 * kHeld) + lane_id();
  const Entries entries = entries_of(map, token);
  int lane_row = lane_id() < entries.count ? row_of(map, entries.first + lane_id()) : -1;

  P held[kHeld];
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    if (column + 32 * i < width) held[i] = load_once(x + token * x_stride + column + 32 * i);
  }
  for (int j = 0; j < entries.count; ++j) {
    if (j > 0 && j % 32 == 0) {
      lane_row = j + lane_id() < entries.count ? row_of(map, entries.first + j + lane_id()) : -1;
    }
    const int row = __shfl_sync(kFullWarp, lane_row, j % 32);
    if (row < 0) continue;
    P* to = rows + row * width + column;
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      if (column + 32 * i < width) store_once(to + 32 * i, held[i]);
    }
  }
}

}  // namespace

int dispatch_cuda(const DispatchParams& p, void* stream) {
  const int64_t together = p.row_bytes | p.x_stride_bytes | int64_t(uintptr_t(p.x)) |
                           int64_t(uintptr_t(p.rows));
  return with_pack(together, [&](auto* type) {
    using P = std::remove_pointer_t<decltype(type)>;
    const int64_t width = p.row_bytes / int64_t(sizeof(P));
    const int64_t pieces = ceil_div(width, 32 * kHeld);
    const unsigned blocks = blocks_with_clearing(p.map.n_tokens * pieces, p.map.n_rows);
    dispatch_kernel<P><<<blocks, kRowThreads, 0, cudaStream_t(stream)>>>(
        p.map, static_cast<const P*>(p.x), p.x_stride_bytes / int64_t(sizeof(P)),
        static_cast<P*>(p.rows), width, pieces);
    return int(cudaGetLastError());
  });
}

}  // namespace sparsemoe
