// What the codes of a vector give: quantized and errors. By a warp.
#pragma once

#include "rvq/encode.h"
#include "rvq/residuals.cuh"
#include "rvq/rows.h"

namespace sparsemoe {

// The codes of a vector, in order: 32 stages are held at a time, codes[q] by lane q % 32.
class Codes {
 public:
  __device__ Codes(const int32_t* codes, int n_stages) : codes_(codes), n_(n_stages) { ask(0); }
  __device__ int at(int stage) {
    if (stage > 0 && stage % 32 == 0) ask(stage);
    return __shfl_sync(kFullWarp, held_, stage % 32);
  }
  // Of the first 32: waits until the kernel that finds them has come to them; false where it has
  // left one to others.
  __device__ bool known() {
    while (__any_sync(kFullWarp, lane_id() < n_ && held_ == kUnknown)) {
      __nanosleep(1000);
      ask(0);
    }
    return !__any_sync(kFullWarp, lane_id() < n_ && held_ == kLeft);
  }
  // Looks up those of `stage`, a multiple of 32, and the 31 after it.
  __device__ void ask(int stage) {
    held_ = stage + lane_id() < n_ ? __ldcg(codes_ + stage + lane_id()) : -1;
  }

 private:
  const int32_t* codes_;
  int n_, held_;
};

// Nothing where a code has been left to others. All that is read is asked for early: memory is full
// of writes, and slow to answer.
template <class T, int kPieces, bool kPacked>
__device__ void finish_vector(const RvqEncodeParams& p, int64_t row) {
  constexpr int kAtOnce = kPieces == 1 ? 8 : kPieces == 2 ? 4 : 2;
  const int width = int(p.width), n_stages = int(p.n_stages);
  const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
  T* y = static_cast<T*>(p.quantized) + row * width;
  float* errors = static_cast<float*>(p.errors) + row * n_stages;
  Columns<kPieces> residual, sum;
  residual.template load<kPacked, true>(x, 0, width);
  Codes codes(p.codes + row * n_stages, n_stages);
  if (!codes.known()) return;
  for (int first = 0; first < width; first += kPieces * kWalkColumns) {
    if (first > 0) {
      residual.template load<kPacked, true>(x, first, width);
      codes.ask(0);
    }
    sum.clear();
    for (int stage = 0; stage < n_stages; stage += kAtOnce) {
      Columns<kPieces> e[kAtOnce];
      float error[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (stage + i >= n_stages) break;
        const int64_t code = (stage + i) * p.n_codes + codes.at(stage + i);
        e[i].template load<kPacked>(static_cast<const float*>(p.codebooks) + code * width, first,
                                    width);
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        error[i] = 0;
        if (stage + i >= n_stages) continue;
        residual.subtract(e[i]);
        sum.add(e[i]);
        error[i] = residual.sum_of_squares();
      }
      const float of_stage = warp_sums(error);
      constexpr int kSame = 32 / kAtOnce;  // lanes that have the same sum
      const int at = stage + lane_id() / kSame;
      if (lane_id() % kSame == 0 && at < n_stages) {
        errors[at] = first ? errors[at] + of_stage : of_stage;
      }
    }
    sum.template store<kPacked, true>(y, first, width);
  }
}

}  // namespace sparsemoe
