// Encoding by every distance, in float32: for any width and number of codes, on any GPU, and for
// the vectors that the kernel on the tensor cores leaves.
#include <cooperative_groups.h>

#include "common/early.cuh"
#include "rvq/encode_hopper.h"
#include "rvq/encode_workspace.h"
#include "rvq/residuals.cuh"
#include "rvq/rows.h"
#include "rvq/scale.cuh"
#include "rvq/vector.cuh"

namespace sparsemoe {
namespace {

constexpr int kThreads = 256, kRows = int(kExactRows), kCodes = 64, kDepth = 32;
constexpr int kRow = kRows + 4;  // of shared memory, in floats: columns lie one after the other

template <int kBlocks>
__device__ inline void block_or_cluster_sync() {
  if constexpr (kBlocks == 1) {
    __syncthreads();
  } else {
#if __CUDA_ARCH__ >= 900
    cooperative_groups::this_cluster().sync();
#endif
  }
}
// The same place in shared memory of another block of the cluster.
template <int kBlocks, class T>
__device__ inline T* of_block(T* place, int block) {
#if __CUDA_ARCH__ >= 900
  if constexpr (kBlocks > 1)
    return cooperative_groups::this_cluster().map_shared_rank(place, block);
#endif
  return place;
}

// For few vectors that encode_few is not for: kBlocks blocks, a cluster, take one and share the
// codes.
template <int kBlocks, int kPieces, bool kPacked>
__global__ void __launch_bounds__(kThreads, 2) few_any_width_kernel(const ExactParams params) {
  constexpr int kAtOnce = 16 / kPieces, kWarps = kThreads / 32;
  __shared__ float least[kWarps], of_block_least[2];
  __shared__ int found[kWarps], of_block_found[2];
  const RvqEncodeParams& p = params.p;
  const int width = int(p.width), n_codes = int(p.n_codes), lane = lane_id();
  const bool cosine = p.metric == Metric::cosine;
  float* const residual = params.residuals + int64_t(blockIdx.x) * width;  // a copy for each block
  const int64_t cluster = blockIdx.x / kBlocks, clusters = gridDim.x / kBlocks;
  const int warp_of_cluster = blockIdx.x % kBlocks * kWarps + warp_id();
  for (int64_t vector = cluster; vector < p.n; vector += clusters) {
    int32_t* codes = p.codes + vector * p.n_stages;
    for (int d = threadIdx.x; d < width; d += kThreads) {
      residual[d] = element_of(p.x, p.dtype, vector * p.x_stride + d);
    }
    for (int stage = 0; stage < int(p.n_stages); ++stage) {
      const float* codebook = static_cast<const float*>(p.codebooks) + stage * p.n_codes * width;
      float best = kInfinity;
      int code = 0;
      __syncthreads();
      for (int first = warp_of_cluster * kAtOnce; first < n_codes;
           first += kBlocks * kWarps * kAtOnce) {
        float sum[kAtOnce] = {}, norm2[kAtOnce] = {};
        for (int column = 0; column < width; column += kPieces * kWalkColumns) {
          Columns<kPieces> e[kAtOnce], r;
#pragma unroll
          for (int i = 0; i < kAtOnce; ++i) {
            const int64_t row = min(first + i, n_codes - 1);
            e[i].template load<kPacked>(codebook + row * width, column, width);
          }
          r.load_changing(residual, column, width);
#pragma unroll
          for (int i = 0; i < kAtOnce; ++i) {
            if (cosine) {
              sum[i] -= r.product(e[i]);
              norm2[i] += e[i].sum_of_squares();
            } else {
              e[i].subtract(r);
              sum[i] += e[i].sum_of_squares();
            }
          }
        }
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          float distance = warp_sum(sum[i]);
          if (cosine) distance *= inverse_norm(sqrtf(warp_sum(norm2[i])));
          if (first + i < n_codes && nearer(distance, first + i, best, code)) {
            best = distance, code = first + i;
          }
        }
      }
      if (lane == 0) least[warp_id()] = best, found[warp_id()] = code;
      __syncthreads();
      if (warp_id() == 0) {
        best = lane < kWarps ? least[lane] : kInfinity, code = lane < kWarps ? found[lane] : 0;
        least_of(best, code, kWarps);
        if (lane == 0) of_block_least[stage % 2] = best, of_block_found[stage % 2] = code;
      }
      block_or_cluster_sync<kBlocks>();
      best = *of_block<kBlocks>(&of_block_least[stage % 2], lane % kBlocks);
      code = *of_block<kBlocks>(&of_block_found[stage % 2], lane % kBlocks);
      least_of(best, code, kBlocks);
      if (!(best < kInfinity)) code = 0;
      if (threadIdx.x == 0 && blockIdx.x % kBlocks == 0) codes[stage] = code;
      for (int d = threadIdx.x; d < width; d += kThreads) {
        residual[d] -= codebook[int64_t(code) * width + d];
      }
    }
    block_or_cluster_sync<kBlocks>();  // the others have read what this block found
  }
}

// For many: a block takes 64 vectors at a time and keeps their residuals in device memory. Each
// thread adds up 4 x 4 distances of a tile of 64 codes, column by column; the 16 threads of the
// same vectors are half a warp.
__global__ void __launch_bounds__(kThreads) exact_kernel(const ExactParams params) {
  __shared__ float r[kDepth][kRow], e[kDepth][kRow];
  __shared__ float factor[kCodes];
  __shared__ int chosen[kRows], from_stage[kRows];
  __shared__ int64_t vector[kRows];
  const RvqEncodeParams& p = params.p;
  const int width = int(p.width), n_codes = int(p.n_codes), warp = warp_id(), lane = lane_id();
  wait_for_previous();
  const int64_t count = params.late ? params.late[0] : p.n;
  if (count <= kMostFew) return;
  float* const residuals = params.residuals + int64_t(blockIdx.x) * kRows * width;
  const bool cosine = p.metric == Metric::cosine;
  const int my_row = threadIdx.x / 16 * 4, my_code = threadIdx.x % 16 * 4;

  for (int64_t first = int64_t(blockIdx.x) * kRows; first < count;
       first += int64_t(gridDim.x) * kRows) {
    const int n_rows = int(min(int64_t(kRows), count - first));
    __syncthreads();
    if (threadIdx.x < kRows) {
      const int64_t at = first + min(int(threadIdx.x), n_rows - 1);
      vector[threadIdx.x] = params.late ? params.late[2 + 2 * at] : at;
      from_stage[threadIdx.x] = params.late ? params.late[3 + 2 * at] : 0;
    }
    __syncthreads();
    // What the stages that are already known leave.
    for (int row = warp; row < kRows; row += kThreads / 32) {
      for (int d = lane; d < width; d += 32) {
        float v = element_of(p.x, p.dtype, vector[row] * p.x_stride + d);
        for (int q = 0; q < from_stage[row]; ++q) {
          const int64_t code = p.codes[vector[row] * p.n_stages + q];
          v -= static_cast<const float*>(p.codebooks)[(q * p.n_codes + code) * width + d];
        }
        residuals[row * width + d] = v;
      }
    }
    for (int stage = 0; stage < int(p.n_stages); ++stage) {
      const float* codebook = static_cast<const float*>(p.codebooks) + stage * p.n_codes * width;
      __syncthreads();
      if (!__syncthreads_or(threadIdx.x < kRows && from_stage[threadIdx.x] <= stage)) continue;
      float least[4];
      int found[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) least[i] = kInfinity, found[i] = 0;
      for (int tile = 0; tile < n_codes; tile += kCodes) {
        float sum[4][4] = {};
        if (cosine) {
          for (int c = warp; c < kCodes; c += kThreads / 32) {
            float norm2 = 0;
            for (int d = lane; d < width && tile + c < n_codes; d += 32) {
              const float v = codebook[int64_t(tile + c) * width + d];
              norm2 += v * v;
            }
            norm2 = warp_sum(norm2);
            if (lane == 0) factor[c] = inverse_norm(sqrtf(norm2));
          }
        }
        for (int depth = 0; depth < width; depth += kDepth) {
          __syncthreads();
          for (int i = threadIdx.x; i < kRows * kDepth; i += kThreads) {
            const int row = i / kDepth, d = i % kDepth;
            const bool inside = depth + d < width;
            r[d][row] = inside ? residuals[row * width + depth + d] : 0.0f;
            e[d][row] = inside && tile + row < n_codes
                            ? __ldg(codebook + int64_t(tile + row) * width + depth + d)
                            : 0.0f;
          }
          __syncthreads();
#pragma unroll 8
          for (int d = 0; d < kDepth; ++d) {
            const float4 a = *reinterpret_cast<const float4*>(&r[d][my_row]);
            const float4 b = *reinterpret_cast<const float4*>(&e[d][my_code]);
            const float left[4] = {a.x, a.y, a.z, a.w}, code[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
            for (int i = 0; i < 4; ++i) {
#pragma unroll
              for (int j = 0; j < 4; ++j) {
                const float v = cosine ? -left[i] : left[i] - code[j];
                sum[i][j] += v * (cosine ? code[j] : v);
              }
            }
          }
        }
        if (cosine) __syncthreads();
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int code = tile + my_code + j;
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float distance = cosine ? sum[i][j] * factor[my_code + j] : sum[i][j];
            if (code < n_codes && distance < least[i]) least[i] = distance, found[i] = code;
          }
        }
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        least_of(least[i], found[i], 16);
        if (threadIdx.x % 16 == 0) chosen[my_row + i] = found[i];
      }
      __syncthreads();
      for (int row = warp; row < n_rows; row += kThreads / 32) {
        if (from_stage[row] > stage) continue;
        const int code = chosen[row];
        if (lane == 0) p.codes[vector[row] * p.n_stages + stage] = code;
        for (int d = lane; d < width; d += 32) {
          residuals[row * width + d] -= codebook[int64_t(code) * width + d];
        }
      }
    }
  }
}

template <int kBlocks>
int launch_few(const ExactParams& params, void* stream) {
  const RvqEncodeParams& p = params.p;
  const bool packed = packs_of_4<float>(p.codebooks, p.width, p.width);
  if (kBlocks > 1 && p.width <= kMostFewWidth) return encode_few(params, stream);
  return with_pieces(p.width, [&](auto pieces) {
    constexpr int kPieces = kBlocks > 1 ? 8 : decltype(pieces)::value;
    const auto kernel = packed ? few_any_width_kernel<kBlocks, kPieces, true>
                               : few_any_width_kernel<kBlocks, kPieces, false>;
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = kBlocks, attribute.val.clusterDim.y = 1;
    attribute.val.clusterDim.z = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = unsigned(std::min(p.n, kFewBlocks / kBlocks) * kBlocks);
    config.blockDim = kThreads, config.stream = cudaStream_t(stream);
    config.attrs = &attribute, config.numAttrs = kBlocks > 1 ? 1 : 0;
    return int(cudaLaunchKernelEx(&config, kernel, params));
  });
}

}  // namespace

int encode_exact(const ExactParams& p, void* stream) {
  // Of late vectors only the GPU knows how many there are: the one of the two kernels that it is
  // not for does not look for codes. The last lets encode_finish begin.
  if (p.p.n > kMostFew) {
    const int error = launch_early(exact_kernel, unsigned(p.n_blocks), kThreads, 0, stream, p);
    if (error != 0 || !p.late) return error;
  }
  return runs_sm_90a() ? launch_few<8>(p, stream) : launch_few<1>(p, stream);
}

}  // namespace sparsemoe
