// A stable counting sort in two launches: blocks count their pairs; then every block adds up the
// counts of the blocks before it and gives its pairs their rows, in order. Where one block takes
// all pairs the second launch is enough, and for the fewest there is a kernel of their own. Atomics
// touch integers only, whose sums do not depend on the order.
#include "common/early.cuh"
#include "common/select.cuh"
#include "moe/plan.h"

namespace sparsemoe {
namespace {

constexpr int kCounters = 8192;  // shared memory for one counter a warp and expert
constexpr int kMaxBlocks = 132;
constexpr int kPairsPerThread = 2;
constexpr int kKeepThreads = 1024;

// As many warps as find pairs, at least four, and have room for their counters.
int threads_for(int64_t n_experts, int64_t n_pairs) {
  const int64_t with_pairs = std::max<int64_t>(4, ceil_div(n_pairs, 32 * kPairsPerThread));
  const int64_t with_room = std::max<int64_t>(1, kCounters / n_experts);
  return 32 * int(std::min({with_pairs, with_room, int64_t(32)}));
}

__global__ void count_kernel(const PlanParams p, int64_t per_block) {
  extern __shared__ int count[];
  const int n = int(p.n_experts);
  for (int e = threadIdx.x; e < n; e += blockDim.x) count[e] = 0;
  __syncthreads();
  const int64_t first = blockIdx.x * per_block;
  const int64_t last = min(first + per_block, p.n_tokens * p.top_k);
  for (int64_t i = first + threadIdx.x; i < last; i += blockDim.x) {
    const uint32_t e = p.experts[i];
    if (e < unsigned(n)) atomicAdd(&count[e], 1);
  }
  __syncthreads();
  int32_t* out = static_cast<int32_t*>(p.workspace) + blockIdx.x * p.n_experts;
  for (int e = threadIdx.x; e < n; e += blockDim.x) out[e] = count[e];
}

// Replaces values[0..n) by their exclusive prefix sums and returns the total; a whole block calls.
__device__ int exclusive_scan(int* values, int n) {
  __shared__ int of_warp[32];
  int carry = 0;
  for (int first = 0; first < n; first += blockDim.x) {
    const int i = first + threadIdx.x;
    const int value = i < n ? values[i] : 0;
    const int upto = warp_scan(value);
    if (lane_id() == 31) of_warp[warp_id()] = upto;
    __syncthreads();
    const int n_warps = min(int(blockDim.x), n - first + 31) / 32;
    int before = carry;
#pragma unroll 8
    for (int w = 0; w < n_warps; ++w) {
      const int all = of_warp[w];
      if (w < warp_id()) before += all;
      carry += all;
    }
    if (i < n) values[i] = before + upto - value;
    __syncthreads();
  }
  return carry;
}

// The lanes of a warp that hold the same expert; lanes without expert hold -1.
__device__ unsigned same_expert(int expert) { return __match_any_sync(kFullWarp, expert); }

__global__ void __launch_bounds__(1024)
    place_kernel(const PlanParams p, int n_blocks, int64_t per_block, int32_t* offsets,
                 int32_t* row_pair) {
  constexpr int kAtOnce = 8;  // warps whose counters a thread loads before it writes
  extern __shared__ int shared[];
  const int n = int(p.n_experts), n_warps = blockDim.x / 32;
  int* start = shared;         // [n] the expert's first row
  int* before = shared + n;    // [n] rows of the expert in earlier blocks
  int* next = shared + 2 * n;  // [n_warps, n] each warp's next row
  const int32_t* counts = static_cast<const int32_t*>(p.workspace);
  for (int e = threadIdx.x; e < 2 * n; e += blockDim.x) start[e] = 0;
  for (int i = threadIdx.x; i < n_warps * n; i += blockDim.x) next[i] = 0;
  __syncthreads();
  wait_for_previous();
  let_next_begin();

  const int parts = n_blocks == 1 ? 0 : max(1, int(blockDim.x) / n);  // of the blocks
  for (int i = threadIdx.x; i < parts * n; i += blockDim.x) {
    const int e = i % n;
    int all = 0, earlier = 0;
#pragma unroll 8
    for (int block = i / n; block < n_blocks; block += parts) {
      const int count = counts[block * n + e];
      all += count;
      earlier += block < int(blockIdx.x) ? count : 0;
    }
    if (all) atomicAdd(&start[e], all);
    if (earlier) atomicAdd(&before[e], earlier);
  }

  // Count the pairs of each warp.
  const int64_t n_pairs = p.n_tokens * p.top_k;
  const int64_t per_warp = per_block / n_warps;  // a multiple of 32
  const int64_t first = blockIdx.x * per_block + warp_id() * per_warp;
  const int64_t last = min(first + per_warp, n_pairs);
  int* mine = next + warp_id() * n;
  for (int64_t i = first + lane_id(); i - lane_id() < last; i += 32) {
    const uint32_t e = i < last ? p.experts[i] : ~0u;
    const int expert = e < unsigned(n) ? int(e) : -1;
    const unsigned same = same_expert(expert);
    if (expert >= 0 && lane_id() == __ffs(same) - 1) mine[expert] += __popc(same);
    __syncwarp();
  }
  __syncthreads();
  if (n_blocks == 1) {
    for (int e = threadIdx.x; e < n; e += blockDim.x) {
      int all = 0;
#pragma unroll 8
      for (int w = 0; w < n_warps; ++w) all += next[w * n + e];
      start[e] = all;
    }
  }

  if (blockIdx.x == 0) {
    for (int e = threadIdx.x; e < n; e += blockDim.x) p.counts[e] = start[e];
    __syncthreads();
  }
  const int total = exclusive_scan(start, n);
  if (blockIdx.x == 0) {
    for (int e = threadIdx.x; e < n; e += blockDim.x) offsets[e] = start[e];
    if (threadIdx.x == 0) offsets[n] = total;
  }
  for (int e = threadIdx.x; e < n; e += blockDim.x) {
    int row = start[e] + before[e];
    for (int first_warp = 0; first_warp < n_warps; first_warp += kAtOnce) {
      int count[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int w = first_warp + i;
        count[i] = w < n_warps ? next[w * n + e] : 0;
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int w = first_warp + i;
        if (w < n_warps) next[w * n + e] = row;
        row += count[i];
      }
    }
  }
  __syncthreads();

  const bool final = p.capacity < 0;
  for (int64_t i = first + lane_id(); i - lane_id() < last; i += 32) {
    const uint32_t e = i < last ? p.experts[i] : ~0u;
    const int expert = e < unsigned(n) ? int(e) : -1;
    const unsigned same = same_expert(expert);
    int row = -1;
    if (expert >= 0) row = mine[expert] + __popc(same & ((1u << lane_id()) - 1));
    __syncwarp();
    if (expert >= 0 && lane_id() == __ffs(same) - 1) mine[expert] += __popc(same);
    __syncwarp();
    if (i < last) {
      if (row >= 0) row_pair[row] = int32_t(i);
      if (final && row >= 0) p.row_token[row] = int32_t(i / p.top_k);
      if (final || row < 0) p.token_rows[i] = row;
    }
  }
  if (final) {
    const int64_t step = int64_t(gridDim.x) * blockDim.x;
    for (int64_t r = total + blockIdx.x * int64_t(blockDim.x) + threadIdx.x; r < p.n_rows;
         r += step) {
      p.row_token[r] = -1;
      p.row_pair[r] = -1;
    }
  }
}

constexpr int kFewPairs = 32, kFewThreads = 128;

// The same for so few pairs that every warp sees all, a lane each.
__global__ void __launch_bounds__(kFewThreads)
    place_few_kernel(const PlanParams p, int32_t* offsets, int32_t* row_pair) {
  wait_for_previous();
  let_next_begin();
  const int n = int(p.n_experts), n_pairs = int(p.n_tokens * p.top_k), lane = lane_id();
  const uint32_t found = lane < n_pairs ? p.experts[lane] : ~0u;
  const int expert = found < unsigned(n) ? int(found) : INT32_MAX;
  for (int first = threadIdx.x - lane; first <= n; first += kFewThreads) {
    const int e = first + lane;
    int before = 0, count = 0;
#pragma unroll 8
    for (int i = 0; i < n_pairs; ++i) {
      const int other = __shfl_sync(kFullWarp, expert, i);
      before += other < e;
      count += other == e;
    }
    if (e <= n) offsets[e] = before;
    if (e < n) p.counts[e] = count;
  }
  if (warp_id() != 0) return;
  int row = 0;
#pragma unroll 8
  for (int i = 0; i < n_pairs; ++i) {
    const int other = __shfl_sync(kFullWarp, expert, i);
    row += other < expert || (other == expert && i < lane);
  }
  if (lane >= n_pairs) return;
  const bool valid = expert < n, final = p.capacity < 0;  // pairs without expert come last
  row_pair[row] = valid ? lane : -1;
  if (final) p.row_token[row] = valid ? lane / int(p.top_k) : -1;
  if (final || !valid) p.token_rows[lane] = valid ? row : -1;
}

// One block an expert keeps its best pairs of the dropless plan (offsets, pairs).
__global__ void __launch_bounds__(kKeepThreads, 1)
    keep_kernel(const PlanParams p, const int32_t* offsets, const int32_t* pairs) {
  __shared__ int bins[kSelectBins];
  __shared__ int rows_before, rows_total;
  const int expert = blockIdx.x, n_experts = int(p.n_experts), k = int(p.top_k);
  if (threadIdx.x == 0) rows_before = rows_total = 0;
  __syncthreads();
  int before = 0, all = 0;
  for (int e = threadIdx.x; e < n_experts; e += blockDim.x) {
    const int kept = int(min(int64_t(offsets[e + 1] - offsets[e]), p.capacity));
    all += kept;
    before += e < expert ? kept : 0;
  }
  if (all) atomicAdd(&rows_total, all);
  if (before) atomicAdd(&rows_before, before);
  __syncthreads();
  const int first_row = rows_before;
  const int* mine = pairs + offsets[expert];
  const int count = offsets[expert + 1] - offsets[expert];
  const int kept = int(min(int64_t(count), p.capacity));
  if (threadIdx.x == 0) {
    p.offsets[expert] = first_row;
    if (expert == n_experts - 1) p.offsets[n_experts] = rows_total;
  }
  const float* weights = p.weights;
  const auto key = [=](int i) {
    const int pair = mine[i];
    // NaN counts as -infinity
    return weights ? order_key(fmaxf(weights[pair], -kInfinity)) : uint32_t(k - pair % k);
  };
  const Selection selection = select_largest(key, count, kept, bins);
  for_each_selected(
      key, count, selection,
      [=](int i, int rank, uint32_t) {
        const int pair = mine[i], row = first_row + rank;
        p.row_pair[row] = pair;
        p.row_token[row] = pair / k;
        p.token_rows[pair] = row;
      },
      [=](int i) { p.token_rows[mine[i]] = -1; });
  for (int64_t r = rows_total + int64_t(blockIdx.x) * blockDim.x + threadIdx.x; r < p.n_rows;
       r += int64_t(gridDim.x) * blockDim.x) {
    p.row_token[r] = -1;
    p.row_pair[r] = -1;
  }
}

// One block an expert: rows as they are, tokens counted.
__global__ void count_tokens_kernel(const TokenPlanParams p) {
  __shared__ int valid;
  if (threadIdx.x == 0) valid = 0;
  __syncthreads();
  const int64_t first = blockIdx.x * p.per_expert;
  int mine = 0;
  for (int64_t row = first + threadIdx.x; row < first + p.per_expert; row += blockDim.x) {
    const uint32_t token = p.tokens[row];
    const bool used = token < uint64_t(p.n_tokens);
    p.row_token[row] = used ? int32_t(token) : -1;
    p.row_pair[row] = used ? int32_t(row) : -1;
    if (used) atomicAdd(&p.workspace[token], 1);
    mine += used;
  }
  if (mine) atomicAdd(&valid, mine);
  __syncthreads();
  if (threadIdx.x == 0) {
    p.counts[blockIdx.x] = valid;
    p.offsets[blockIdx.x] = int32_t(first);
    if (blockIdx.x == gridDim.x - 1) p.offsets[gridDim.x] = int32_t(first + p.per_expert);
  }
}

// One block: token_offsets from the counts, which become each token's next place.
__global__ void __launch_bounds__(1024) scan_tokens_kernel(const TokenPlanParams p) {
  __shared__ int of_warp[32];
  int carry = 0;
  for (int64_t first = 0; first < p.n_tokens; first += 1024) {
    const int64_t t = first + threadIdx.x;
    const int value = t < p.n_tokens ? p.workspace[t] : 0;
    const int upto = warp_scan(value);
    if (lane_id() == 31) of_warp[warp_id()] = upto;
    __syncthreads();
    int before = carry;
    for (int w = 0; w < 32; ++w) {
      if (w < warp_id()) before += of_warp[w];
      carry += of_warp[w];
    }
    if (t < p.n_tokens) {
      p.token_offsets[t] = before + upto - value;
      p.workspace[t] = before + upto - value;
    }
    __syncthreads();
  }
  if (threadIdx.x == 0) p.token_offsets[p.n_tokens] = carry;
}

__global__ void place_tokens_kernel(const TokenPlanParams p, int64_t n_rows) {
  const int64_t row = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
  if (row >= n_rows) return;
  const int32_t token = p.row_token[row];
  if (token >= 0) p.token_rows[atomicAdd(&p.workspace[token], 1)] = int32_t(row);
  if (row >= p.token_offsets[p.n_tokens]) p.token_rows[row] = -1;
}

// A thread puts its token's rows, which came in any order, into ascending order.
__global__ void sort_rows_kernel(const TokenPlanParams p) {
  const int64_t t = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
  if (t >= p.n_tokens) return;
  const int first = p.token_offsets[t], last = p.token_offsets[t + 1];
  for (int i = first + 1; i < last; ++i) {
    const int32_t row = p.token_rows[i];
    int j = i;
    for (; j > first && p.token_rows[j - 1] > row; --j) p.token_rows[j] = p.token_rows[j - 1];
    p.token_rows[j] = row;
  }
}

}  // namespace

int plan_cuda(const PlanParams& p, void* stream_) {
  const cudaStream_t stream = cudaStream_t(stream_);
  const int64_t n_pairs = p.n_tokens * p.top_k;
  const int threads = threads_for(p.n_experts, n_pairs);
  const int64_t wanted = ceil_div(n_pairs, int64_t(threads) * kPairsPerThread);
  const int64_t blocks = std::max<int64_t>(1, std::min<int64_t>(kMaxBlocks, wanted));
  const int64_t per_block = std::max<int64_t>(1, ceil_div(n_pairs, blocks * threads)) * threads;
  int32_t* offsets = p.offsets;
  int32_t* row_pair = p.row_pair;
  if (p.capacity >= 0) {
    offsets = static_cast<int32_t*>(p.workspace) + kPlanBlocks * p.n_experts;
    row_pair = offsets + p.n_experts + 1;
  }
  if (blocks > 1) {
    count_kernel<<<unsigned(blocks), threads, p.n_experts * sizeof(int), stream>>>(p, per_block);
  }
  const size_t bytes = (2 + threads / 32) * p.n_experts * sizeof(int);
  const int error =
      n_pairs <= kFewPairs
          ? launch_early(place_few_kernel, 1, kFewThreads, 0, stream, p, offsets, row_pair)
          : launch_early(place_kernel, unsigned(blocks), threads, bytes, stream, p, int(blocks),
                         per_block, offsets, row_pair);
  if (error) return error;
  if (p.capacity >= 0) {
    keep_kernel<<<unsigned(p.n_experts), kKeepThreads, 0, stream>>>(p, offsets, row_pair);
  }
  return int(cudaGetLastError());
}

int plan_from_tokens_cuda(const TokenPlanParams& p, void* stream_) {
  const cudaStream_t stream = cudaStream_t(stream_);
  const int64_t n_rows = p.n_experts * p.per_expert;
  if (p.n_tokens > 0) {
    const cudaError_t cleared =
        cudaMemsetAsync(p.workspace, 0, p.n_tokens * sizeof(int32_t), stream);
    if (cleared != cudaSuccess) return int(cleared);
  }
  count_tokens_kernel<<<unsigned(p.n_experts), 1024, 0, stream>>>(p);
  scan_tokens_kernel<<<1, 1024, 0, stream>>>(p);
  if (n_rows > 0) {
    place_tokens_kernel<<<unsigned(ceil_div(n_rows, 256)), 256, 0, stream>>>(p, n_rows);
  }
  if (p.n_tokens > 0) {
    sort_rows_kernel<<<unsigned(ceil_div(p.n_tokens, 128)), 128, 0, stream>>>(p);
  }
  return int(cudaGetLastError());
}

}  // namespace sparsemoe
