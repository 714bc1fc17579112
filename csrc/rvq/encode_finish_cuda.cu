// What the codes of vectors give, their sum and the errors; and the codes that the kernels on the
// tensor cores have left.
#include "common/early.cuh"
#include "rvq/codes.cuh"
#include "rvq/encode_exact.cuh"

namespace sparsemoe {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / 32;

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

union LateShared {
  int place[2];
  ExactOneShared<kWarps> one;
  ExactManyShared<kThreads> many;
};

// By a block: its share of the late vectors. Few are taken by groups of blocks; of many, only
// late.n_blocks have room for theirs.
template <class T, int kPieces, bool kPacked>
__device__ void take_late(const RvqEncodeParams& p, const LateVectors& late, int block, int blocks,
                          LateShared& s) {
  constexpr int kRows = ExactManyShared<kThreads>::kRows;
  constexpr int kAtOnce = (kPieces < 4 ? 8 : 16) / kPieces;
  const int64_t count = __ldcg(late.list);
  const auto vector = [&](int64_t at) { return int64_t(__ldcg(late.list + 2 + 2 * at)); };
  const auto stage = [&](int64_t at) { return __ldcg(late.list + 3 + 2 * at); };
  if (count == 0) return;
  if (count <= kMostFew) {
    const int most = group_blocks_for(count, blocks, p.n_codes, kWarps * kAtOnce);
    BlockGroup group(late.groups, most, s.place, block);
    const int n_groups = blocks / most;
    if (group.left_out() || group.group() >= n_groups) return;
    float* const residual = late.residuals + group.block() * p.width;
    for (int64_t at = group.group(); at < count; at += n_groups) {
      encode_one_exactly<kThreads, kPieces, kAtOnce, kPacked>(p, vector(at), stage(at), residual,
                                                              group, s.one);
      __syncthreads();
      if (group.rank() == 0 && warp_id() == 0) finish_vector<T, kPieces, kPacked>(p, vector(at));
    }
    return;
  }
  if (block >= late.n_blocks) return;
  float* const residuals = late.residuals + block * kRows * p.width;
  for (int64_t first = int64_t(block) * kRows; first < count; first += late.n_blocks * kRows) {
    const int n_rows = int(min(int64_t(kRows), count - first));
    __syncthreads();
    if (threadIdx.x < kRows) {
      const int64_t at = first + min(int(threadIdx.x), n_rows - 1);
      s.many.vector[threadIdx.x] = vector(at), s.many.from_stage[threadIdx.x] = stage(at);
    }
    __syncthreads();
    encode_many_exactly(p, n_rows, residuals, s.many);
    __syncwarp();
    for (int row = warp_id(); row < n_rows; row += kWarps) {
      finish_vector<T, kPieces, kPacked>(p, s.many.vector[row]);
    }
  }
}

// Of a multiprocessor: what finish_vector has registers for.
template <int kPieces>
constexpr int kBlocksAtOnce = kPieces < 4   ? 7
                              : kPieces < 8 ? 5
                                            : 3;

// A warp a vector. With late ones, only the last blocks wait until the kernel before has looked for
// all codes: others may have to run where its blocks have run.
template <class T, int kPieces, bool kPacked>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce<kPieces>)
    finish_kernel(const RvqEncodeParams p, const LateVectors late, int n_blocks) {
  __shared__ LateShared s;
  if (!late.list || int(blockIdx.x) >= n_blocks) wait_for_previous();
  if (int(blockIdx.x) < n_blocks) {
    const int64_t row = blockIdx.x * int64_t(kWarps) + warp_id();
    if (row < p.n) finish_vector<T, kPieces, kPacked>(p, row);
  } else {
    take_late<T, kPieces, kPacked>(p, late, blockIdx.x - n_blocks, gridDim.x - n_blocks, s);
  }
}

}  // namespace

int encode_finish(const RvqEncodeParams& p, const LateVectors* late, void* stream) {
  return with_cuda_dtype(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const bool packed = packs_of_4<T>(p.x, p.width, p.x_stride) &&
                        packs_of_4<T>(p.quantized, p.width, p.width) &&
                        packs_of_4<float>(p.codebooks, p.width, p.width);
    return with_pieces(p.width, [&](auto pieces) {
      constexpr int kPieces = decltype(pieces)::value;
      const auto kernel =
          packed ? finish_kernel<T, kPieces, true> : finish_kernel<T, kPieces, false>;
      const int64_t n_blocks = ceil_div(p.n, kWarps);
      const int64_t for_late = late ? std::max(late->n_blocks, few_blocks(p.n)) : 0;
      return launch_early(kernel, unsigned(n_blocks + for_late), kThreads, 0, stream, p,
                          late ? *late : LateVectors{}, int(n_blocks));
    });
  });
}

}  // namespace sparsemoe
