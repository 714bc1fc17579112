// A warp's way along a vector and its codes, stage after stage.
#pragma once

#include "common/cuda.cuh"
#include "rvq/encode.h"
#include "rvq/scale.cuh"

namespace sparsemoe {

// Four neighbouring elements of a row of `width`, zeros past its end; kPacked: width and stride are
// multiples of 4 and rows begin on packs; kOnce: of device memory, and not needed again soon.
template <bool kPacked, bool kOnce = false, class T>
__device__ inline float4 load4(const T* row, int column, int width) {
  using Word = std::conditional_t<sizeof(T) == 4, uint4, uint2>;
  float v[4] = {0, 0, 0, 0};
  if constexpr (kPacked) {
    if (column < width) {
      Pack<T, 4> pack;
      const Word* const from = reinterpret_cast<const Word*>(row + column);
      *reinterpret_cast<Word*>(&pack) = kOnce ? __ldcs(from) : __ldg(from);
      pack.unpack(v);
    }
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) v[i] = column + i < width ? to_float(row[column + i]) : 0.0f;
  }
  return make_float4(v[0], v[1], v[2], v[3]);
}
template <bool kPacked, bool kOnce = false, class T>
__device__ inline void store4(T* row, int column, int width, float4 value) {
  using Word = std::conditional_t<sizeof(T) == 4, uint4, uint2>;
  const float v[4] = {value.x, value.y, value.z, value.w};
  if constexpr (kPacked) {
    if (column >= width) return;
    const Pack<T, 4> pack = Pack<T, 4>::of(v);
    if constexpr (kOnce) {
      __stcs(reinterpret_cast<Word*>(row + column), reinterpret_cast<const Word&>(pack));
    } else {
      *reinterpret_cast<Pack<T, 4>*>(row + column) = pack;
    }
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (column + i < width) row[column + i] = from_float<T>(v[i]);
    }
  }
}
template <class T>
bool packs_of_4(const void* data, int64_t width, int64_t stride) {
  return width % 4 == 0 && stride % 4 == 0 && uintptr_t(data) % (4 * sizeof(T)) == 0;
}

__device__ inline float4 operator+(float4 a, float4 b) {
  return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}
__device__ inline float4 operator-(float4 a, float4 b) {
  return make_float4(a.x - b.x, a.y - b.y, a.z - b.z, a.w - b.w);
}
__device__ inline float4 operator*(float a, float4 b) {
  return make_float4(a * b.x, a * b.y, a * b.z, a * b.w);
}
// Spelled out: wherever it is inlined, it is rounded in the same way, so that codes that are equal
// are equally near.
__device__ inline float inner(float4 a, float4 b) {
  return fmaf(a.x, b.x, fmaf(a.y, b.y, fmaf(a.z, b.z, a.w * b.w)));
}
__device__ inline float squares(float4 v) { return inner(v, v); }

constexpr int kWalkColumns = 128;  // of a warp at a time, four a lane

// kPieces pieces of 128 columns of a row from `first` on: lane l holds columns first + 128 i + 4 l.
template <int kPieces>
struct Columns {
  float4 v[kPieces];

  template <bool kPacked, bool kOnce = false, class T>
  __device__ void load(const T* row, int first, int width) {
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      v[i] = load4<kPacked, kOnce>(row, first + kWalkColumns * i + 4 * lane_id(), width);
    }
  }
  // Of a row that the kernel itself writes.
  __device__ void load_changing(const float* row, int first, int width) {
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const int column = first + kWalkColumns * i + 4 * lane_id();
      v[i].x = column < width ? row[column] : 0.0f;
      v[i].y = column + 1 < width ? row[column + 1] : 0.0f;
      v[i].z = column + 2 < width ? row[column + 2] : 0.0f;
      v[i].w = column + 3 < width ? row[column + 3] : 0.0f;
    }
  }
  template <bool kPacked, bool kOnce = false, class T>
  __device__ void store(T* row, int first, int width) const {
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      store4<kPacked, kOnce>(row, first + kWalkColumns * i + 4 * lane_id(), width, v[i]);
    }
  }
  __device__ void clear() {
#pragma unroll
    for (int i = 0; i < kPieces; ++i) v[i] = make_float4(0, 0, 0, 0);
  }
  __device__ void add(const Columns& other) {
#pragma unroll
    for (int i = 0; i < kPieces; ++i) v[i] = v[i] + other.v[i];
  }
  __device__ void add(float scale, const Columns& other) {
#pragma unroll
    for (int i = 0; i < kPieces; ++i) v[i] = v[i] + scale * other.v[i];
  }
  __device__ void scale(float by) {
#pragma unroll
    for (int i = 0; i < kPieces; ++i) v[i] = by * v[i];
  }
  __device__ void subtract(const Columns& other) {
#pragma unroll
    for (int i = 0; i < kPieces; ++i) v[i] = v[i] - other.v[i];
  }
  __device__ float product(const Columns& other) const {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < kPieces; ++i) sum += inner(v[i], other.v[i]);
    return sum;
  }
  __device__ float sum_of_squares() const {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < kPieces; ++i) sum += squares(v[i]);
    return sum;
  }
};

// How far code e, of that norm, is from a residual; by a warp.
template <int kPieces>
__device__ inline float distance(Metric metric, const Columns<kPieces>& residual,
                                 const Columns<kPieces>& e, const float* norm) {
  if (metric == Metric::l2) {
    Columns<kPieces> difference = residual;
    difference.subtract(e);
    return warp_sum(difference.sum_of_squares());
  }
  return -warp_sum(residual.product(e)) * inverse_norm(*norm);
}

// Calls f with the number of pieces, as a compile-time constant, that rows are walked in at once.
template <class F>
int with_pieces(int64_t width, F f) {
  if (width <= 128) return f(LaneWidth<1>());
  if (width <= 256) return f(LaneWidth<2>());
  if (width <= 512) return f(LaneWidth<4>());
  return f(LaneWidth<8>());
}

}  // namespace sparsemoe
