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

// Radix selection, 11 bits at a time from the top. key(i) for 0 <= i < n; a key of 0 is never
// chosen. `bins` holds kSelectBins counters in shared memory. Called by a whole block.
template <class Key>
__device__ Selection select_largest(Key key, int n, int count, int* bins) {
  // A place a pass: what one pass reads, no thread writes before the next barrier.
  __shared__ uint32_t shared_prefix[4];
  __shared__ int shared_left[4], shared_valid;
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
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
      const uint32_t k = key(i);
      if (pass == 0) valid += k != 0;
      if (k != 0 && (k & known) == prefix) {
        atomicAdd(&bins[(k >> kShift[pass]) & ((1 << kBits[pass]) - 1)], 1);
      }
    }
    if (pass == 0 && valid) atomicAdd(&shared_valid, valid);
    __syncthreads();
    if (pass == 0 && shared_valid <= count) return {0, 0, shared_valid};
    // One warp walks the bins from the top until `left` keys are passed.
    if (threadIdx.x < 32) {
      int left = shared_left[pass];
      for (int first = kSelectBins - 32; first >= 0; first -= 32) {
        const int bin = first + 31 - int(threadIdx.x);
        const int here = bins[bin];
        int upto = here;
#pragma unroll
        for (int step = 1; step < 32; step *= 2) {
          const int other = __shfl_up_sync(kFullWarp, upto, step);
          if (threadIdx.x >= unsigned(step)) upto += other;
        }
        const unsigned reached = __ballot_sync(kFullWarp, upto >= left);
        if (reached) {
          if (int(threadIdx.x) == __ffs(reached) - 1) {
            shared_prefix[pass + 1] = prefix | (uint32_t(bin) << kShift[pass]);
            shared_left[pass + 1] = left - (upto - here);
          }
          break;
        }
        left -= __shfl_sync(kFullWarp, upto, 31);
      }
    }
    known |= ((1u << kBits[pass]) - 1) << kShift[pass];
    __syncthreads();
  }
  return {shared_prefix[3], shared_left[3], count};
}

// Calls take(i, rank) for every chosen i in ascending order of rank, and leave(i) for the others.
// Called by a whole block of at most 1024 threads.
template <class Key, class Take, class Leave>
__device__ void for_each_selected(Key key, int n, const Selection& selection, Take take,
                                  Leave leave) {
  __shared__ int above_of[32], equal_of[32];
  int above = 0, equal = 0;  // before this round
  const int n_warps = blockDim.x / 32;
  for (int first = 0; first < n; first += blockDim.x) {
    const int i = first + threadIdx.x;
    const uint32_t k = i < n ? key(i) : 0;
    const bool is_above = k > selection.key;
    const bool is_equal = k != 0 && k == selection.key;
    const unsigned above_mask = __ballot_sync(kFullWarp, is_above);
    const unsigned equal_mask = __ballot_sync(kFullWarp, is_equal);
    if (lane_id() == 0) {
      above_of[warp_id()] = __popc(above_mask);
      equal_of[warp_id()] = __popc(equal_mask);
    }
    __syncthreads();
    int above_here = above, equal_here = equal;
    for (int w = 0; w < n_warps; ++w) {
      if (w < warp_id()) {
        above_here += above_of[w];
        equal_here += equal_of[w];
      }
      above += above_of[w];
      equal += equal_of[w];
    }
    const unsigned lower = (1u << lane_id()) - 1;
    above_here += __popc(above_mask & lower);
    equal_here += __popc(equal_mask & lower);
    if (i < n) {
      if (is_above || (is_equal && equal_here < selection.n_equal)) {
        take(i, above_here + min(equal_here, selection.n_equal));
      } else {
        leave(i);
      }
    }
    __syncthreads();
  }
}

}  // namespace sparsemoe
