// Blocks of a kernel that look for the codes of one vector together: each has a share of the codes,
// and what they have found meets in device memory.
#pragma once

#include "rvq/encode_workspace.h"
#include "rvq/vector.cuh"

namespace sparsemoe {

// In the order in which they begin, `size` blocks are a group: those that wait for others wait for
// the next to begin. All of a group must find room at once. One alone has no notes.
class BlockGroup {
 public:
  // By all threads. `place` is in shared memory.
  __device__ BlockGroup(GroupNotes* notes, int size, int* place) : notes_(notes), size_(size) {
    if (size == 1) {
      block_ = blockIdx.x;
      return;
    }
    if (threadIdx.x == 0) *place = atomicAdd(&notes->begun, 1);
    __syncthreads();
    block_ = *place;
  }
  __device__ int block() const { return block_; }  // counted in that order
  __device__ int group() const { return block_ / size_; }
  __device__ int rank() const { return block_ % size_; }
  __device__ int size() const { return size_; }

  // By a warp of each block, the same each time: of what they have found, the nearest.
  __device__ void agree(float& distance, int& code) {
    if (size_ == 1) return;
    const int lane = lane_id(), side = turn_ % 2;
    turn_ += 1;
    if (lane == 0) {
      __stcg(&notes_->distance[group()][side][rank()], distance);
      __stcg(&notes_->code[group()][side][rank()], code);
      __threadfence();
      atomicAdd(&notes_->arrived[group()], 1);
      while (acquire(&notes_->arrived[group()]) < turn_ * size_) {
      }
    }
    __syncwarp();
    distance = __ldcg(&notes_->distance[group()][side][lane % size_]);
    code = __ldcg(&notes_->code[group()][side][lane % size_]);
    least_of(distance, code, size_);
  }

 private:
  __device__ static int acquire(const int* from) {
    int value;
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(from) : "memory");
    return value;
  }

  GroupNotes* const notes_;
  const int size_;
  int block_, turn_ = 0;
};

}  // namespace sparsemoe
