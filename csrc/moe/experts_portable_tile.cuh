// One tile of a matrix product on any GPU of compute capability 8.0 or later: 128 x 128 sums over
// an inner dimension k, by a block of 8 warps. Both operands come through a ring of stages in
// shared memory; the sums leave by the same memory, as floats, so that what is done with them does
// not depend on how a warp holds them. 16-bit elements are multiplied by tensor cores, floats one
// by one.
#pragma once

#include "common/cuda.cuh"
#include "common/ptx.cuh"
#include "moe/experts.h"

namespace sparsemoe {
namespace portable {

constexpr int kTile = 128;  // rows and columns
constexpr int kThreads = 256;
constexpr int kStages = 4;
template <class T>
constexpr int kTileK = 64 / int(sizeof(T));
template <class T>
constexpr int kPack = 16 / int(sizeof(T));  // elements of a chunk, which is 16 bytes

struct Stage {
  char a[kTile * 64], b[kTile * 64];
};
union Shared {
  Stage stages[kStages];
  float sums[kTile * kTile];
};
static_assert(sizeof(Shared) == 65536);

// --- an operand in shared memory ---

// An operand lies as it does in device memory: rows of kTileK elements along k (kAlongK), or kTileK
// rows of 128 across it. Returns the byte where the chunk begins that has element (i, k), i
// counting along the tile. Chunks are permuted so that eight of adjacent rows lie in different
// banks.
template <class T, bool kAlongK>
__device__ int chunk_at(int i, int k) {
  return kAlongK ? i * 64 + ((k / kPack<T> ^ (i / 2 & 3)) << 4)
                 : k * (kTile * int(sizeof(T))) + ((i / kPack<T> ^ (k & 7)) << 4);
}

// The place in Shared::sums of the sum at (row, column), permuted likewise in groups of eight.
__device__ inline int sum_at(int row, int column) {
  return row * kTile + (column ^ (row & 7) << 3);
}

// --- filling a stage ---

// Starts to copy a chunk of which the first `valid` elements are wanted, and clears the rest. Of an
// aligned one that is all or nothing, and `from` is not read if it is nothing.
template <bool kAligned, class T>
__device__ void copy_chunk(char* to, const T* from, int valid) {
  if constexpr (kAligned) {
    copy_async(shared_address(to), from, valid <= 0);
  } else {
    using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>;
    const Bits* bits = reinterpret_cast<const Bits*>(from);
    uint32_t word[4] = {};
#pragma unroll
    for (int i = 0; i < kPack<T>; ++i) {
      const uint32_t value = i < valid ? __ldg(bits + i) : Bits(0);
      word[i * sizeof(T) / 4] |= value << (i * sizeof(T) % 4 * 8);
    }
    *reinterpret_cast<uint4*>(to) = make_uint4(word[0], word[1], word[2], word[3]);
  }
}

// An operand whose rows run along k. row_of(i) is where row i of the tile begins, or null.
template <class T, bool kAligned>
class AlongK {
 public:
  static constexpr bool kAlongK = true;

  template <class RowOf>
  __device__ AlongK(int k, RowOf row_of) {
    const int row = threadIdx.x / 4, first = threadIdx.x % 4 * kPack<T>;
    to_ = chunk_at<T, true>(row, first);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const T* begin = row_of(row + 64 * i);
      from_[i] = begin + first;
      left_[i] = begin ? k - first : 0;
    }
  }
  // Copies the next kTileK of k.
  __device__ void load(char* operand) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      copy_chunk<kAligned>(operand + to_ + 64 * 64 * i, from_[i], left_[i]);
      from_[i] += kTileK<T>;
      left_[i] -= kTileK<T>;
    }
  }

 private:
  const T* from_[2];
  int left_[2], to_;
};

// An operand whose rows run across k: row k of the inner dimension is row begin + k, up to `end`.
// column_of(i) is where column i of the tile lies in it, columns_from(i) how many are wanted from
// there on. kGathered: it has an index.
template <class T, bool kAligned, bool kGathered>
class AcrossK {
  static constexpr int kAcross = kTile / kPack<T>;          // threads to a row
  static constexpr int kRows = kThreads / kAcross;          // rows at a time
  static_assert(2 * kRows == kTileK<T> && kRows % 8 == 0);  // so both chunks are permuted alike

 public:
  static constexpr bool kAlongK = false;

  template <class ColumnOf, class ColumnsFrom>
  __device__ AcrossK(const Rows& rows, int begin, int end, ColumnOf column_of,
                     ColumnsFrom columns_from)
      : stride_(rows.stride), index_(rows.index), end_(end) {
    const int row = threadIdx.x / kAcross, first = threadIdx.x % kAcross * kPack<T>;
    to_ = chunk_at<T, false>(first, row);
    n_ = int(min(rows.n, int64_t(INT32_MAX)));
    columns_ = int(min(columns_from(first), int64_t(kPack<T>)));
    if (columns_ <= 0) end_ = 0;
    if (!kGathered) end_ = min(end_, n_);
    at_ = begin + row;
    from_ = static_cast<const T*>(rows.data) + column_of(first);
    if (!kGathered) from_ += at_ * stride_;
    find();
  }
  __device__ void load(char* operand) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const bool there = kGathered ? unsigned(row_[i]) < unsigned(n_) : at_ + kRows * i < end_;
      const int64_t row = kGathered ? row_[i] : kRows * i;
      copy_chunk<kAligned>(operand + to_ + kRows * kTile * int(sizeof(T)) * i,
                           from_ + row * stride_, there ? columns_ : 0);
    }
    if (!kGathered) from_ += kTileK<T> * stride_;
    at_ += kTileK<T>;
    find();
  }

 private:
  // The rows of the next load: one ahead, so that no copy waits for its index.
  __device__ void find() {
    if constexpr (kGathered) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        row_[i] = at_ + kRows * i < end_ ? __ldg(index_ + at_ + kRows * i) : -1;
      }
    }
  }

  const T* from_;
  int64_t stride_;
  const int32_t* index_;
  int at_, end_, n_, row_[2], columns_, to_;
};

// --- multiplying ---

// What a thread has of the sums.
template <class T, bool kAAlongK, bool kBAlongK>
class Sums {
 public:
  __device__ Sums() {
    // The first two of a's four matrices differ along the tile, the first two of b's along k.
    const int lane = lane_id(), second = lane / 8 % 2 * 8, third = lane / 16 * 8;
    at_a_ = matrix_at<kAAlongK>(warp_row() + second, third);
    at_b_ = matrix_at<kBAlongK>(warp_column() + third, second);
  }

  // Whether the warp has any of the first `rows` rows.
  __device__ static bool has_rows(int rows) { return warp_row() < rows; }

  __device__ void add(const Stage& stage) {
#pragma unroll
    for (int k = 0; k < kTileK<T> / 16; ++k) {
      uint32_t a[4], b[2][4];
#pragma unroll
      for (int j = 0; j < 2; ++j) load_16x16<kBAlongK>(b[j], stage.b, at_b_, j, k);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        load_16x16<kAAlongK>(a, stage.a, at_a_, i, k);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          multiply_add(sum_[i][j], a, b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1], T());
        }
      }
    }
  }

  __device__ void store(float* sums) const {
    const int row = warp_row() + lane_id() / 4, column = warp_column() + lane_id() % 4 * 2;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          *reinterpret_cast<float2*>(sums + sum_at(row + 16 * i + 8 * h, column + 8 * j)) =
              make_float2(sum_[i][j][2 * h], sum_[i][j][2 * h + 1]);
        }
      }
    }
  }

 private:
  // A warp has 64 rows and 32 columns.
  __device__ static int warp_row() { return warp_id() / 4 * 64; }
  __device__ static int warp_column() { return warp_id() % 4 * 32; }

  // Where a lane's row is of the 8 x 8 matrix that begins at (i, k).
  template <bool kAlongK>
  __device__ static int matrix_at(int i, int k) {
    const int row = lane_id() % 8;
    return kAlongK ? chunk_at<T, true>(i + row, k) : chunk_at<T, false>(i, k + row);
  }
  // The 16 x 16 elements 16 i along the tile and 16 k along k from there. Along a row of memory
  // that is two chunks, which is a change of one bit: the warp's first is at a multiple of 4.
  template <bool kAlongK>
  __device__ static void load_16x16(uint32_t (&out)[4], const char* operand, int at, int i, int k) {
    const int chunks = 2 * (kAlongK ? k : i), rows = 16 * (kAlongK ? i : k);
    load_matrices<!kAlongK>(out, shared_address(operand + (at ^ chunks << 4) +
                                                rows * (kAlongK ? 64 : kTile * int(sizeof(T)))));
  }

  int at_a_, at_b_;
  float sum_[4][4][4] = {};
};

template <bool kAAlongK, bool kBAlongK>
class Sums<float, kAAlongK, kBAlongK> {
 public:
  __device__ static bool has_rows(int rows) { return warp_row() < rows; }

  __device__ void add(const Stage& stage) {
#pragma unroll
    for (int k = 0; k < kTileK<float>; k += 4) {
      float a[8][4], b[8][4];
      fragment<kAAlongK, kLanesA>(a, stage.a, warp_row(), lane_a(), k);
      fragment<kBAlongK, kLanesB>(b, stage.b, warp_column(), lane_b(), k);
#pragma unroll
      for (int c = 0; c < 4; ++c) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
#pragma unroll
          for (int j = 0; j < 8; ++j) sum_[i][j] = fmaf(a[i][c], b[j][c], sum_[i][j]);
        }
      }
    }
  }

  __device__ void store(float* sums) const {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        sums[sum_at(warp_row() + place<kAAlongK, kLanesA>(lane_a(), i),
                    warp_column() + place<kBAlongK, kLanesB>(lane_b(), j))] = sum_[i][j];
      }
    }
  }

 private:
  // A warp has 32 rows and 64 columns, a thread 8 of each.
  static constexpr int kLanesA = 4, kLanesB = 8;
  __device__ static int warp_row() { return warp_id() / 2 * 32; }
  __device__ static int warp_column() { return warp_id() % 2 * 64; }
  __device__ static int lane_a() { return lane_id() / kLanesB; }
  __device__ static int lane_b() { return lane_id() % kLanesB; }

  // Where the i-th of a thread's 8 lies: such that chunks hold four of them, or four of k.
  template <bool kAlongK, int kLanes>
  __device__ static int place(int lane, int i) {
    return kAlongK ? lane + kLanes * i : 4 * (lane + i / 4 * kLanes) + i % 4;
  }
  template <bool kAlongK, int kLanes>
  __device__ static void fragment(float (&out)[8][4], const char* operand, int first, int lane,
                                  int k) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int column =
          kAlongK ? place<true, kLanes>(lane, i) : place<false, kLanes>(lane, i / 4 * 4);
      const float4 v = *reinterpret_cast<const float4*>(
          operand + chunk_at<float, kAlongK>(first + column, kAlongK ? k : k + i % 4));
      const float four[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        if (kAlongK) {
          out[i][c] = four[c];
        } else {
          out[i / 4 * 4 + c][i % 4] = four[c];
        }
      }
    }
  }

  float sum_[8][8] = {};
};

// The sums over k of the products of a and b, into shared.sums; only `rows` rows of them are
// wanted. The caller waits for all threads before it calls this again.
template <class T, class A, class B>
__device__ void multiply(Shared& shared, A& a, B& b, int k, int rows) {
  const unsigned steps = (unsigned(k) + kTileK<T> - 1) / kTileK<T>;
  unsigned loaded = 0;
  const auto load_next = [&] {
    if (loaded < steps) {
      Stage& stage = shared.stages[loaded % kStages];
      a.load(stage.a);
      b.load(stage.b);
      ++loaded;
    }
    copy_async_commit();  // an empty group where there was nothing to load
  };
  Sums<T, A::kAlongK, B::kAlongK> sums;
  for (int i = 0; i < kStages - 1; ++i) load_next();
  for (unsigned step = 0; step < steps; ++step) {
    copy_async_wait<kStages - 2>();
    __syncthreads();  // this step's stage is there, and the last step's is free
    load_next();
    if (sums.has_rows(rows)) sums.add(shared.stages[step % kStages]);
  }
  copy_async_wait<0>();
  __syncthreads();
  sums.store(shared.sums);
  __syncthreads();
}

}  // namespace portable
}  // namespace sparsemoe
