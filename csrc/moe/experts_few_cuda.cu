// The experts for few rows, as when a model writes text: the weights are read once, at the speed of
// the memory. A warp makes an element of the result from two vectors.
#include <initializer_list>

#include "moe/activation.cuh"
#include "moe/experts_rows.cuh"
#include "moe/rows.cuh"

namespace sparsemoe {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;

// Lets the next kernel begin, if it was launched to overlap with this one.
__device__ inline void let_next_begin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
// Waits until the kernel before has ended.
__device__ inline void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

template <class T, int N>
__device__ float inner_product(const Pack<T, N>& a, const Pack<T, N>& b) {
  float x[N], y[N], sum = 0;
  a.unpack(x), b.unpack(y);
#pragma unroll
  for (int i = 0; i < N; ++i) sum = fmaf(x[i], y[i], sum);
  return sum;
}

// The expert of each lane's row, of the first `count` lanes; -1 where it has none.
__device__ inline int64_t expert_of_lane(const ExpertRows& experts, int row, int count) {
  constexpr int kAtOnce = 4;
  int64_t expert = -1;  // the last that begins at or before the row
  for (int64_t first = 0; first <= experts.n_experts; first += kAtOnce * 32) {
    int begin[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int64_t e = first + i * 32 + lane_id();
      begin[i] = e <= experts.n_experts ? expert_begin(experts, e) : INT32_MAX;
    }
    for (int lane = 0; lane < count; ++lane) {
      const int r = __shfl_sync(kFullWarp, row, lane);
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int begun = __popc(__ballot_sync(kFullWarp, begin[i] <= r));
        if (lane_id() == lane) expert += begun;
      }
    }
  }
  return expert < experts.n_experts ? expert : -1;
}

// Element blockIdx.y * kWarps + warp of row blockIdx.x.
template <class T, int N, bool kGated>
__global__ void __launch_bounds__(kThreads, 3)
    rows_product_few_kernel(const RowsProductParams p, int64_t width) {
  using P = Pack<T, N>;
  constexpr int kAhead = 4;  // packs of each operand whose loads are in flight
  let_next_begin();
  const int r = blockIdx.x;
  const int64_t column = blockIdx.y * int64_t(kWarps) + warp_id();
  const int64_t expert = __shfl_sync(kFullWarp, expert_of_lane(p.experts, r, 1), 0);
  if (expert < 0 || column >= width) return;
  const T* row = row_or_null<T>(p.a, r);
  const T* gate_from =
      static_cast<const T*>(p.b.data) + expert * p.b.expert_stride + column * p.b.stride;
  const T* up_from = gate_from + width * p.b.stride;
  float gate = 0, up = 0;
  for (int64_t first = lane_id() * N; row && first < p.k; first += kAhead * 32 * N) {
    P gates[kAhead], ups[kAhead], x[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int64_t c = first + i * 32 * N;
      gates[i] = ups[i] = x[i] = P{};
      if (c < p.k) {
        gates[i] = load(reinterpret_cast<const P*>(gate_from + c));
        if (kGated) ups[i] = load(reinterpret_cast<const P*>(up_from + c));
        x[i] = load(reinterpret_cast<const P*>(row + c));
      }
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      gate += inner_product(gates[i], x[i]);
      if (kGated) up += inner_product(ups[i], x[i]);
    }
  }
  gate = warp_sum(gate);
  if (kGated) up = warp_sum(up);
  if (lane_id() != 0) return;
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

// Element blockIdx.y * kWarps + warp of token blockIdx.x, whose rows are few: lane l knows entry l.
template <class T, int N>
__global__ void __launch_bounds__(kThreads, 2) token_sums_few_kernel(const TokenSumsParams p) {
  using P = Pack<T, N>;
  constexpr int kAhead = 8;
  const int64_t token = blockIdx.x, column = blockIdx.y * int64_t(kWarps) + warp_id();
  const Entries entries = column < p.n ? entries_of(p.map, token) : Entries{0, 0};
  int lane_row = -1;
  float lane_weight = 1;
  if (lane_id() < entries.count) {
    const int64_t entry = entries.first + lane_id();
    lane_row = row_of(p.map, entry);
    if (p.weights && lane_row >= 0) {
      const int64_t pair = pair_of(p.map, entry, lane_row);
      lane_weight = pair < 0 ? 0.0f : p.weights[pair];
    }
  }
  const int64_t lane_expert = expert_of_lane(p.experts, lane_row, entries.count);
  float sum = 0;
  if (p.bias && lane_expert >= 0) {
    sum = lane_weight * to_float(static_cast<const T*>(p.bias)[lane_expert * p.n + column]);
  }
  bool waited = false;  // for the rows: all else was there before the last kernel
  int entry = 0;
  int64_t begin = 0;  // of the warp's packs
  while (entry < entries.count) {
    P weights[kAhead];
    const T* from[kAhead];
    float scale[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int64_t expert = __shfl_sync(kFullWarp, lane_expert, entry % 32);
      const int row = __shfl_sync(kFullWarp, lane_row, entry % 32);
      scale[i] = __shfl_sync(kFullWarp, lane_weight, entry % 32);
      const int64_t c = begin + lane_id() * N;
      from[i] = nullptr;
      if (entry < entries.count && expert >= 0 && c < p.k) {
        const T* b =
            static_cast<const T*>(p.b.data) + expert * p.b.expert_stride + column * p.b.stride;
        weights[i] = load(reinterpret_cast<const P*>(b + c));
        from[i] = static_cast<const T*>(p.rows) + row * p.k + c;
      }
      begin += 32 * N;
      if (begin >= p.k) begin = 0, ++entry;
    }
    if (!waited) wait_for_previous();
    waited = true;
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (!from[i]) continue;
      // Not load(): the last kernel has written it while this one ran.
      const P row = *reinterpret_cast<const P*>(from[i]);
      sum += scale[i] * inner_product(weights[i], row);
    }
  }
  if (!waited) wait_for_previous();  // so that this kernel does not end before it
  sum = warp_sum(sum);
  if (lane_id() == 0 && column < p.n) {
    static_cast<T*>(p.y)[token * p.n + column] = from_float<T>(sum);
  }
}

template <class T>
constexpr int kWide = 16 / sizeof(T);  // elements of a pack, where everything is made of them
bool wide(std::initializer_list<int64_t> sizes, std::initializer_list<const void*> data,
          int64_t n) {
  return std::all_of(sizes.begin(), sizes.end(), [&](int64_t size) { return size % n == 0; }) &&
         std::all_of(data.begin(), data.end(),
                     [](const void* at) { return uintptr_t(at) % 16 == 0; });
}

// Calls f with the element type and the elements of a pack.
template <class F>
int with_packs(DType dtype, std::initializer_list<int64_t> sizes,
               std::initializer_list<const void*> data, F f) {
  return with_cuda_dtype(dtype, [&](auto* type) {
    constexpr int kPack = kWide<std::remove_pointer_t<decltype(type)>>;
    return wide(sizes, data, kPack) ? f(type, LaneWidth<kPack>()) : f(type, LaneWidth<1>());
  });
}

dim3 grid_of(int64_t rows, int64_t width) {
  return dim3(unsigned(rows), unsigned(ceil_div(width, kWarps)));
}

// Launches a kernel that calls wait_for_previous(), before the last one ends where both can.
template <class Kernel, class Params>
int launch_early(Kernel* kernel, dim3 grid, void* stream, const Params& params) {
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid, config.blockDim = kThreads;
  config.stream = cudaStream_t(stream);
  config.attrs = &attribute, config.numAttrs = runs_sm_90a() ? 1 : 0;
  return int(cudaLaunchKernelEx(&config, kernel, params));
}

}  // namespace

int rows_product_few(const RowsProductParams& p, void* stream) {
  const int64_t width = p.n / columns_per_hidden(p.activation);
  const dim3 grid = grid_of(p.experts.n_rows, width);
  return with_packs(p.dtype, {p.k, p.a.stride, p.b.stride, p.b.expert_stride}, {p.a.data, p.b.data},
                    [&](auto* type, auto n) {
                      using T = std::remove_pointer_t<decltype(type)>;
                      constexpr int N = decltype(n)::value;
                      const auto kernel = width == p.n ? rows_product_few_kernel<T, N, false>
                                                       : rows_product_few_kernel<T, N, true>;
                      kernel<<<grid, kThreads, 0, cudaStream_t(stream)>>>(p, width);
                      return int(cudaGetLastError());
                    });
}

int token_sums_few_cuda(const TokenSumsParams& p, void* stream) {
  const dim3 grid = grid_of(p.map.n_tokens, p.n);
  return with_packs(
      p.dtype, {p.k, p.b.stride, p.b.expert_stride}, {p.rows, p.b.data}, [&](auto* type, auto n) {
        using T = std::remove_pointer_t<decltype(type)>;
        return launch_early(token_sums_few_kernel<T, decltype(n)::value>, grid, stream, p);
      });
}

}  // namespace sparsemoe
