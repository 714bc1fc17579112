// Decoding. A code is read anew for each vector, and the L2 hands out no more than some 6 TB/s: so
// for many vectors, blocks keep 128 bytes of as many codes as fit into shared memory, and add those
// 128 bytes up for their vectors. What they look up is fetched one turn ahead: behind the writes
// that keep memory busy, a read takes microseconds.
#include "common/ptx.cuh"
#include "rvq/decode.h"
#include "rvq/residuals.cuh"
#include "rvq/rows.h"

namespace sparsemoe {
namespace {

constexpr int kSliceBytes = 128, kLanes = kSliceBytes / 16;
constexpr int kTurns = 2;  // of codes that a warp has in shared memory
constexpr int64_t kSharedBytes = 226 * 1024, kMostTurnBytes = 64 * 1024;

// from + a * b, in one instruction.
__device__ inline const char* advance(const void* from, uint32_t a, uint32_t b) {
  const char* to;
  asm("mad.wide.u32 %0, %1, %2, %3;" : "=l"(to) : "r"(a), "r"(b), "l"(from));
  return to;
}

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
__device__ inline int4 four_codes(const int* codes, int left) {
  if (kPacked) return *reinterpret_cast<const int4*>(codes);
  return make_int4(codes[0], left > 1 ? codes[1] : -1, left > 2 ? codes[2] : -1,
                   left > 3 ? codes[3] : -1);
}

template <class T>
struct Slices {
  static constexpr int kThreads = sizeof(T) == 4 ? 512 : 768, kWarps = kThreads / 32;
  static constexpr int kAtOnce = sizeof(T) == 4 ? 4 : 2;                 // vectors of a thread
  static constexpr int kRows = 32 / kLanes, kVectors = kAtOnce * kRows;  // of a warp
  static constexpr int64_t turn_bytes(int64_t n_stages) {
    return kTurns * kWarps * kVectors * 4 * n_stages;
  }
};

// kPacked: the number of stages is a multiple of four.
template <class T, bool kPacked>
__global__ void __launch_bounds__(Slices<T>::kThreads)
    decode_slices_kernel(const RvqDecodeParams p, const int n_kept) {
  using Of = Slices<T>;
  constexpr int kOf = 16 / sizeof(T), kAtOnce = Of::kAtOnce, kVectors = Of::kVectors;
  // [1 + n_kept, kLanes], of which the first are zeros; codes [warps, kTurns, kVectors, n_stages]
  extern __shared__ uint4 memory[];
  const int n_stages = int(p.n_stages), n_codes = int(p.n_codes), n = int(p.n);
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / 32, in_warp = threadIdx.x % 32;
  const int row_bytes = int(p.width * sizeof(T)), column = (blockIdx.x * kLanes + lane) * 16;
  const char* const from = static_cast<const char*>(p.codebooks) + column;
  const uint32_t own = shared_address(memory) + kSliceBytes + 16 * lane;
  if (threadIdx.x < kLanes) memory[lane] = make_uint4(0, 0, 0, 0);
  for (int i = threadIdx.x / kLanes; i < n_kept; i += Of::kThreads / kLanes) {
    copy_async(own + i * kSliceBytes, advance(from, i, row_bytes), false);
  }
  const int per_turn = kVectors * n_stages, step = gridDim.y * Of::kWarps * kVectors;
  int* const codes_of_warp =
      reinterpret_cast<int*>(memory + (1 + n_kept) * kLanes) + warp * kTurns * per_turn;
  const auto fetch = [&](int first, int turn) {
    const int* const codes = reinterpret_cast<const int*>(advance(p.codes, first, 4 * n_stages));
    const uint32_t to = shared_address(codes_of_warp + turn * per_turn);
    for (int i = in_warp; i < min(kVectors, n - first) * n_stages; i += 32) {
      copy_async_word(to + 4 * i, codes + i, false);
    }
    copy_async_commit();
  };
  int first = (blockIdx.y * Of::kWarps + warp) * kVectors;
  fetch(first, 0);
  copy_async_wait<0>();
  __syncthreads();
  for (int turn = 0; first < n; first += step, turn ^= 1) {
    __syncwarp();  // the turn before has been read
    fetch(first + step, turn ^ 1);
    copy_async_wait<1>();
    __syncwarp();
    float sum[kAtOnce][kOf] = {};
    for (int stage = 0; stage < n_stages; stage += 4) {
      int4 codes[kAtOnce];
      uint4 e[4][kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int vector = turn * kVectors + in_warp / kLanes + i * Of::kRows;
        codes[i] = four_codes<kPacked>(codes_of_warp + vector * n_stages + stage, n_stages - stage);
      }
#pragma unroll
      for (int s = 0; s < 4; ++s) {
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          const int code = (&codes[i].x)[s];
          const bool is_one = uint32_t(code) < uint32_t(n_codes);
          const int at = is_one ? (stage + s) * n_codes + code : -1;  // -1: zeros
          e[s][i] = load_either(at, n_kept, own + at * kSliceBytes, advance(from, at, row_bytes));
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
      const int at = first + in_warp / kLanes + i * Of::kRows;
      char* const to = static_cast<char*>(p.y) + column + int64_t(at) * row_bytes;
      const Pack<T, kOf> y = Pack<T, kOf>::of(sum[i]);
      if (at < n) __stcs(reinterpret_cast<uint4*>(to), reinterpret_cast<const uint4&>(y));
    }
  }
}

}  // namespace

int rvq_decode_cuda(const RvqDecodeParams& p, void* stream) {
  return with_cuda_dtype(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const int64_t slices = p.width * int64_t(sizeof(T)) / kSliceBytes;
    const int64_t groups = slices ? multiprocessors() / slices : 0;
    const int64_t turn_bytes = Slices<T>::turn_bytes(p.n_stages);
    // Where a block reads each code more than three times.
    const bool pays = runs_sm_90a() && groups > 0 && p.n < (1 << 30) &&
                      turn_bytes <= kMostTurnBytes && p.n_stages * p.n_codes < (1 << 24) &&
                      p.n / groups > 3 * p.n_codes;
    if (!pays || p.width * sizeof(T) % kSliceBytes != 0 || uintptr_t(p.codebooks) % 16 != 0 ||
        uintptr_t(p.y) % 16 != 0) {
      return decode_rows_cuda(p, stream);
    }
    const int64_t room = (kSharedBytes - turn_bytes) / kSliceBytes - 1;
    const int64_t n_kept = std::min(p.n_stages * p.n_codes, room);
    const int bytes = int((1 + n_kept) * kSliceBytes + turn_bytes);
    const auto kernel =
        p.n_stages % 4 == 0 ? decode_slices_kernel<T, true> : decode_slices_kernel<T, false>;
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error != cudaSuccess) return int(error);
    const dim3 grid{unsigned(slices), unsigned(groups)};
    kernel<<<grid, Slices<T>::kThreads, bytes, cudaStream_t(stream)>>>(p, int(n_kept));
    return int(cudaGetLastError());
  });
}

}  // namespace sparsemoe
