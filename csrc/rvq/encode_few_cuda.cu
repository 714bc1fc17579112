// Encoding of few vectors by every distance, in float32, on Hopper: a cluster of blocks takes one
// and shares the codes. What counts is how soon one stage follows the other.
#include "common/early.cuh"
#include "common/hopper.cuh"
#include "rvq/encode_hopper.h"
#include "rvq/encode_workspace.h"
#include "rvq/finish.cuh"
#include "rvq/scale.cuh"
#include "rvq/vector.cuh"

namespace sparsemoe {
namespace {

constexpr int kThreads = 256, kBlocks = 8, kWarps = kBlocks * kThreads / 32;  // of a cluster

// The same place in shared memory of the block of that rank.
template <class T>
__device__ inline void store_in(T* place, T value, int rank) {
  asm volatile(
      "{\n .reg .b32 there;\n mapa.shared::cluster.u32 there, %0, %2;\n"
      " st.shared::cluster.b32 [there], %1;\n}" ::"r"(shared_address(place)),
      "r"(reinterpret_cast<const uint32_t&>(value)), "r"(rank)
      : "memory");
}

// Each warp holds the residual and computes the distances of some codes. It asks for the next as
// soon as it is done with one: which they are does not depend on the residual. Warp 0 also finishes
// the vector; all finish those that exact_kernel took.
template <int kPieces, bool kPacked>
__global__ void __launch_bounds__(kThreads, kPieces < 4 ? 2 : 1) SPARSEMOE_CLUSTER(8)
    few_kernel(const ExactParams params) {
#if SPARSEMOE_HOPPER
  constexpr int kAtOnce = kPieces < 8 ? 8 : 4,
                kSame = 32 / kAtOnce;  // lanes that look at the same code
  __shared__ float least[2][kWarps];
  __shared__ int found[2][kWarps];
  const RvqEncodeParams& p = params.p;
  const int width = int(p.width), n_codes = int(p.n_codes), n_stages = int(p.n_stages);
  const int lane = lane_id(), warp = cluster_rank() * (kThreads / 32) + warp_id();
  const bool cosine = p.metric == Metric::cosine;
  cluster_sync();  // all its blocks run, and can be written to
  wait_for_previous();
  if (params.late) let_next_begin();
  const int64_t count = params.late ? params.late[0] : p.n;
  const int64_t cluster = blockIdx.x / kBlocks, clusters = gridDim.x / kBlocks;
  const auto load_code = [&](Columns<kPieces>& to, int stage, int code) {
    const int64_t row = int64_t(stage) * n_codes + code;
    to.template load<kPacked>(static_cast<const float*>(p.codebooks) + row * width, 0, width);
  };
  int turn = 0;
  for (int64_t at = cluster; at < count && count <= kMostFew; at += clusters) {
    const int64_t vector = params.late ? params.late[2 + 2 * at] : at;
    const int from = params.late ? params.late[3 + 2 * at] : 0;
    int32_t* const codes = p.codes + vector * n_stages;
    float* const errors = static_cast<float*>(p.errors) + vector * n_stages;
    Columns<kPieces> residual, e[kAtOnce];
    with_vector_type(p.dtype, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      const T* x = static_cast<const T*>(p.x) + vector * p.x_stride;
      residual.template load<kPacked>(x, 0, width);
    });
    const auto load_next = [&](int i, int stage, int first) {
      load_code(e[i], stage, min(first + i * kWarps, n_codes - 1));
    };
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) load_next(i, from, warp);
    Columns<kPieces> sum;
    sum.clear();
    const auto take = [&](int stage, int code) {
      Columns<kPieces> nearest;
      load_code(nearest, stage, code);
      residual.subtract(nearest);
      if (warp != 0) return;
      sum.add(nearest);
      const float error = warp_sum(residual.sum_of_squares());
      if (lane == 0) errors[stage] = error, codes[stage] = code;
    };
    for (int q = 0; q < from; ++q) take(q, __ldcg(codes + q));
    for (int stage = from; stage < n_stages; ++stage, turn ^= 1) {
      float best = kInfinity;
      int code = 0;
      for (int first = warp; first < n_codes; first += kAtOnce * kWarps) {
        const bool last = first + kAtOnce * kWarps >= n_codes;
        float distances[kAtOnce], norms2[kAtOnce];
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          if (cosine) {
            distances[i] = -residual.product(e[i]);
            norms2[i] = e[i].sum_of_squares();
          } else {
            e[i].subtract(residual);
            distances[i] = e[i].sum_of_squares();
          }
          if (!last) {
            load_next(i, stage, first + kAtOnce * kWarps);
          } else if (stage + 1 < n_stages) {
            load_next(i, stage + 1, warp);
          }
        }
        float distance = warp_sums(distances);
        if (cosine) distance *= inverse_norm(sqrtf(warp_sums(norms2)));
        const int own = first + lane / kSame * kWarps;
        if (own < n_codes && nearer(distance, own, best, code)) best = distance, code = own;
      }
      least_of(best, code, 32);
      if (lane < kBlocks) {
        store_in(&least[turn][warp], best, lane);
        store_in(&found[turn][warp], code, lane);
      }
      cluster_sync();
      best = least[turn][lane], code = found[turn][lane];
      if (nearer(least[turn][32 + lane], found[turn][32 + lane], best, code)) {
        best = least[turn][32 + lane], code = found[turn][32 + lane];
      }
      least_of(best, code, 32);
      if (!(best < kInfinity)) code = 0;
      take(stage, code);
    }
    if (warp != 0) continue;
    with_vector_type(p.dtype, [&](auto* type) {
      sum.template store<kPacked>(static_cast<decltype(type)>(p.quantized) + vector * width, 0,
                                  width);
    });
  }
  if (!params.late || count <= kMostFew) return;
  for (int64_t at = cluster + warp * clusters; at < count; at += kWarps * clusters) {
    with_vector_type(p.dtype, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      finish_vector<T, kPieces, kPacked>(p, params.late[2 + 2 * at]);
    });
  }
#else
  __trap();
#endif
}

}  // namespace

int encode_few(const ExactParams& params, void* stream) {
  const RvqEncodeParams& p = params.p;
  const bool packed = packs_of_4<float>(p.codebooks, p.width, p.width) &&
                      packs_of_4<float>(p.x, p.width, p.x_stride);
  return with_pieces(p.width, [&](auto pieces) {
    constexpr int kPieces = decltype(pieces)::value;
    const auto kernel = packed ? few_kernel<kPieces, true> : few_kernel<kPieces, false>;
    const int64_t room = std::max(multiprocessors() * (kPieces < 4 ? 2 : 1) / kBlocks, 1);
    const dim3 grid(unsigned(std::min(p.n, room) * kBlocks));
    return launch_early(kernel, grid, kThreads, 0, stream, params);
  });
}

}  // namespace sparsemoe
