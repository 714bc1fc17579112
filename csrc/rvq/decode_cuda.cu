// Decoding. A code is read anew for each vector, and the L2 hands out no more than some 6 TB/s: so
// for many vectors, blocks keep 128 bytes of as many codes as fit into shared memory, and add those
// 128 bytes up for their vectors.
#include "common/ptx.cuh"
#include "rvq/decode.h"
#include "rvq/residuals.cuh"
#include "rvq/rows.h"

namespace sparsemoe {
namespace {

constexpr int kSliceBytes = 128, kLanes = kSliceBytes / 16;
constexpr int64_t kMostKept = 224 * 1024 / kSliceBytes;

// 16 bytes from shared memory where at < n_kept, else from device memory, without a branch.
__device__ inline uint4 load_either(int at, int n_kept, uint32_t shared, const char* global) {
  uint4 v;
  asm volatile(
      "{\n .reg .pred p;\n setp.lt.s32 p, %4, %5;\n"
      " @p ld.shared.v4.u32 {%0, %1, %2, %3}, [%6];\n"
      " @!p ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%7];\n}"
      : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
      : "r"(at), "r"(n_kept), "r"(shared), "l"(global));
  return v;
}

// The codes of four stages; less than zero beyond the last.
template <bool kPacked>
__device__ inline int4 four_codes(const char* codes, int left) {
  const int* const from = reinterpret_cast<const int*>(codes);
  if (kPacked) return __ldg(reinterpret_cast<const int4*>(from));
  return make_int4(__ldg(from), left > 1 ? __ldg(from + 1) : -1, left > 2 ? __ldg(from + 2) : -1,
                   left > 3 ? __ldg(from + 3) : -1);
}

// A thread takes kAtOnce vectors at a time. kPacked: the number of stages is a multiple of four.
template <class T, int kThreads, int kAtOnce, bool kPacked>
__global__ void __launch_bounds__(kThreads)
    decode_slices_kernel(const RvqDecodeParams p, const int n_kept) {
  constexpr int kOf = 16 / sizeof(T), kVectors = kThreads / kLanes, kStep = kAtOnce * kVectors;
  extern __shared__ uint4 memory[];  // [1 + n_kept, kLanes], of which the first are zeros
  const int n_stages = int(p.n_stages), n_codes = int(p.n_codes), n = int(p.n);
  const int lane = threadIdx.x % kLanes, row_bytes = int(p.width * sizeof(T));
  const int column = (blockIdx.x * kLanes + lane) * 16;
  const char* const from = static_cast<const char*>(p.codebooks) + column;
  char* const to = static_cast<char*>(p.y) + column;
  const uint32_t own = shared_address(memory) + kSliceBytes + 16 * lane;
  if (threadIdx.x < kLanes) memory[lane] = make_uint4(0, 0, 0, 0);
  for (int i = threadIdx.x / kLanes; i < n_kept; i += kVectors) {
    copy_async(own + i * kSliceBytes, from + int64_t(i) * row_bytes, false);
  }
  copy_async_commit();
  const int each = (n + int(gridDim.y) - 1) / int(gridDim.y), begin = blockIdx.y * each;
  const int end = min(n, begin + each);
  int4 next[kAtOnce];
  const auto fetch = [&](int first, int stage) {
    const char* const codes = reinterpret_cast<const char*>(p.codes + stage);
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int64_t at = min(first + i * kVectors, n - 1);
      next[i] = four_codes<kPacked>(codes + at * (4 * n_stages), n_stages - stage);
    }
  };
  int row = begin + threadIdx.x / kLanes;
  fetch(row, 0);
  copy_async_wait<0>();
  __syncthreads();
  for (; row < end; row += kStep) {
    float sum[kAtOnce][kOf] = {};
    for (int stage = 0; stage < n_stages; stage += 4) {
      int4 codes[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) codes[i] = next[i];
      if (stage + 4 < n_stages) {
        fetch(row, stage + 4);
      } else {
        fetch(row + kStep, 0);
      }
      uint4 e[4][kAtOnce];
#pragma unroll
      for (int s = 0; s < 4; ++s) {
        const int base = (stage + s) * n_codes;
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          const int code = (&codes[i].x)[s];
          const int at = uint32_t(code) < uint32_t(n_codes) ? base + code : -1;  // -1: zeros
          e[s][i] = load_either(at, n_kept, own + at * kSliceBytes, from + int64_t(at) * row_bytes);
        }
      }
#pragma unroll
      for (int s = 0; s < 4; ++s) {
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          float v[kOf];
          reinterpret_cast<const Pack<T, kOf>&>(e[s][i]).unpack(v);
#pragma unroll
          for (int j = 0; j < kOf; ++j) sum[i][j] += v[j];
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int at = row + i * kVectors;
      if (at < end) {
        *reinterpret_cast<Pack<T, kOf>*>(to + int64_t(at) * row_bytes) = Pack<T, kOf>::of(sum[i]);
      }
    }
  }
}

}  // namespace

int rvq_decode_cuda(const RvqDecodeParams& p, void* stream) {
  return with_cuda_dtype(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const int64_t slices = p.width * int64_t(sizeof(T)) / kSliceBytes;
    const int64_t n_kept = std::min(p.n_stages * p.n_codes, kMostKept);
    const int64_t groups = slices ? multiprocessors() / slices : 0;
    // Where a block reads each code more than three times.
    const bool pays = runs_sm_90a() && groups > 0 && p.n < (1 << 30) &&
                      p.n_stages * p.n_codes < (1 << 24) && p.n / groups > 3 * p.n_codes;
    if (!pays || p.width * sizeof(T) % kSliceBytes != 0 || uintptr_t(p.codebooks) % 16 != 0 ||
        uintptr_t(p.y) % 16 != 0 || uintptr_t(p.codes) % 16 != 0) {
      return decode_rows_cuda(p, stream);
    }
    const int bytes = int((1 + n_kept) * kSliceBytes);
    constexpr int kThreads = sizeof(T) == 4 ? 512 : 768, kAtOnce = sizeof(T) == 4 ? 4 : 2;
    const auto kernel = p.n_stages % 4 == 0 ? decode_slices_kernel<T, kThreads, kAtOnce, true>
                                            : decode_slices_kernel<T, kThreads, kAtOnce, false>;
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error != cudaSuccess) return int(error);
    kernel<<<dim3(unsigned(slices), unsigned(groups)), kThreads, bytes, cudaStream_t(stream)>>>(
        p, int(n_kept));
    return int(cudaGetLastError());
  });
}

}  // namespace sparsemoe
