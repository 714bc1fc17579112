// What the codes of a vector give: quantized and errors. By a warp.
#pragma once

#include "rvq/encode.h"
#include "rvq/residuals.cuh"

namespace sparsemoe {

// The codes of a vector; codes[q] is asked of lane q % 32, for 32 stages at a time.
class Codes {
 public:
  __device__ Codes(const int32_t* codes, int n_stages) : codes_(codes), n_(n_stages) {}
  __device__ int at(int stage) {
    if (stage % 32 == 0) {
      held_ = stage + lane_id() < n_ ? __ldcg(codes_ + stage + lane_id()) : -1;
    }
    return __shfl_sync(kFullWarp, held_, stage % 32);
  }
  // Whether any of the first 32 is negative.
  __device__ bool not_yet() const {
    return __any_sync(kFullWarp, lane_id() < n_ && __ldcg(codes_ + lane_id()) < 0);
  }

 private:
  const int32_t* codes_;
  int n_, held_ = -1;
};

// Nothing where a code is negative.
template <class T, int kPieces, bool kPacked>
__device__ void finish_vector(const RvqEncodeParams& p, int64_t row) {
  const int width = int(p.width), n_stages = int(p.n_stages);
  const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
  T* y = static_cast<T*>(p.quantized) + row * width;
  float* errors = static_cast<float*>(p.errors) + row * n_stages;
  Codes codes(p.codes + row * n_stages, n_stages);
  if (codes.not_yet()) return;
  for (int first = 0; first < width; first += kPieces * kWalkColumns) {
    Columns<kPieces> residual, sum;
    residual.template load<kPacked>(x, first, width);
    sum.clear();
#pragma unroll(kPieces == 1 ? 8 : 4)
    for (int stage = 0; stage < n_stages; ++stage) {
      const int64_t code = stage * p.n_codes + codes.at(stage);
      Columns<kPieces> e;
      e.template load<kPacked>(static_cast<const float*>(p.codebooks) + code * width, first, width);
      residual.subtract(e);
      sum.add(e);
      const float error = warp_sum(residual.sum_of_squares());
      if (lane_id() == 0) errors[stage] = first ? errors[stage] + error : error;
    }
    sum.template store<kPacked>(y, first, width);
  }
}

}  // namespace sparsemoe
