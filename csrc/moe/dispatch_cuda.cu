#include <cuda_pipeline.h>

#include "moe/dispatch.h"
#include "moe/rows.cuh"

namespace sparsemoe {
namespace {

// A unit of work is 32 * kPacks packs of a token. A block first reads, all its warps together, and
// then writes: the memory turns from the one to the other less often, and the more a block holds,
// the less. So where there is enough work, blocks are as large as they come: they hold one unit a
// warp in registers, and more in shared memory. Where there is little, units are small.
constexpr int kLargeBlock = 1024, kLargePacks = 8;
constexpr int kSmallBlock = 128, kSmallPacks = 4;

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
                    int n_shared) {
  extern __shared__ __align__(16) char shared_bytes[];
  P* const shared = reinterpret_cast<P*>(shared_bytes) + lane_id();
  const int n_warps = blockDim.x / 32;
  const int64_t first = blockIdx.x * int64_t(n_warps + n_shared);
  P held[kPacks];
  if constexpr (sizeof(P) == 16) {
    for (int s = warp_id(); s < n_shared; s += n_warps) {
      const Unit unit(map, first + n_warps + s, pieces, kPacks);
      const P* from = x + unit.token * x_stride + unit.column;
#pragma unroll
      for (int i = 0; i < kPacks; ++i) {
        if (unit.entries.count > 0 && unit.column + 32 * i < width) {
          __pipeline_memcpy_async(shared + (s * kPacks + i) * 32, from + 32 * i, sizeof(P));
        }
      }
    }
  }
  const Unit unit(map, first + warp_id(), pieces, kPacks);
  const P* from = x + unit.token * x_stride + unit.column;
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    if (unit.entries.count > 0 && unit.column + 32 * i < width) held[i] = load(from + 32 * i);
  }
  const bool all_used = all_rows_used(map);
  __pipeline_commit();
  __pipeline_wait_prior(0);
  __syncthreads();
  write_rows(map, unit, held, rows, width);
  for (int s = warp_id(); s < n_shared; s += n_warps) {
#pragma unroll
    for (int i = 0; i < kPacks; ++i) held[i] = shared[(s * kPacks + i) * 32];
    write_rows(map, Unit(map, first + n_warps + s, pieces, kPacks), held, rows, width);
  }
  if (!all_used) {
    clear_unused(map, blockIdx.x * int64_t(n_warps) + warp_id(), gridDim.x * int64_t(n_warps), rows,
                 width);
  }
}

int attribute(cudaDeviceAttr which) {
  int device = 0, value = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&value, which, device);
  return value;
}

// Units of a large block in shared memory: as few as do the work in the least number of rounds of
// a block a multiprocessor, so that none is idle in the last.
int shared_units(int64_t n_units, int n_warps, int most) {
  const int64_t n_multiprocessors = attribute(cudaDevAttrMultiProcessorCount);
  const int64_t rounds = ceil_div(n_units, n_multiprocessors * (n_warps + most));
  return int(std::max<int64_t>(0, ceil_div(n_units, n_multiprocessors * rounds) - n_warps));
}

template <class P, int kPacks>
int dispatch_packs(const DispatchParams& p, int threads, void* stream) {
  const auto kernel = dispatch_kernel<P, kPacks>;
  const int64_t width = p.row_bytes / int64_t(sizeof(P));
  const int64_t pieces = ceil_div(width, 32 * kPacks);
  const int64_t n_units = std::max<int64_t>(1, p.map.n_tokens * pieces);
  const int n_warps = threads / 32, unit_bytes = 32 * kPacks * int(sizeof(P));
  const bool large = threads == kLargeBlock && sizeof(P) == 16;
  const int most_bytes = large ? attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) : 0;
  const int n_shared = large ? shared_units(n_units, n_warps, most_bytes / unit_bytes) : 0;
  if (n_shared > 0) {
    // Always the same value: threads that launch at the same time share this attribute.
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most_bytes);
    if (error != cudaSuccess) return int(cudaGetLastError());
  }
  kernel<<<unsigned(ceil_div(n_units, n_warps + n_shared)), threads, n_shared * unit_bytes,
           cudaStream_t(stream)>>>(p.map, static_cast<const P*>(p.x),
                                   p.x_stride_bytes / int64_t(sizeof(P)), static_cast<P*>(p.rows),
                                   int(width), int(pieces), n_shared);
  return int(cudaGetLastError());
}

}  // namespace

int dispatch_cuda(const DispatchParams& p, void* stream) {
  const int64_t together =
      p.row_bytes | p.x_stride_bytes | int64_t(uintptr_t(p.x)) | int64_t(uintptr_t(p.rows));
  return with_pack(together, [&](auto* type) {
    using P = std::remove_pointer_t<decltype(type)>;
    const auto units = [&](int packs) {  // for each multiprocessor
      const int64_t n_units = p.map.n_tokens * ceil_div(p.row_bytes, 32 * packs * int(sizeof(P)));
      return n_units / attribute(cudaDevAttrMultiProcessorCount);
    };
    if (units(kLargePacks) >= kLargeBlock / 32) {
      return dispatch_packs<P, kLargePacks>(p, kLargeBlock, stream);
    }
    return units(1) < 16 ? dispatch_packs<P, 1>(p, kSmallBlock, stream)
                         : dispatch_packs<P, kSmallPacks>(p, kSmallBlock, stream);
  });
}

}  // namespace sparsemoe
