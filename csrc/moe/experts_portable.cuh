// What the matrix products of experts share: a block takes a tile. How many blocks there are does
// not depend on the experts' rows; those without a tile leave at once.
#pragma once

#include "moe/experts_portable.h"
#include "moe/experts_portable_tile.cuh"
#include "moe/experts_rows.cuh"

namespace sparsemoe {
namespace portable {

template <class T>
constexpr int kBlocksPerMultiprocessor = sizeof(T) == 2 ? 2 : 1;

// --- the order of the tiles ---

// Tiles of kGroup x n_columns are taken together, so that what they share stays in the L2.
constexpr int kGroup = 8;

struct Place {
  int row, column;  // of tiles
};
__device__ inline Place place_of(int64_t block, int n_rows, int n_columns) {
  const int64_t size = int64_t(kGroup) * n_columns;
  const int group = int(block / size), in_group = int(block - group * size);
  const int height = min(kGroup, n_rows - group * kGroup);
  const int column = in_group / height;
  return {group * kGroup + in_group - column * height, column};
}

inline int64_t row_tiles_at_most(const ExpertRows& experts) {
  return std::min(experts.n_rows, experts.n_rows / kTile + experts.n_experts);
}

// Tile `tile` of the experts' rows, expert by expert; without rows past the last one.
struct RowTile {
  int64_t expert, first;
  int rows;
};
__device__ inline RowTile row_tile(const ExpertRows& experts, int tile) {
  constexpr int kEach = 4;  // experts to a lane
  int before = 0;
  for (int64_t base = 0; base < experts.n_experts; base += 32 * kEach) {
    const int64_t mine = base + lane_id() * kEach;
    int bound[kEach + 1], tiles[kEach], total = 0;
#pragma unroll
    for (int i = 0; i <= kEach; ++i) {
      bound[i] = expert_begin(experts, min(mine + i, experts.n_experts));
    }
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      tiles[i] = bound[i] < bound[i + 1] ? (bound[i + 1] - bound[i] - 1) / kTile + 1 : 0;
      total += tiles[i];
    }
    const int end = before + warp_scan(total);
    const unsigned above = __ballot_sync(kFullWarp, end > tile);
    if (above) {
      int t = tile - (end - total), expert = 0, first = 0, rows = 0;
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        if (t >= 0 && t < tiles[i]) {
          expert = int(mine) + i;
          first = bound[i] + t * kTile;
          rows = min(bound[i + 1] - first, kTile);
        }
        t -= tiles[i];
      }
      const int lane = __ffs(above) - 1;
      return {__shfl_sync(kFullWarp, expert, lane), __shfl_sync(kFullWarp, first, lane),
              __shfl_sync(kFullWarp, rows, lane)};
    }
    before = __shfl_sync(kFullWarp, end, 31);
  }
  return {0, 0, 0};
}

// --- results ---

// A thread has `valid` of the N elements from `to` on. Packs where `aligned`.
template <class T, int N>
__device__ void store_some(T* to, const float (&v)[N], int valid, bool aligned) {
  if (aligned && valid == N) {
#pragma unroll
    for (int i = 0; i < N; i += kPack<T>) {
      *reinterpret_cast<Pack<T, kPack<T>>*>(to + i) = Pack<T, kPack<T>>::of(v + i);
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (i < valid) to[i] = from_float<T>(v[i]);
    }
  }
}
template <class T, int N>
__device__ void load_some(const T* from, float (&v)[N], int valid, bool aligned) {
  if (aligned && valid == N) {
#pragma unroll
    for (int i = 0; i < N; i += kPack<T>) {
      load(reinterpret_cast<const Pack<T, kPack<T>>*>(from + i)).unpack(v + i);
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] = i < valid ? to_float(from[i]) : 0.0f;
  }
}
template <int N>
__device__ void load_sums(const float* sums, int row, int column, float (&v)[N]) {
#pragma unroll
  for (int i = 0; i < N; i += 4) {
    const float4 four = *reinterpret_cast<const float4*>(sums + sum_at(row, column + i));
    v[i] = four.x, v[i + 1] = four.y, v[i + 2] = four.z, v[i + 3] = four.w;
  }
}

// --- launching ---

// Whether rows of `width` elements are made of whole chunks, wherever they lie.
template <class T>
bool in_chunks(const void* data, int64_t stride, int64_t width) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && (stride | width) % kPack<T> == 0;
}

// Matrices [k, n], or where gated [k, 2 n].
template <class T>
bool in_chunks(const Matrices& b, int64_t k, int64_t n) {
  return in_chunks<T>(b.data, b.stride | b.expert_stride, b.by_column ? k : n);
}

// Calls f with true_type or false_type.
template <class F>
int with_bool(bool value, F f) {
  return value ? f(std::true_type()) : f(std::false_type());
}

template <class Kernel, class... Arguments>
int launch(Kernel* kernel, int64_t blocks, void* stream, Arguments... arguments) {
  if (blocks == 0) return 0;
  if (blocks > INT32_MAX) return int(cudaErrorInvalidConfiguration);
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(Shared));
  if (error != cudaSuccess) return int(error);
  kernel<<<unsigned(blocks), kThreads, sizeof(Shared), cudaStream_t(stream)>>>(arguments...);
  return int(cudaGetLastError());
}

}  // namespace portable
}  // namespace sparsemoe
