// Encoding of all vectors by every distance: on GPUs before Hopper, and for shapes that its kernels
// do not take.
#include "rvq/encode_exact.cuh"
#include "rvq/encode_kernels.h"

namespace sparsemoe {
namespace {

constexpr int kThreads = 256;

// For few vectors: kBlocks blocks, a cluster, take one and share the codes.
template <int kBlocks, int kPieces, bool kPacked>
__global__ void __launch_bounds__(kThreads, 2)
    few_kernel(const RvqEncodeParams p, float* residuals) {
  __shared__ ExactOneShared<kThreads / 32> s;
  const int64_t cluster = blockIdx.x / kBlocks, clusters = gridDim.x / kBlocks;
  for (int64_t vector = cluster; vector < p.n; vector += clusters) {
    encode_one_exactly<kBlocks, kThreads, kPieces, 16 / kPieces, kPacked>(
        p, vector, 0, residuals + int64_t(blockIdx.x) * p.width, s);
    block_or_cluster_sync<kBlocks>();  // the others have read what this block found
  }
}

// For many: a block takes 64 at a time.
__global__ void __launch_bounds__(kThreads, 4)
    many_kernel(const RvqEncodeParams p, float* residuals) {
  __shared__ ExactManyShared<kThreads> s;
  constexpr int kRows = s.kRows;
  static_assert(kRows == kExactRows, "as the workspace has room for");
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

template <int kBlocks>
int launch_few(const RvqEncodeParams& p, float* residuals, void* stream) {
  const bool packed = packs_of_4<float>(p.codebooks, p.width, p.width);
  return with_pieces(p.width, [&](auto pieces) {
    constexpr int kPieces = decltype(pieces)::value;
    const auto kernel =
        packed ? few_kernel<kBlocks, kPieces, true> : few_kernel<kBlocks, kPieces, false>;
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = kBlocks, attribute.val.clusterDim.y = 1;
    attribute.val.clusterDim.z = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = unsigned(std::min(p.n, kFewBlocks / kBlocks) * kBlocks);
    config.blockDim = kThreads, config.stream = cudaStream_t(stream);
    config.attrs = &attribute, config.numAttrs = kBlocks > 1 ? 1 : 0;
    return int(cudaLaunchKernelEx(&config, kernel, p, residuals));
  });
}

}  // namespace

int encode_exactly(const RvqEncodeParams& p, float* residuals, int64_t n_blocks, void* stream) {
  if (p.n <= kMostFew) {
    return runs_sm_90a() ? launch_few<8>(p, residuals, stream)
                         : launch_few<1>(p, residuals, stream);
  }
  many_kernel<<<unsigned(n_blocks), kThreads, 0, cudaStream_t(stream)>>>(p, residuals);
  return int(cudaGetLastError());
}

}  // namespace sparsemoe
