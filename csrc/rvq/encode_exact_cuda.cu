// Encoding of all vectors by every distance: on GPUs before Hopper, and for shapes that its kernels
// do not take.
#include "common/together.cuh"
#include "rvq/encode_exact.cuh"
#include "rvq/encode_kernels.h"

namespace sparsemoe {
namespace {

constexpr int kThreads = 256;

// For few vectors, which are taken by groups of blocks if all blocks run at once.
template <int kPieces, bool kPacked>
__global__ void __launch_bounds__(kThreads, 2)
    few_kernel(const RvqEncodeParams p, GroupNotes* notes, float* residuals, bool at_once) {
  __shared__ ExactOneShared<kThreads / 32> s;
  __shared__ int place[2];
  constexpr int kAtOnce = 16 / kPieces;
  const int blocks = int(gridDim.x);
  int most = 1;
  if (at_once) {
    if (blockIdx.x == 0) clear_counters(notes, threadIdx.x, kThreads);
    grid_sync();
    most = group_blocks_for(p.n, blocks, p.n_codes, kThreads / 32 * kAtOnce);
  }
  BlockGroup group(notes, most, place, blockIdx.x);
  const int n_groups = blocks / most;
  if (group.left_out() || group.group() >= n_groups) return;
  float* const residual = residuals + group.block() * p.width;
  for (int64_t vector = group.group(); vector < p.n; vector += n_groups) {
    encode_one_exactly<kThreads, kPieces, kAtOnce, kPacked>(p, vector, 0, residual, group, s);
  }
}

// For many: a block takes 64 at a time.
__global__ void __launch_bounds__(kThreads, 4)
    many_kernel(const RvqEncodeParams p, float* residuals) {
  __shared__ ExactManyShared<kThreads> s;
  constexpr int kRows = s.kRows;
  for (int64_t first = int64_t(blockIdx.x) * kRows; first < p.n;
       first += int64_t(gridDim.x) * kRows) {
    const int n_rows = int(min(int64_t(kRows), p.n - first));
    __syncthreads();
    if (threadIdx.x < kRows) {
      s.vector[threadIdx.x] = first + min(int(threadIdx.x), n_rows - 1);
      s.from_stage[threadIdx.x] = 0;
    }
    __syncthreads();
    encode_many_exactly(p, n_rows, residuals + int64_t(blockIdx.x) * kRows * p.width, s);
  }
}

int launch_few(const RvqEncodeParams& p, GroupNotes* groups, float* residuals, void* stream) {
  return with_pieces(p.width, [&](auto pieces) {
    const auto launch = [&](auto packed) {
      constexpr auto kernel = few_kernel<decltype(pieces)::value, decltype(packed)::value>;
      if (runs_sm_90a()) {
        return launch_together<kernel, 1>(few_blocks(p.n), kThreads, 0, stream, p, groups,
                                          residuals, true);
      }
      const unsigned blocks = unsigned(std::min(p.n, kFewBlocks));
      kernel<<<blocks, kThreads, 0, cudaStream_t(stream)>>>(p, groups, residuals, false);
      return int(cudaGetLastError());
    };
    const bool packed = packs_of_4<float>(p.codebooks, p.width, p.width);
    return packed ? launch(std::true_type()) : launch(std::false_type());
  });
}

}  // namespace

int encode_exactly(const RvqEncodeParams& p, GroupNotes* groups, float* residuals, int64_t n_blocks,
                   void* stream) {
  if (p.n <= kMostFew) return launch_few(p, groups, residuals, stream);
  many_kernel<<<unsigned(n_blocks), kThreads, 0, cudaStream_t(stream)>>>(p, residuals);
  return int(cudaGetLastError());
}

}  // namespace sparsemoe
