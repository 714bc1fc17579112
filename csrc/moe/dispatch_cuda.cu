#include "moe/dispatch.h"
#include "moe/rows.cuh"

namespace sparsemoe {
namespace {

// Packs of a token's vector that a lane holds while it writes the rows.
constexpr int kHeld = 8;
// Large blocks that first read, all together, and then write: the memory turns from the one to the
// other less often. Where there is not enough work for all multiprocessors, small ones.
constexpr int kLargeBlock = 1024, kSmallBlock = 128;
constexpr int64_t kManyWarps = 132 * kLargeBlock / 32;

// A store that stays in the second-level cache only.
template <class P>
__device__ void store(P* to, const P& pack) {
  if constexpr (sizeof(P) == 16) {
    __stcg(to, pack);
  } else {
    *to = pack;
  }
}

// One warp a token and piece of 32 * kHeld packs; it also clears the unused of its share of rows.
template <class P>
__global__ void __launch_bounds__(kLargeBlock)
    dispatch_kernel(const RowMap map, const P* x, int64_t x_stride, P* rows, int64_t width,
                    int64_t pieces, int64_t n_warps) {
  const int64_t warp = blockIdx.x * int64_t(blockDim.x / 32) + warp_id();
  const int64_t token = warp / pieces;
  const int64_t column = (warp - token * pieces) * (32 * kHeld) + lane_id();
  const bool active = token < map.n_tokens;
  Entries entries{0, 0};
  P held[kHeld];
  if (active) {
    entries = entries_of(map, token);
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      if (column + 32 * i < width) held[i] = load(x + token * x_stride + column + 32 * i);
    }
  }
  int lane_row = lane_id() < entries.count ? row_of(map, entries.first + lane_id()) : -1;
  const bool all_used = all_rows_used(map);
  __syncthreads();
  for (int j = 0; j < entries.count; ++j) {
    if (j > 0 && j % 32 == 0) {
      lane_row = j + lane_id() < entries.count ? row_of(map, entries.first + j + lane_id()) : -1;
    }
    const int row = __shfl_sync(kFullWarp, lane_row, j % 32);
    if (row < 0) continue;
    P* to = rows + row * width + column;
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      if (column + 32 * i < width) store(to + 32 * i, held[i]);
    }
  }
  if (!all_used && warp < n_warps) {
    clear_unused(map, warp, n_warps, rows, width, [](int64_t) {});
  }
}

}  // namespace

int dispatch_cuda(const DispatchParams& p, void* stream) {
  const int64_t together =
      p.row_bytes | p.x_stride_bytes | int64_t(uintptr_t(p.x)) | int64_t(uintptr_t(p.rows));
  return with_pack(together, [&](auto* type) {
    using P = std::remove_pointer_t<decltype(type)>;
    const int64_t width = p.row_bytes / int64_t(sizeof(P));
    const int64_t pieces = ceil_div(width, 32 * kHeld);
    const int64_t n_warps = std::max<int64_t>(1, p.map.n_tokens * pieces);
    const int threads = n_warps >= kManyWarps ? kLargeBlock : kSmallBlock;
    dispatch_kernel<P>
        <<<unsigned(ceil_div(n_warps, threads / 32)), threads, 0, cudaStream_t(stream)>>>(
            p.map, static_cast<const P*>(p.x), p.x_stride_bytes / int64_t(sizeof(P)),
            static_cast<P*>(p.rows), width, pieces, n_warps);
    return int(cudaGetLastError());
  });
}

}  // namespace sparsemoe
