// The codes of a vector, one after the other. By a warp.
#pragma once

#include "common/cuda.cuh"
#include "rvq/encode_kernels.h"

namespace sparsemoe {

// The codes of a vector, in order: 32 stages are held at a time, codes[q] by lane q % 32.
class Codes {
 public:
  __device__ Codes(const int32_t* codes, int n_stages) : codes_(codes), n_(n_stages) { ask(0); }
  __device__ int at(int stage) {
    if (stage > 0 && stage % 32 == 0) ask(stage);
    return __shfl_sync(kFullWarp, held_, stage % 32);
  }
  // Waits until the kernel that finds them has come to all; false where it has left any.
  __device__ bool known() {
    bool all = true;
    for (int first = (n_ - 1) / 32 * 32; first >= 0; first -= 32) {
      if (n_ > 32) ask(first);
      while (__any_sync(kFullWarp, held_ == kUnknown)) {
        __nanosleep(1000);
        ask(first);
      }
      all = all && !__any_sync(kFullWarp, held_ == kLeft);
    }
    return all;
  }
  // Looks up those of `stage`, a multiple of 32, and the 31 after it.
  __device__ void ask(int stage) {
    held_ = stage + lane_id() < n_ ? __ldcg(codes_ + stage + lane_id()) : 0;
  }

 private:
  const int32_t* codes_;
  int n_, held_;
};

}  // namespace sparsemoe
