// Blocks of a kernel that look for the codes of one vector together: each has a share of the codes,
// and what they have found meets in device memory.
#pragma once

#include "rvq/encode_workspace.h"
#include "rvq/vector.cuh"

namespace sparsemoe {

// In the order in which they begin, each `most` blocks are a group. A block waits only for blocks
// that have begun, for others may have to wait until it has ended: where not all of a group begin
// soon, the first goes on with those that have, and others are left out.
class BlockGroup {
 public:
  // By all threads. `place` is in shared memory, for two. `block` is for a block that is alone.
  __device__ BlockGroup(GroupNotes* notes, int most, int* place, int block)
      : notes_(notes), block_(block), group_(block) {
    if (most == 1) return;
    if (threadIdx.x == 0) {
      place[0] = atomicAdd(&notes->begun, 1);
      place[1] = size_of(place[0] / most, place[0] % most, most);
    }
    __syncthreads();
    block_ = place[0], size_ = place[1];
    group_ = block_ / most, rank_ = block_ % most;
  }
  __device__ int block() const { return block_; }  // counted in that order
  __device__ int group() const { return group_; }
  __device__ int rank() const { return rank_; }
  __device__ int size() const { return size_; }
  __device__ bool left_out() const { return rank_ >= size_; }

  // By a warp of each block, the same each time: of what they have found, the nearest.
  __device__ void agree(float& distance, int& code) {
    if (size_ == 1) return;
    const int lane = lane_id(), side = turn_ % 2;
    turn_ += 1;
    if (lane == 0) {
      __stcg(&notes_->distance[side][block_], distance);
      __stcg(&notes_->code[side][block_], code);
      __threadfence();
      atomicAdd(&notes_->arrived[group_], 1);
      while (acquire(&notes_->arrived[group_]) < turn_ * size_) {
      }
    }
    __syncwarp();
    const int other = block_ - rank_ + min(lane, size_ - 1);
    distance = __ldcg(&notes_->distance[side][other]);
    code = __ldcg(&notes_->code[side][other]);
    least_of(distance, code, int(kMostGroupBlocks));
  }

 private:
  // How many are in a group, which the first of them decides.
  __device__ int size_of(int group, int rank, int most) {
    int size = 1;
    if (rank > 0) {
      while ((size = acquire(&notes_->size[group])) == 0) {
      }
      return size;
    }
    for (int i = 0; i < kPatience && size < most; ++i) {
      size = min(acquire(&notes_->begun) - group * most, most);
    }
    __stcg(&notes_->size[group], size);
    return size;
  }
  __device__ static int acquire(const int* from) {
    int value;
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(from) : "memory");
    return value;
  }

  static constexpr int kPatience = 50;  // so many reads, of about a microsecond
  GroupNotes* const notes_;
  int block_, group_, rank_ = 0, size_ = 1, turn_ = 0;
};

// By so many threads, before any of the blocks begins.
__device__ inline void clear_counters(GroupNotes* notes, int thread, int threads) {
  auto* const counters = reinterpret_cast<int32_t*>(notes);
  for (int i = thread; i < kGroupCounters; i += threads) counters[i] = 0;
}

// How many blocks should take a vector, of so many for all vectors, if each can take so many codes
// at a time.
__device__ inline int group_blocks_for(int64_t vectors, int blocks, int64_t n_codes, int at_once) {
  const int64_t most = min((n_codes + at_once - 1) / at_once, kMostGroupBlocks);
  return int(max(min(blocks / vectors, most), int64_t(1)));
}

}  // namespace sparsemoe
