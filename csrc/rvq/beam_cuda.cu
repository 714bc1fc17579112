// Beam search: every distance in float32, stage after stage, in one launch.
#include "rvq/encode.h"
#include "rvq/encode_kernels.h"
#include "rvq/encode_workspace.h"
#include "rvq/vector.cuh"

namespace sparsemoe {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32, kRows = int(kBeamRows), kCodes = 64;
constexpr int kDepth = 32, kPadded = kRows + 4;

// The nearest of all, in order, one a lane: distance, and beam * n_codes + code.
struct Nearest {
  float distance = kInfinity;
  int index = 0x7fffffff;

  // Puts in those of the lanes' candidates that are nearer than the last of `count`.
  __device__ void add(float candidate, int at, int count) {
    while (true) {
      const float last = __shfl_sync(kFullWarp, distance, count - 1);
      const int last_index = __shfl_sync(kFullWarp, index, count - 1);
      const unsigned some = __ballot_sync(kFullWarp, nearer(candidate, at, last, last_index));
      if (!some) return;
      const int lane = __ffs(some) - 1;
      const float d = __shfl_sync(kFullWarp, candidate, lane);
      const int i = __shfl_sync(kFullWarp, at, lane);
      const float before = __shfl_up_sync(kFullWarp, distance, 1);
      const int before_index = __shfl_up_sync(kFullWarp, index, 1);
      const bool moves = nearer(d, i, distance, index);
      const bool first = lane_id() == 0 || !nearer(d, i, before, before_index);
      if (moves) distance = first ? d : before, index = first ? i : before_index;
      if (lane_id() == lane) candidate = kInfinity, at = 0x7fffffff;
    }
  }
};

// A block takes kRows / beam vectors at a time; a row is a beam of one of them.
__global__ void __launch_bounds__(kThreads) beam_kernel(const RvqBeamParams p) {
  __shared__ __align__(16) float r[kDepth][kPadded], e[kDepth][kPadded];
  __shared__ float distances[kRows][kCodes + 1];
  const int width = int(p.width), n_codes = int(p.n_codes), n_stages = int(p.n_stages);
  const int beam = int(p.beam), lane = lane_id(), at_once = kRows / beam;
  float* const residuals =
      static_cast<float*>(p.workspace) + blockIdx.x * int64_t(kRows) * (width + 2 * n_stages);
  int* const codes[2] = {reinterpret_cast<int*>(residuals + kRows * width),
                         reinterpret_cast<int*>(residuals + kRows * width) + kRows * n_stages};
  const int my_row = threadIdx.x / 16 * 4, my_code = threadIdx.x % 16 * 4;

  for (int64_t first = blockIdx.x * int64_t(at_once); first < p.n;
       first += gridDim.x * int64_t(at_once)) {
    const int n_vectors = int(min(int64_t(at_once), p.n - first));
    int n_beams = 1;
    for (int stage = 0; stage < n_stages; ++stage) {
      const float* codebook = static_cast<const float*>(p.codebooks) + stage * p.n_codes * width;
      const int* before = codes[stage % 2];
      int* after = codes[(stage + 1) % 2];
      __syncthreads();
      for (int row = warp_id(); row < n_vectors * n_beams; row += kWarps) {
        const int64_t vector = first + row / n_beams;
        const int* of_row = before + (row / n_beams * beam + row % n_beams) * n_stages;
        for (int d = lane; d < width; d += 32) {
          float v = element_of(p.x, p.dtype, vector * p.x_stride + d);
          for (int q = 0; q < stage; ++q) {
            v -= static_cast<const float*>(p.codebooks)[(q * p.n_codes + of_row[q]) * width + d];
          }
          residuals[row * width + d] = v;
        }
      }
      const int n_next = int(min(int64_t(beam), int64_t(n_beams) * n_codes));
      Nearest nearest[(kRows + kWarps - 1) / kWarps];  // of vectors warp_id(), + kWarps, ..
      for (int tile = 0; tile < n_codes; tile += kCodes) {
        float sum[4][4] = {};
        for (int depth = 0; depth < width; depth += kDepth) {
          __syncthreads();
          for (int i = threadIdx.x; i < kRows * kDepth; i += kThreads) {
            const int row = i / kDepth, d = i % kDepth;
            const bool inside = depth + d < width;
            r[d][row] =
                inside && row < n_vectors * n_beams ? residuals[row * width + depth + d] : 0.0f;
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
                const float v = left[i] - code[j];
                sum[i][j] += v * v;
              }
            }
          }
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
#pragma unroll
          for (int j = 0; j < 4; ++j) distances[my_row + i][my_code + j] = sum[i][j];
        }
        __syncthreads();
#pragma unroll
        for (int k = 0; k < kRows / kWarps; ++k) {
          const int vector = warp_id() + k * kWarps;
          if (vector >= n_vectors) break;
          for (int b = 0; b < n_beams; ++b) {
            for (int c = lane; c < kCodes; c += 32) {
              const bool there = tile + c < n_codes;
              const float distance = distances[vector * n_beams + b][c];
              const bool usable = there && distance == distance;
              nearest[k].add(usable ? distance : kInfinity,
                             there ? b * n_codes + tile + c : 0x7fffffff, n_next);
            }
          }
        }
      }
#pragma unroll
      for (int k = 0; k < kRows / kWarps; ++k) {
        const int vector = warp_id() + k * kWarps;
        if (vector >= n_vectors || lane >= n_next) continue;
        const int from = nearest[k].index / n_codes, code = nearest[k].index % n_codes;
        const int* source = before + (vector * beam + from) * n_stages;
        int* target = after + (vector * beam + lane) * n_stages;
        for (int q = 0; q < stage; ++q) target[q] = source[q];
        target[stage] = code;
        if (lane == 0 && stage + 1 == n_stages) {
          for (int q = 0; q < n_stages; ++q) p.codes[(first + vector) * n_stages + q] = target[q];
        }
      }
      n_beams = n_next;
    }
  }
}

}  // namespace

int rvq_beam_encode_cuda(const RvqBeamParams& p, void* stream) {
  if (p.n_stages > 0) {
    const unsigned blocks = unsigned(rvq_beam_blocks(p));
    beam_kernel<<<blocks, kThreads, 0, cudaStream_t(stream)>>>(p);
    const int error = int(cudaGetLastError());
    if (error != 0) return error;
  }
  RvqEncodeParams finish{};
  finish.n = p.n, finish.width = p.width, finish.n_stages = p.n_stages, finish.n_codes = p.n_codes;
  finish.x = p.x, finish.x_stride = p.x_stride, finish.dtype = p.dtype;
  finish.codebooks = p.codebooks, finish.codes = p.codes, finish.quantized = p.quantized;
  finish.errors = p.errors;
  return encode_finish(finish, nullptr, stream);
}

}  // namespace sparsemoe
