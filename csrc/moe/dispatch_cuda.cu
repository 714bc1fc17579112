#include <cuda_pipeline.h>

#include "moe/dispatch.h"
#include "moe/rows.cuh"

namespace sparsemoe {
namespace {

// A unit of work is 32 * kPacks packs of a token. A block first reads, all its warps together, and
// then writes: the memory turns from the one to the other less often, and the more a block holds,
// the less. So where there is enough work, blocks are as large as they come, and each warp holds
// one unit in registers and one in shared memory.
constexpr int kLargeBlock = 1024, kLargePacks = 8;
constexpr int kSmallBlock = 64, kSmallPacks = 4;
// One large block, without shared memory, on each of an H100's multiprocessors; three with it.
constexpr int64_t kManyUnits = 132 * kLargeBlock / 32;
constexpr int64_t kVeryManyUnits = 3 * 2 * kManyUnits;

// A store that stays in the second-level cache only.
template <class P>
__device__ void store(P* to, const P& pack) {
  if constexpr (sizeof(P) == 16) {
    __stcg(to, pack);
  } else {
    *to = pack;
  }
}

// A unit: packs of a token from `column` on, and the rows that they go to.
struct Unit {
  int64_t token;
  int column;
  Entries entries;
  int lane_row;  // row of entry lane_id()

  __device__ Unit(const RowMap& map, int64_t unit, int pieces, int packs) {
    token = pieces == 1 ? unit : unit / pieces;
    column = int(unit - token * pieces) * (32 * packs) + lane_id();
    entries = token < map.n_tokens ? entries_of(map, token) : Entries{0, 0};
    lane_row = lane_id() < entries.count ? row_of(map, entries.first + lane_id()) : -1;
  }
};

template <class P, int kPacks>
__device__ void write_rows(const RowMap& map, Unit unit, const P (&held)[kPacks], P* rows,
                           int width) {
  for (int j = 0; j < unit.entries.count; ++j) {
    if (j > 0 && j % 32 == 0) {
      const int next = j + lane_id();
      unit.lane_row = next < unit.entries.count ? row_of(map, unit.entries.first + next) : -1;
    }
    const int row = __shfl_sync(kFullWarp, unit.lane_row, j % 32);
    if (row < 0) continue;
    P* to = rows + int64_t(row) * width + unit.column;
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      if (unit.column + 32 * i < width) store(to + 32 * i, held[i]);
    }
  }
}

// Also clears the unused rows, each warp those of its share.
template <class P, int kPacks>
__global__ void __launch_bounds__(kLargeBlock)
    dispatch_kernel(const RowMap map, const P* x, int64_t x_stride, P* rows, int width, int pieces,
                    bool second) {
  extern __shared__ __align__(16) char shared_bytes[];
  P* const shared = reinterpret_cast<P*>(shared_bytes) + warp_id() * 32 * kPacks + lane_id();
  const int n_warps = blockDim.x / 32;
  const int64_t first = blockIdx.x * int64_t(second ? 2 * n_warps : n_warps) + warp_id();
  P held[kPacks];
  if constexpr (sizeof(P) == 16) {
    if (second) {
      const Unit unit(map, first + n_warps, pieces, kPacks);
      const P* from = x + unit.token * x_stride + unit.column;
#pragma unroll
      for (int i = 0; i < kPacks; ++i) {
        if (unit.entries.count > 0 && unit.column + 32 * i < width) {
          __pipeline_memcpy_async(shared + 32 * i, from + 32 * i, sizeof(P));
        }
      }
    }
  }
  const Unit unit(map, first, pieces, kPacks);
  const P* from = x + unit.token * x_stride + unit.column;
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    if (unit.entries.count > 0 && unit.column + 32 * i < width) held[i] = load(from + 32 * i);
  }
  const bool all_used = all_rows_used(map);
  __pipeline_wait_prior(0);
  __syncthreads();
  write_rows(map, unit, held, rows, width);
  if (second) {
#pragma unroll
    for (int i = 0; i < kPacks; ++i) held[i] = shared[32 * i];
    write_rows(map, Unit(map, first + n_warps, pieces, kPacks), held, rows, width);
  }
  if (!all_used) {
    clear_unused(map, blockIdx.x * int64_t(n_warps) + warp_id(), gridDim.x * int64_t(n_warps), rows,
                 width, [](int64_t) {});
  }
}

// Whether a block of the device may have that much shared memory.
bool has_shared(int bytes) {
  int device = 0, most = 0;
  return cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) ==
             cudaSuccess &&
         bytes <= most;
}

template <class P, int kPacks>
int dispatch_packs(const DispatchParams& p, int threads, void* stream) {
  const auto kernel = dispatch_kernel<P, kPacks>;
  const int64_t width = p.row_bytes / int64_t(sizeof(P));
  const int64_t pieces = ceil_div(width, 32 * kPacks);
  const int64_t n_units = std::max<int64_t>(1, p.map.n_tokens * pieces);
  int shared = threads * kPacks * int(sizeof(P));
  if (sizeof(P) < 16 || n_units < kVeryManyUnits || !has_shared(shared)) shared = 0;
  if (shared > 0) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
    if (error != cudaSuccess) return int(error);
  }
  const int64_t units_per_block = threads / 32 * (shared > 0 ? 2 : 1);
  kernel<<<unsigned(ceil_div(n_units, units_per_block)), threads, shared, cudaStream_t(stream)>>>(
      p.map, static_cast<const P*>(p.x), p.x_stride_bytes / int64_t(sizeof(P)),
      static_cast<P*>(p.rows), int(width), int(pieces), shared > 0);
  return int(cudaGetLastError());
}

}  // namespace

int dispatch_cuda(const DispatchParams& p, void* stream) {
  const int64_t together =
      p.row_bytes | p.x_stride_bytes | int64_t(uintptr_t(p.x)) | int64_t(uintptr_t(p.rows));
  return with_pack(together, [&](auto* type) {
    using P = std::remove_pointer_t<decltype(type)>;
    const int64_t large_unit = 32 * kLargePacks * sizeof(P);
    return p.map.n_tokens * ceil_div(p.row_bytes, large_unit) >= kManyUnits
               ? dispatch_packs<P, kLargePacks>(p, kLargeBlock, stream)
               : dispatch_packs<P, kSmallPacks>(p, kSmallBlock, stream);
  });
}

}  // namespace sparsemoe
