// What the expert kernels for Hopper share: the tile, its pipeline through shared memory, the order
// of the tiles, and how results leave.
//
// A block has three warpgroups. The first keeps stages of both operands coming: by the TMA, or by
// 16-byte copies where rows are gathered by index. The other two multiply, 64 rows of the tile
// each, and store their results; they never wait for each other, so that one stores while the other
// multiplies. Two blocks make a cluster, whose tiles lie one above the other (but see RowTiles):
// each loads half of the b that both need. Clusters are persistent, and take the next pair of tiles
// when they are free.
#pragma once

#include "common/hopper.cuh"
#include "common/tensor_map.h"
#include "moe/experts_hopper.h"

namespace sparsemoe {
namespace hopper {

constexpr int kTileM = 128, kTileN = 256, kTileK = 64;
constexpr int kThreads = 384, kStages = 4;
// Of a thread of the loading warpgroup, and of the others.
constexpr int kLoadRegisters = 56, kMultiplyRegisters = 224;
constexpr int kBoxElements = 64 * kBoxWidth, kBoxBytes = 2 * kBoxElements;
constexpr uint32_t kBytesA = 2 * kTileM * kTileK, kBytesB = 2 * kTileN * kTileK;

// Pairs of tiles are taken in groups of kGroupM x n_tiles, so that what they share stays in the L2.
constexpr int kPairM = 2 * kTileM;
constexpr int kGroupM = 8;

struct Shared {
  uint16_t a[kStages][kTileM * kTileK];
  uint16_t b[kStages][kTileN * kTileK];
  uint16_t boxes[2][2][kBoxElements];  // of each multiplying warpgroup
  uint64_t full[kStages], empty[kStages];
  int next[2];  // pairs of tiles
  uint64_t next_full[2], next_empty[2];
};

__device__ inline Shared& shared() {
  extern __shared__ __align__(1024) unsigned char memory[];
  return *reinterpret_cast<Shared*>(memory);
}

// A place in a ring of N buffers.
template <int N>
struct Place {
  int index = 0;
  uint32_t phase = 0;
  __device__ void advance() {
    if (++index == N) index = 0, phase ^= 1;
  }
};

using Stage = Place<kStages>;

// With kCopied, all threads of the loading warpgroup fill a stage, otherwise one.
template <bool kCopied>
__device__ void begin(Shared& s) {
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      barrier_init(&s.full[i], kCopied ? 1 + 128 : 1);
      barrier_init(&s.empty[i], 16);  // the multiplying warps of the cluster
    }
    for (int i = 0; i < 2; ++i) {
      barrier_init(&s.next_full[i], 1);
      barrier_init(&s.next_empty[i], kCopied ? 24 : 18);  // its multiplying and loading warps
    }
    barriers_ready();
  }
  cluster_sync();
}

// --- the order of the tiles ---

struct Tile {
  int expert, first_row, n_rows;  // n_rows 0 to kTileM; of weight gradients, of the whole expert
  int m, n;                       // indices of the pair
  bool alone;                     // b is not the other block's: n is this tile's own, m not set
};

// Place `i` of an expert's m_pairs * n_tiles.
__device__ inline void place_tile(Tile& tile, int i, int m_pairs, int n_tiles) {
  const int group = i / (kGroupM * n_tiles);
  const int in_group = i - group * kGroupM * n_tiles;
  const int height = min(kGroupM, m_pairs - group * kGroupM);
  tile.n = in_group / height;
  tile.m = group * kGroupM + in_group - tile.n * height;
}

__device__ inline int offset_of(const int32_t* offsets, int e, int n_rows) {
  return min(max(__ldg(offsets + e), 0), n_rows);
}

// Tiles of the rows of experts, expert by expert. Rows are dealt in parts of 64: four to a pair of
// tiles, at the end two; where one is left, the blocks take neighbouring tiles of it. Asked by
// whole warps, for ascending pairs; lane l knows expert 32 * i + l.
class RowTiles {
 public:
  __device__ RowTiles(const int32_t* offsets, int n_experts, int n_rows, int n_tiles)
      : offsets_(offsets), n_experts_(n_experts), n_rows_(n_rows), n_tiles_(n_tiles) {
    load(0, 0);
  }

  __device__ bool find(int i, Tile& tile) {
    while (true) {
      const unsigned above = __ballot_sync(kFullWarp, end_ > i);
      if (above) {
        const int lane = __ffs(above) - 1;
        const int rows = __shfl_sync(kFullWarp, rows_, lane), even = even_rows(rows);
        const int pairs = (even + kPairM - 1) / kPairM * n_tiles_;
        const int place = i - (__shfl_sync(kFullWarp, end_, lane) - pairs_of(rows));
        tile.expert = first_ + lane;
        tile.first_row = __shfl_sync(kFullWarp, begin_, lane);
        tile.alone = place >= pairs;
        if (tile.alone) {
          tile.n = 2 * (place - pairs) + cluster_rank();
          tile.first_row += even;
          tile.n_rows = tile.n < n_tiles_ ? rows - even : 0;
        } else {
          place_tile(tile, place, pairs / n_tiles_, n_tiles_);
          const int of_pair = min(min(rows, even) - tile.m * kPairM, kPairM);
          const int of_first = (of_pair + 127) / 128 * 64;
          tile.first_row += tile.m * kPairM + (cluster_rank() ? of_first : 0);
          tile.n_rows = cluster_rank() ? of_pair - of_first : of_first;
        }
        return true;
      }
      if (first_ + 32 >= n_experts_) return false;
      load(first_ + 32, __shfl_sync(kFullWarp, end_, 31));
    }
  }

 private:
  // Rows in whole twos of parts, those that the last lacks included: less than `rows` where one
  // part is left.
  __device__ static int even_rows(int rows) { return (rows + 63) / 128 * 128; }
  __device__ int pairs_of(int rows) const {
    const int even = even_rows(rows);
    return (even + kPairM - 1) / kPairM * n_tiles_ + (even < rows ? (n_tiles_ + 1) / 2 : 0);
  }

  __device__ void load(int first, int pairs_before) {
    first_ = first;
    const int e = first + lane_id();
    begin_ = e < n_experts_ ? offset_of(offsets_, e, n_rows_) : 0;
    rows_ = e < n_experts_ ? max(offset_of(offsets_, e + 1, n_rows_) - begin_, 0) : 0;
    end_ = pairs_before + warp_scan(pairs_of(rows_));
  }

  const int32_t* offsets_;
  int n_experts_, n_rows_, n_tiles_;
  int first_, begin_, rows_, end_;  // end_: pairs of this expert and all before
};

// The pairs of tiles that a cluster takes: first that of its number, then whichever is next when it
// asks. So all clusters work on neighbouring pairs, and what these share is in the L2. Without a
// counter a cluster takes every n-th; the clusters then drift apart.
class PairQueue {
 public:
  __device__ PairQueue(Shared& s, int32_t* counter) : s_(s), counter_(counter) {}
  __device__ static int first() { return blockIdx.x / 2; }

  // One thread of each block asks at the start of a pair for the one after it, and hands that on
  // when the first loads are on their way.
  __device__ void ask(int pair) {
    const int clusters = gridDim.x / 2;
    if (cluster_rank() == 0) asked_ = clusters + (counter_ ? atomicAdd(counter_, 1) : pair);
  }
  __device__ void hand_on() {
    barrier_arrive_expecting(&s_.next_full[out_.index], sizeof(int));
    if (cluster_rank() == 0) {
      barrier_wait(&s_.next_empty[out_.index], out_.phase ^ 1);
      for (int rank = 0; rank < 2; ++rank) {
        store_at(&s_.next[out_.index], asked_, &s_.next_full[out_.index], rank);
      }
    }
    out_.advance();
  }

  // By whole warps, all that load or multiply.
  __device__ int next() {
    barrier_wait(&s_.next_full[in_.index], in_.phase);
    const int pair = *const_cast<volatile int*>(&s_.next[in_.index]);
    __syncwarp();
    if (lane_id() == 0) barrier_arrive_at(&s_.next_empty[in_.index], 0);
    in_.advance();
    return pair;
  }

 private:
  Shared& s_;
  int32_t* counter_;
  int asked_ = 0;
  Place<2> in_, out_;
};

// --- gathering rows ---

// Where row `at` of from.data begins, in chunks of 16 bytes.
constexpr uint32_t kNoRow = 0xffffffff;
__device__ inline uint32_t row_chunk(const Rows& from, int at) {
  return uint32_t(at) < uint64_t(from.n) ? uint32_t(at) * uint32_t(from.stride / 8) : kNoRow;
}
__device__ inline void copy_row_chunk(uint32_t to, const uint4* data, uint32_t chunk, bool inside) {
  const bool there = inside && chunk != kNoRow;
  copy_async(to, data + (there ? chunk : 0), !there);
}

// --- multiplying ---

// A transposed operand lies in boxes of 64 (inner) rows x 64 columns, else of 64 rows x 64 (inner)
// columns. Each step is 16 along the inner dimension.
template <bool kTransposed>
__device__ inline uint64_t operand(const uint16_t* boxes) {
  return kTransposed ? matrix_descriptor(boxes, kBoxBytes, 1024)
                     : matrix_descriptor(boxes, 16, 1024);
}
template <bool kTransposed>
constexpr uint64_t kStep = (kTransposed ? 16 * 128 : 32) >> 4;

// Of `boxes` boxes from column `first` on, those that hold any of `columns`. The TMA is not asked
// for the others: what shared memory holds instead goes into results that are not stored.
__device__ inline int boxes_within(int first, int columns, int boxes) {
  return max(min((columns - first + kBoxWidth - 1) / kBoxWidth, boxes), 0);
}

// Tells both blocks that this warp has read a stage.
__device__ inline void release(Shared& s, int stage) {
  if (lane_id() < 2) barrier_arrive_at(&s.empty[stage], lane_id());
}

// The sum over `blocks` stages of 64 x kTileN products. With kCopied, stages were filled by copies.
template <class T, bool kTransA, bool kTransB, bool kCopied>
__device__ void multiply(Shared& s, Stage& stage, int warpgroup, int blocks, float (&sum)[128]) {
  int previous = -1;
  for (int block = 0; block < blocks; ++block) {
    barrier_wait(&s.full[stage.index], stage.phase);
    if (kCopied) fence_async_proxy();
    const uint64_t a = operand<kTransA>(s.a[stage.index] + warpgroup * kBoxElements);
    const uint64_t b = operand<kTransB>(s.b[stage.index]);
    products_begin();
#pragma unroll
    for (int i = 0; i < kTileK / 16; ++i) {
      product<T, kTransA, kTransB>(sum, a + i * kStep<kTransA>, b + i * kStep<kTransB>,
                                   block > 0 || i > 0);
    }
    products_commit();
    products_wait<1>();
    if (previous >= 0) release(s, previous);
    previous = stage.index;
    stage.advance();
  }
  products_wait<0>();
#pragma unroll
  for (int i = 0; i < 128; ++i) products_give(sum[i]);
  if (previous >= 0) release(s, previous);
}

// As many stages, by a warpgroup that has no rows of the tile.
__device__ inline void skip(Shared& s, Stage& stage, int blocks) {
  for (int block = 0; block < blocks; ++block) {
    barrier_wait(&s.full[stage.index], stage.phase);
    __syncwarp();
    release(s, stage.index);
    stage.advance();
  }
}

// --- results ---

template <class T>
__device__ inline uint32_t pair_of_floats(float first, float second) {
  const float both[2] = {first, second};
  return Pack<T, 2>::of(both).word[0];
}

template <class T>
__device__ inline void pack_box(const float* sum, uint32_t (&box)[8][2]) {
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    box[j][0] = pair_of_floats<T>(sum[4 * j], sum[4 * j + 1]);
    box[j][1] = pair_of_floats<T>(sum[4 * j + 2], sum[4 * j + 3]);
  }
}

// A warp's part of a box: 16 rows x 64 columns.
constexpr int kWarpBoxBytes = 16 * 128;

// Where lane l's row of the matrices of columns 0..15 of that part lies; of columns 8 j on, at ^ (j
// << 4), j even. Four matrices: rows 0..7 and 8..15, and the same 8 columns on.
__device__ inline uint32_t matrices_in_warp_box() {
  const int lane = lane_id(), row = lane % 16;
  return row * 128 + ((lane / 16 ^ (row & 7)) << 4);
}
// The same in the whole box.
__device__ inline uint32_t matrices_in_box() {
  return warp_id() % 4 * kWarpBoxBytes + matrices_in_warp_box();
}
// The same in a transposed box, whose rows are columns; of columns 8 j on, at + j * 1024.
__device__ inline uint32_t matrices_in_transposed_box() {
  const int lane = lane_id(), row = lane / 16 * 8 + lane % 8;
  return row * 128 + ((warp_id() % 4 * 2 + lane / 8 % 2 ^ (lane % 8)) << 4);
}

// Sends a warp's results to device memory through two buffers, without waiting for another warp.
template <class T>
class WarpStore {
 public:
  __device__ explicit WarpStore(uint32_t buffers)
      : buffers_(buffers), matrices_(matrices_in_warp_box()) {}

  // v[j][h]: columns 8 j + 2 (lane % 4) and the next, of row 8 h + lane / 4. For a map of runs of
  // 16 rows.
  __device__ void put(const uint32_t (&v)[8][2], const CUtensorMap& map, int column, int part,
                      int row, int rows) {
    if (one_lane()) tma_store_wait_read<1>();
    __syncwarp();
    const uint32_t buffer = buffers_ + which_ * kWarpBoxBytes;
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
      store_matrices(buffer + (matrices_ ^ (j << 4)), {v[j][0], v[j][1], v[j + 1][0], v[j + 1][1]});
    }
    fence_async_proxy();
    __syncwarp();
    if (one_lane()) {
      if (rows > 0) tma_store(map, buffer, column, part, 16 - rows, row + rows);
      tma_store_commit();  // one group for each call: that is what is counted above
    }
    which_ ^= 1;
  }

 private:
  uint32_t buffers_, matrices_;
  int which_ = 0;
};

// --- launching ---

template <class Kernel, class Params>
int launch(Kernel* kernel, const Params& p, int64_t pairs, void* stream) {
  cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(Shared));
  if (error != cudaSuccess) return int(error);
  const unsigned clusters = unsigned(std::min<int64_t>(pairs, std::max(multiprocessors() / 2, 1)));
  kernel<<<2 * clusters, kThreads, sizeof(Shared), cudaStream_t(stream)>>>(p);
  return int(cudaGetLastError());
}

inline int64_t row_pairs_at_most(const ExpertRows& experts, int64_t n_tiles) {
  const int64_t some = std::min(experts.n_rows, experts.n_experts);
  return (experts.n_rows / kPairM + some) * n_tiles + some * ((n_tiles + 1) / 2);
}

}  // namespace hopper
}  // namespace sparsemoe
