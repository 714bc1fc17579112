// The experts for few rows, as when a model writes text: the weights are read once, at the speed of
// the memory. They pass through shared memory, where many are on their way at any time; those of
// the second product set out while the first still runs.
#include <initializer_list>

#include "common/early.cuh"
#include "common/ptx.cuh"
#include "moe/activation.cuh"
#include "moe/experts_rows.cuh"
#include "moe/rows.cuh"

namespace sparsemoe {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kBlocks = 2;   // of each product that a multiprocessor of Hopper has room for at once
constexpr int kColumns = 8;  // of the result, that a block makes at once; its warps share the sums

// 16 bytes of a vector.
template <class T>
constexpr int kPack = 16 / sizeof(T);
template <class T>
using PackOf = Pack<T, kPack<T>>;

// What a warp takes at once: pieces of kSpan elements of two vectors for each column, and of the
// two that these are multiplied with. Lane l holds pack l % 4 of column l / 4.
template <class T>
constexpr int kSpan = 4 * kPack<T>;
template <class T>
struct Step {
  PackOf<T> weights[2][32];
  PackOf<T> x[2 * 4];
};

// Sends elements at .. at + kPack - 1 of a vector, zero from n on, to shared memory. With kWhole,
// everything is made of such packs and lies on their boundaries.
template <class T, bool kWhole>
__device__ void send(PackOf<T>* to, const T* vector, int at, int n) {
  if constexpr (kWhole) {
    copy_async(shared_address(to), at < n ? vector + at : vector, at >= n);
  } else {
    PackOf<T> pack{};
#pragma unroll
    for (int i = 0; i < kPack<T>; ++i) {
      if (at + i < n) reinterpret_cast<T*>(&pack)[i] = LoadThroughL2()(vector + at + i);
    }
    *to = pack;
  }
}

// Waits until all that this warp has sent is there, but for the last kPending times that it called
// copy_async_commit(): it does so for every step, also where nothing is left to send.
template <int kPending>
__device__ void wait_for_steps() {
  copy_async_wait<kPending>();
  __syncwarp();
}

// For each column, the inner products of its two vectors with x[0..3] and x[4..7].
template <class T>
class Sums {
 public:
  __device__ void add(const Step<T>& step) {
    const PackOf<T> a = step.weights[0][lane_id()], b = step.weights[1][lane_id()];
    PackOf<T> x{};  // columns 0 and 1 of the right factor; the rest is zero
    if (lane_id() < 8) x = step.x[lane_id()];
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      const uint32_t left[4] = {a.word[i], b.word[i], a.word[i + 1], b.word[i + 1]};
      multiply_add(sum_, left, x.word[i], x.word[i + 1], T());
    }
  }
  // Of column lane / 4, in every fourth lane.
  __device__ float first() const { return sum_[0]; }
  __device__ float second() const { return sum_[3]; }

 private:
  float sum_[4] = {};
};

template <>
class Sums<float> {
 public:
  __device__ void add(const Step<float>& step) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float a[4], x[4];
      step.weights[i][lane_id()].unpack(a);
      step.x[4 * i + lane_id() % 4].unpack(x);
#pragma unroll
      for (int j = 0; j < 4; ++j) sum_[i] = fmaf(a[j], x[j], sum_[i]);
    }
  }
  __device__ float first() const { return of_four(sum_[0]); }
  __device__ float second() const { return of_four(sum_[1]); }

 private:
  __device__ static float of_four(float v) {
    v += __shfl_xor_sync(kFullWarp, v, 1);
    return v + __shfl_xor_sync(kFullWarp, v, 2);
  }
  float sum_[2] = {};
};

// The expert of each lane's row, of the first `count` lanes; -1 where it has none.
template <class Load>
__device__ int expert_of_lane(const ExpertRows& experts, int row, int count, Load load) {
  constexpr int kAtOnce = 8;
  int expert = -1;  // the last that begins at or before the row
  for (int first = 0; first <= experts.n_experts; first += kAtOnce * 32) {
    int begin[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int e = first + i * 32 + lane_id();
      // no branch, in which each load would be waited for
      begin[i] = load(experts.offsets + min(int64_t(e), experts.n_experts));
      if (e > experts.n_experts) begin[i] = INT32_MAX;
    }
    for (int lane = 0; lane < count; ++lane) {
      const int r = __shfl_sync(kFullWarp, row, lane);
      int begun = 0;
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) begun += __popc(__ballot_sync(kFullWarp, begin[i] <= r));
      if (lane_id() == lane) expert += begun;
    }
  }
  return row >= 0 && expert < experts.n_experts ? expert : -1;
}

// --- the first product ---

constexpr int kProductSteps = 3;  // of a warp, in shared memory

// Columns of the result that a block makes: gate and up of kColumns, or as many without gate.
// Either way a sum has the same order, so that what is made again has the same bits.
template <bool kGated>
constexpr int kMade = kGated ? kColumns : 2 * kColumns;

// Block (r, c) makes those of row r from column c kMade on.
template <class T, bool kWhole, bool kGated>
__global__ void __launch_bounds__(kThreads, 2 * kBlocks)
    rows_product_few_kernel(const RowsProductParams p) {
  constexpr int kStep = kSpan<T>;
  extern __shared__ uint4 shared[];
  __shared__ float of_warp[kWarps][2 * kColumns];
  Step<T>* steps = reinterpret_cast<Step<T>*>(shared) + warp_id() * kProductSteps;
  const int r = blockIdx.x, lane = lane_id();
  const int64_t width = kGated ? p.n / 2 : p.n;
  const int64_t first_column = blockIdx.y * int64_t(kMade<kGated>);
  wait_for_previous();
  let_next_begin();
  const int64_t at_row = p.a.index ? p.a.index[r] : r;
  const int expert = __shfl_sync(kFullWarp, expert_of_lane(p.experts, r, 1, PlainLoad()), 0);
  if (expert < 0) return;
  const T* row = static_cast<const T*>(p.a.data) + at_row * p.a.stride;
  const int k = uint64_t(at_row) < uint64_t(p.a.n) ? int(p.k) : 0;  // else a row of zeros
  const int64_t column_1 = first_column + lane / 4;
  const int64_t column_2 = column_1 + (kGated ? width : kColumns);
  const int k_1 = column_1 < width ? k : 0, k_2 = kGated || column_2 < width ? k_1 : 0;
  const T* matrix = static_cast<const T*>(p.b.data) + expert * p.b.expert_stride;
  const T* weights_1 = matrix + column_1 * p.b.stride;
  const T* weights_2 = matrix + column_2 * p.b.stride;

  int sent = warp_id() * kStep;
  const auto send_step = [&](Step<T>& step) {
    const int at = sent + lane % 4 * kPack<T>;
    if (sent < k) {
      send<T, kWhole>(&step.weights[0][lane], weights_1, at, k_1);
      send<T, kWhole>(&step.weights[1][lane], weights_2, at, k_2);
      if (lane < 8) send<T, kWhole>(&step.x[lane], row, at, k);
    }
    copy_async_commit();
    sent += kWarps * kStep;
  };
#pragma unroll
  for (int i = 0; i < kProductSteps; ++i) send_step(steps[i]);
  Sums<T> sums;
  int taken = 0;
  for (int at = warp_id() * kStep; at < k; at += kWarps * kStep) {
    wait_for_steps<kProductSteps - 1>();
    sums.add(steps[taken]);
    __syncwarp();
    send_step(steps[taken]);
    taken = taken + 1 < kProductSteps ? taken + 1 : 0;
  }
  const float of_first = sums.first(), of_second = sums.second();
  if (lane % 4 == 0) {
    of_warp[warp_id()][lane / 4] = of_first;
    of_warp[warp_id()][kColumns + lane / 4] = of_second;
  }
  __syncthreads();
  const int64_t column = first_column + threadIdx.x;
  if (threadIdx.x >= kMade<kGated> || column >= width) return;
  float gate = 0, up = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    gate += of_warp[w][threadIdx.x];
    if (kGated) up += of_warp[w][kColumns + threadIdx.x];
  }
  if (p.bias) {
    const T* bias = static_cast<const T*>(p.bias) + expert * p.bias_stride + column;
    gate += to_float(bias[0]);
    if (kGated) up += to_float(bias[width]);
  }
  if (p.pre) {
    T* pre = static_cast<T*>(p.pre) + r * p.n + column;
    pre[0] = from_float<T>(gate);
    if (kGated) pre[width] = from_float<T>(up);
  }
  with_activation(p.activation, [&](auto a) {
    const float value = act_value<decltype(a)::value>(gate);
    static_cast<T*>(p.out)[r * p.out_stride + column] = from_float<T>(kGated ? value * up : value);
  });
}

// --- the second product ---

constexpr int kSumSteps = 9;  // of a warp, in shared memory
constexpr int kAtFirst = 3;   // on their way at once while the first product runs, to let it pass

// A warp's share of the steps that make a token's columns: through k of one of its entries, then of
// the next. Lane l knows entry l.
template <class T>
struct Share {
  static constexpr int kStep = 2 * kSpan<T>;
  int k, lane_row, lane_expert;
  int first_entry, first_at, n_steps;

  __device__ void find(int n_entries) {
    const int of_entry = max((k + kStep - 1) / kStep, 1), all = n_entries * of_entry;
    const int first = all * warp_id() / kWarps;
    n_steps = all * (warp_id() + 1) / kWarps - first;
    first_entry = first / of_entry, first_at = first % of_entry * kStep;
  }
};

// The steps of a warp, one after the other, for these columns and then for the next.
template <class T>
class Walk {
 public:
  __device__ Walk(const TokenSumsParams& p, const Share<T>& share, int64_t column)
      : column_(column), step_(0), entry_(share.first_entry), at_(share.first_at) {
    find_entry(p, share);
  }
  __device__ bool past(const TokenSumsParams& p) const { return column_ >= p.n; }
  __device__ void advance(const TokenSumsParams& p, const Share<T>& share) {
    at_ += Share<T>::kStep;
    if (++step_ >= share.n_steps) {
      *this = Walk(p, share, column_ + gridDim.y * kColumns);
    } else if (at_ >= share.k) {
      at_ = 0, ++entry_;
      find_entry(p, share);
    }
  }
  template <bool kWhole>
  __device__ void send_weights(Step<T>& step) const {
    const int lane = lane_id(), at = at_ + lane % 4 * kPack<T>;
    send<T, kWhole>(&step.weights[0][lane], weights_, at, weights_k_);
    send<T, kWhole>(&step.weights[1][lane], weights_, at + kSpan<T>, weights_k_);
  }
  template <bool kWhole>
  __device__ void send_x(Step<T>& step) const {
    const int lane = lane_id();
    if (lane < 8) send<T, kWhole>(&step.x[lane], row_, at_ + lane * kPack<T>, row_k_);
  }

 private:
  __device__ void find_entry(const TokenSumsParams& p, const Share<T>& share) {
    const int64_t expert = __shfl_sync(kFullWarp, share.lane_expert, entry_);
    const int64_t row = __shfl_sync(kFullWarp, share.lane_row, entry_);
    const int64_t column = column_ + lane_id() / 4;
    row_k_ = step_ < share.n_steps && expert >= 0 ? share.k : 0;
    weights_k_ = column < p.n ? row_k_ : 0;
    weights_ = static_cast<const T*>(p.b.data) + expert * p.b.expert_stride + column * p.b.stride;
    row_ = static_cast<const T*>(p.rows) + row * p.k;
  }

  int64_t column_;
  int step_, entry_, at_;
  int weights_k_, row_k_;  // elements of each vector, or 0: zeros instead
  const T *weights_, *row_;
};

// The blocks (t, ..) make token t, whose rows are few.
template <class T, bool kWhole>
__global__ void __launch_bounds__(kThreads, 2 * kBlocks)
    token_sums_few_kernel(const TokenSumsParams p) {
  extern __shared__ uint4 shared[];
  __shared__ float of_warp[2][kWarps][kColumns];
  Step<T>* steps = reinterpret_cast<Step<T>*>(shared) + warp_id() * kSumSteps;
  const int64_t token = blockIdx.x;
  const int lane = lane_id();
  const LoadThroughL2 load;
  const Entries entries = entries_of(p.map, token, load);
  Share<T> share{int(p.k), -1};
  float lane_weight = 1;
  if (lane < entries.count) {
    const int64_t entry = entries.first + lane;
    share.lane_row = row_of(p.map, entry, load);
    if (p.weights && share.lane_row >= 0) {
      const int64_t pair = pair_of(p.map, entry, share.lane_row, load);
      lane_weight = pair < 0 ? 0.0f : load(p.weights + pair);
    }
  }
  share.lane_expert = expert_of_lane(p.experts, share.lane_row, entries.count, load);
  if (share.lane_expert < 0) lane_weight = 0;
  share.find(entries.count);

  const int64_t first_column = blockIdx.y * int64_t(kColumns);
  const Walk<T> start(p, share, first_column);
  Walk<T> sent = start;
#pragma unroll 1
  for (int i = 0; i < kSumSteps && !sent.past(p); ++i, sent.advance(p, share)) {
    sent.template send_weights<kWhole>(steps[i]);
    copy_async_commit();
    copy_async_wait<kAtFirst>();
  }
  wait_for_previous();  // for the rows: all else was there before that kernel began
  let_next_begin();
  sent = start;
#pragma unroll 1
  for (int i = 0; i < kSumSteps; ++i) {
    if (!sent.past(p)) {
      sent.template send_x<kWhole>(steps[i]);
      sent.advance(p, share);
    }
    copy_async_commit();
  }

  int taken = 0, buffer = 0;
  for (int64_t first = first_column; first < p.n; first += gridDim.y * kColumns) {
    float sum = 0;
    if (p.bias) {  // warp w adds those of entries 4 w .. 4 w + 3
      const int entry = 4 * warp_id() + lane % 4;
      const int64_t expert = __shfl_sync(kFullWarp, share.lane_expert, entry);
      const int64_t column = first + lane / 4;
      if (expert >= 0 && column < p.n) {
        sum = to_float(static_cast<const T*>(p.bias)[expert * p.n + column]);
      }
      sum *= __shfl_sync(kFullWarp, lane_weight, entry);
      sum += __shfl_xor_sync(kFullWarp, sum, 1);
      sum += __shfl_xor_sync(kFullWarp, sum, 2);
    }
    Sums<T> sums;
    int entry = share.first_entry, at = share.first_at;
    for (int i = 0; i < share.n_steps; ++i) {
      wait_for_steps<kSumSteps - 1>();
      sums.add(steps[taken]);
      if (!sent.past(p)) {
        __syncwarp();
        sent.template send_weights<kWhole>(steps[taken]);
        sent.template send_x<kWhole>(steps[taken]);
        sent.advance(p, share);
      }
      copy_async_commit();
      taken = taken + 1 < kSumSteps ? taken + 1 : 0;
      at += Share<T>::kStep;
      if (at >= share.k || i + 1 == share.n_steps) {
        sum += __shfl_sync(kFullWarp, lane_weight, entry) * (sums.first() + sums.second());
        sums = Sums<T>();
        at = 0, ++entry;
      }
    }
    buffer = 1 - buffer;
    if (lane % 4 == 0) of_warp[buffer][warp_id()][lane / 4] = sum;
    __syncthreads();
    const int64_t column = first + threadIdx.x;
    if (threadIdx.x >= kColumns || column >= p.n) continue;
    float total = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) total += of_warp[buffer][w][threadIdx.x];
    static_cast<T*>(p.y)[token * p.n + column] = from_float<T>(total);
  }
}

// --- launches ---

template <class T>
bool whole_packs(std::initializer_list<int64_t> sizes, std::initializer_list<const void*> data) {
  return std::all_of(sizes.begin(), sizes.end(),
                     [](int64_t size) { return size % kPack<T> == 0; }) &&
         std::all_of(data.begin(), data.end(),
                     [](const void* at) { return uintptr_t(at) % 16 == 0; });
}

template <class Params>
int launch_few(void (*kernel)(Params), int64_t shared_bytes, dim3 grid, void* stream,
               const Params& p) {
  // The most memory is shared that can be, so that both products have room on a multiprocessor.
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                           cudaSharedmemCarveoutMaxShared);
  if (error != cudaSuccess) return int(error);
  error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes));
  if (error != cudaSuccess) return int(error);
  return launch_early(kernel, grid, kThreads, size_t(shared_bytes), stream, p);
}

}  // namespace

int rows_product_few(const RowsProductParams& p, void* stream) {
  const int64_t width = p.n / columns_per_hidden(p.activation);
  return with_cuda_dtype(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto launch = [&](auto whole, auto gated) {
      constexpr bool kWhole = decltype(whole)::value, kGated = decltype(gated)::value;
      const dim3 grid(unsigned(p.experts.n_rows), unsigned(ceil_div(width, kMade<kGated>)));
      return launch_few(rows_product_few_kernel<T, kWhole, kGated>,
                        kWarps * kProductSteps * sizeof(Step<T>), grid, stream, p);
    };
    const std::true_type yes;
    const std::false_type no;
    const bool gated = width != p.n;
    if (whole_packs<T>({p.k, p.a.stride, p.b.stride, p.b.expert_stride}, {p.a.data, p.b.data})) {
      return gated ? launch(yes, yes) : launch(yes, no);
    }
    return gated ? launch(no, yes) : launch(no, no);
  });
}

int token_sums_few_cuda(const TokenSumsParams& p, void* stream) {
  // As many blocks for each token as run at once and have columns to make.
  const int64_t at_once =
      std::max<int64_t>(1, kBlocks * int64_t(multiprocessors()) / p.map.n_tokens);
  const dim3 grid(unsigned(p.map.n_tokens),
                  unsigned(std::min(at_once, ceil_div(p.n, int64_t(kColumns)))));
  return with_cuda_dtype(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const bool whole = whole_packs<T>({p.k, p.b.stride, p.b.expert_stride}, {p.rows, p.b.data});
    return launch_few(whole ? token_sums_few_kernel<T, true> : token_sums_few_kernel<T, false>,
                      kWarps * kSumSteps * sizeof(Step<T>), grid, stream, p);
  });
}

}  // namespace sparsemoe
