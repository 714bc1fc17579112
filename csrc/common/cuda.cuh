// What the CUDA kernels share: element types, 16-byte accesses, and work within a warp.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <type_traits>

#include "common/dtype.h"

namespace sparsemoe {

constexpr unsigned kFullWarp = 0xffffffffu;
constexpr float kInfinity = __builtin_huge_valf();

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Whether the current device runs the code compiled for sm_90a.
inline bool runs_sm_90a() {
#ifdef SPARSEMOE_SM_90A
  int device = 0, major = 0;
  return cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
         major == 9;
#else
  return false;
#endif
}

// Of the current device.
inline int multiprocessors() {
  static std::atomic<int> count[64];  // by device
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device >= 64) return 1;
  if (count[device] == 0) {
    int found = 0;
    cudaDeviceGetAttribute(&found, cudaDevAttrMultiProcessorCount, device);
    count[device] = std::max(found, 1);
  }
  return count[device];
}

// Calls f with a null pointer of the element type. A GPU has no float64 kernels here.
template <class F>
int with_cuda_dtype(DType dtype, F f) {
  switch (dtype) {
    case DType::f32:
      return f(static_cast<float*>(nullptr));
    case DType::f16:
      return f(static_cast<__half*>(nullptr));
    case DType::bf16:
      return f(static_cast<__nv_bfloat16*>(nullptr));
    default:
      return int(cudaErrorInvalidValue);
  }
}

__device__ inline float to_float(float v) { return v; }
__device__ inline float to_float(__half v) { return __half2float(v); }
__device__ inline float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }

template <class T>
__device__ T from_float(float v);
template <>
__device__ inline float from_float<float>(float v) {
  return v;
}
template <>
__device__ inline __half from_float<__half>(float v) {
  return __float2half_rn(v);
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}

// N adjacent elements, moved in one access and held in as few registers as they fill.
template <class T, int N>
struct alignas(sizeof(T) * N) Pack {
  static constexpr bool kWords = sizeof(T) * N % 4 == 0;
  using Word = std::conditional_t<kWords, uint32_t, uint16_t>;
  Word word[sizeof(T) * N / sizeof(Word)];

  __device__ void unpack(float* out) const {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if constexpr (sizeof(T) == 4) {
        out[i] = __uint_as_float(word[i]);
      } else if constexpr (!kWords) {
        out[i] = to_float(*reinterpret_cast<const T*>(&word[i]));
      } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
        out[i] = __uint_as_float(i % 2 ? word[i / 2] & 0xffff0000u : word[i / 2] << 16);
      } else {
        const __half2 pair = *reinterpret_cast<const __half2*>(&word[i / 2]);
        out[i] = i % 2 ? __high2float(pair) : __low2float(pair);
      }
    }
  }
  __device__ static Pack of(const float* in) {
    Pack pack;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if constexpr (sizeof(T) == 4) {
        pack.word[i] = __float_as_uint(in[i]);
      } else if constexpr (!kWords) {
        *reinterpret_cast<T*>(&pack.word[i]) = from_float<T>(in[i]);
      } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
        if (i % 2) {
          *reinterpret_cast<__nv_bfloat162*>(&pack.word[i / 2]) =
              __floats2bfloat162_rn(in[i - 1], in[i]);
        }
      } else if (i % 2) {
        *reinterpret_cast<__half2*>(&pack.word[i / 2]) = __floats2half2_rn(in[i - 1], in[i]);
      }
    }
    return pack;
  }
};

struct PlainLoad {
  template <class V>
  __device__ V operator()(const V* from) const {
    return *from;
  }
};

// A load of data that the kernel does not write.
template <class P>
__device__ P load(const P* from) {
  P pack;
  if constexpr (sizeof(P) == 16) {
    *reinterpret_cast<uint4*>(&pack) = __ldg(reinterpret_cast<const uint4*>(from));
  } else {
    pack = *from;
  }
  return pack;
}

__device__ inline int lane_id() { return threadIdx.x % 32; }
__device__ inline int warp_id() { return threadIdx.x / 32; }

// Sums and maxima over a warp, in the same order on every run and the same in every lane.
__device__ inline float warp_sum(float v) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) v += __shfl_xor_sync(kFullWarp, v, step);
  return v;
}
// The sums of several values: lane l gets that of v[l / (32 / kN)]. kN is a power of two.
template <int kN>
__device__ inline float warp_sums(float (&v)[kN]) {
#pragma unroll
  for (int n = kN / 2, step = 16; n > 0; n /= 2, step /= 2) {
    const bool upper = lane_id() & step;
#pragma unroll
    for (int i = 0; i < n; ++i) {
      const float other = __shfl_xor_sync(kFullWarp, upper ? v[i] : v[n + i], step);
      v[i] = (upper ? v[n + i] : v[i]) + other;
    }
  }
  float sum = v[0];
#pragma unroll
  for (int step = 16 / kN; step > 0; step /= 2) sum += __shfl_xor_sync(kFullWarp, sum, step);
  return sum;
}
__device__ inline float warp_max(float v) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) v = fmaxf(v, __shfl_xor_sync(kFullWarp, v, step));
  return v;
}
// The sum of the values of this lane and the lanes below it.
__device__ inline int warp_scan(int v) {
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(kFullWarp, v, step);
    if (lane_id() >= step) v += other;
  }
  return v;
}

// Integers in the order of the floats they come from. NaN is 1, below -infinity; 0 is free for
// "not to be chosen".
__device__ inline uint32_t order_key(float v) {
  const uint32_t bits = __float_as_uint(v + 0.0f);  // -0 becomes +0
  const uint32_t key = bits ^ ((bits >> 31) ? 0xffffffffu : 0x80000000u);
  return v != v ? 1u : key;
}
__device__ inline float key_to_float(uint32_t key) {
  if (key <= 1) return __int_as_float(0x7fc00000);
  return __uint_as_float(key ^ ((key >> 31) ? 0x80000000u : 0xffffffffu));
}

// V adjacent elements of a row for each lane of a warp: lane l holds elements l*V .. l*V+V-1, and
// `fill` past the end of the row.
template <int V, class T>
__device__ void load_row(const T* row, int n, bool aligned, float fill, float (&out)[V]) {
  constexpr int kPack = V * sizeof(T) > 16 ? 16 / sizeof(T) : V;
  const int first = lane_id() * V;
  if (aligned) {  // n is a multiple of V and rows begin on packs
#pragma unroll
    for (int i = 0; i < V; i += kPack) {
      if (first < n) {
        load(reinterpret_cast<const Pack<T, kPack>*>(row + first + i)).unpack(out + i);
      } else {
#pragma unroll
        for (int j = 0; j < kPack; ++j) out[i + j] = fill;
      }
    }
  } else {
#pragma unroll
    for (int i = 0; i < V; ++i) out[i] = first + i < n ? to_float(row[first + i]) : fill;
  }
}
template <int V, class T>
__device__ void store_row(T* row, int n, bool aligned, const float (&in)[V]) {
  constexpr int kPack = V * sizeof(T) > 16 ? 16 / sizeof(T) : V;
  const int first = lane_id() * V;
  if (aligned) {
    if (first < n) {
#pragma unroll
      for (int i = 0; i < V; i += kPack) {
        *reinterpret_cast<Pack<T, kPack>*>(row + first + i) = Pack<T, kPack>::of(in + i);
      }
    }
  } else {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      if (first + i < n) row[first + i] = from_float<T>(in[i]);
    }
  }
}

// Whether load_row<V> may use packs for rows of n elements that lie `stride` apart.
template <int V, class T>
bool rows_aligned(const void* data, int64_t n, int64_t stride) {
  constexpr int64_t kBytes = V * sizeof(T) > 16 ? 16 : V * sizeof(T);
  return n % V == 0 && reinterpret_cast<uintptr_t>(data) % kBytes == 0 &&
         stride * int64_t(sizeof(T)) % kBytes == 0;
}

// Calls f with the number of elements a lane holds, as a compile-time constant.
template <int V>
struct LaneWidth {
  static constexpr int value = V;
};
template <class F>
int with_lane_width(int64_t n, F f) {
  if (n <= 32) return f(LaneWidth<1>());
  if (n <= 64) return f(LaneWidth<2>());
  if (n <= 128) return f(LaneWidth<4>());
  if (n <= 256) return f(LaneWidth<8>());
  if (n <= 512) return f(LaneWidth<16>());
  return f(LaneWidth<32>());
}

}  // namespace sparsemoe
