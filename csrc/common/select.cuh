// The `count` largest of many keys, found by one block and kept in order.
#pragma once

#include "common/cuda.cuh"

namespace sparsemoe {

// Keys above `key` are chosen, and the first `n_equal` that equal it.
struct Selection {
  uint32_t key;
  int n_equal;
  int n_chosen;
};

constexpr int kSelectBins = 2048;
constexpr int kSelectBatch = 8;  // keys a thread loads before it uses the first

// Below, places are unsigned: near 2^31 the step past the last key is no int.

// Walks values[0..n) from the top, n a multiple of 32, until their sum reaches `left`; returns the
// place and takes what was passed from `left`. Called by a whole warp.
__device__ inline int walk_from_top(const int* values, int n, int& left) {
  for (int first = n - 32; first >= 0; first -= 32) {
    const int here = values[first + 31 - lane_id()];
    const int upto = warp_scan(here);
    const unsigned reached = __ballot_sync(kFullWarp, upto >= left);
    if (reached) {
      const int lane = __ffs(reached) - 1;
      left -= __shfl_sync(kFullWarp, upto - here, lane);
      return first + 31 - lane;
    }
    left -= __shfl_sync(kFullWarp, upto, 31);
  }
  return 0;  // only where the keys changed meanwhile
}

// Radix selection, 11 bits at a time from the top. key(i) for 0 <= i < n; a key of 0 is never
// chosen. `bins` holds kSelectBins counters in shared memory. Called by a whole block.
template <class Key>
__device__ Selection select_largest(Key key, int n, int count, int* bins) {
  // A place a pass: what one pass reads, no thread writes before the next barrier.
  __shared__ uint32_t shared_prefix[4];
  __shared__ int shared_left[4], shared_valid;
  __shared__ int groups[kSelectBins / 32];
  constexpr int kShift[3] = {21, 10, 0};
  constexpr int kBits[3] = {11, 11, 10};
  if (threadIdx.x == 0) {
    shared_prefix[0] = 0;
    shared_left[0] = count;
    shared_valid = 0;
  }
  int valid = 0;
  uint32_t known = 0;  // bits of the prefix that are settled
#pragma unroll
  for (int pass = 0; pass < 3; ++pass) {
    for (int b = threadIdx.x; b < kSelectBins; b += blockDim.x) bins[b] = 0;
    __syncthreads();
    const uint32_t prefix = shared_prefix[pass];
    for (unsigned first = threadIdx.x; first < unsigned(n); first += kSelectBatch * blockDim.x) {
      uint32_t k[kSelectBatch];
#pragma unroll
      for (int j = 0; j < kSelectBatch; ++j) {
        const unsigned i = first + j * blockDim.x;
        k[j] = i < unsigned(n) ? key(int(i)) : 0;
      }
#pragma unroll
      for (int j = 0; j < kSelectBatch; ++j) {
        if (pass == 0) valid += k[j] != 0;
        if (k[j] != 0 && (k[j] & known) == prefix) {
          atomicAdd(&bins[(k[j] >> kShift[pass]) & ((1 << kBits[pass]) - 1)], 1);
        }
      }
    }
    if (pass == 0 && valid) atomicAdd(&shared_valid, valid);
    __syncthreads();
    if (pass == 0 && shared_valid <= count) return {0, 0, shared_valid};
    for (int g = warp_id(); g < kSelectBins / 32; g += blockDim.x / 32) {
      const int sum = __reduce_add_sync(kFullWarp, bins[32 * g + lane_id()]);
      if (lane_id() == 0) groups[g] = sum;
    }
    __syncthreads();
    if (threadIdx.x < 32) {
      int left = shared_left[pass];
      const int group = walk_from_top(groups, kSelectBins / 32, left);
      const uint32_t bin = 32 * group + walk_from_top(bins + 32 * group, 32, left);
      if (threadIdx.x == 0) {
        shared_prefix[pass + 1] = prefix | (bin << kShift[pass]);
        shared_left[pass + 1] = left;
      }
    }
    known |= ((1u << kBits[pass]) - 1) << kShift[pass];
    __syncthreads();
  }
  return {shared_prefix[3], shared_left[3], count};
}

// Calls take(i, rank, key) for every chosen i, whose ranks ascend with i, and leave(i) for the
// others. Called by a whole block.
template <class Key, class Take, class Leave>
__device__ void for_each_selected(Key key, int n, const Selection& selection, Take take,
                                  Leave leave) {
  __shared__ int of_warp[32];  // chosen for certain in the upper half, equal ones in the lower
  int above = 0, equal = 0;    // before this warp's share of a round
  const int n_warps = blockDim.x / 32;
  const int batch = min(kSelectBatch, (n - 1) / int(blockDim.x) + 1);
  for (unsigned round = 0; round < unsigned(n); round += batch * blockDim.x) {
    const unsigned first = round + warp_id() * batch * 32 + lane_id();
    uint32_t k[kSelectBatch];
    int mine = 0;
#pragma unroll
    for (int j = 0; j < kSelectBatch; ++j) {
      const unsigned i = first + 32 * j;
      k[j] = j < batch && i < unsigned(n) ? key(int(i)) : 0;
    }
#pragma unroll
    for (int j = 0; j < kSelectBatch; ++j) {
      mine += __popc(__ballot_sync(kFullWarp, k[j] > selection.key)) << 16;
      mine += __popc(__ballot_sync(kFullWarp, k[j] != 0 && k[j] == selection.key));
    }
    if (lane_id() == 0) of_warp[warp_id()] = mine;
    __syncthreads();
    const int warp = lane_id() < n_warps ? of_warp[lane_id()] : 0;
    const int upto = warp_scan(warp);
    const int before = __shfl_sync(kFullWarp, upto - warp, warp_id());
    const int all = __shfl_sync(kFullWarp, upto, 31);
    int above_here = above + (before >> 16), equal_here = equal + (before & 0xffff);
    above += all >> 16;
    equal += all & 0xffff;
    const unsigned lower = (1u << lane_id()) - 1;
#pragma unroll
    for (int j = 0; j < kSelectBatch; ++j) {
      const bool is_above = k[j] > selection.key;
      const bool is_equal = k[j] != 0 && k[j] == selection.key;
      const unsigned above_mask = __ballot_sync(kFullWarp, is_above);
      const unsigned equal_mask = __ballot_sync(kFullWarp, is_equal);
      const int equals = equal_here + __popc(equal_mask & lower);
      if (j < batch && first + 32 * j < unsigned(n)) {
        if (is_above || (is_equal && equals < selection.n_equal)) {
          const int rank = above_here + __popc(above_mask & lower);
          take(int(first + 32 * j), rank + min(equals, selection.n_equal), k[j]);
        } else {
          leave(int(first + 32 * j));
        }
      }
      above_here += __popc(above_mask);
      equal_here += __popc(equal_mask);
    }
    __syncthreads();
  }
}

}  // namespace sparsemoe
