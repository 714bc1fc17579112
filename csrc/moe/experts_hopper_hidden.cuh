// The way back through the second projection, weighting and activation, on Hopper.
#pragma once

#include "moe/experts_hopper_rows.cuh"

namespace sparsemoe {
namespace hopper {

struct HiddenBackward {
  CUtensorMap b, grad_pre, hidden;
  int32_t* counter;
  const int32_t* offsets;
  int n_experts, n_rows, n_tiles;
  int blocks;
  int k, width;
  Rows from;
  const void* pre;
  Activation activation;
  const float* weights;
  const int32_t* row_pair;
  int64_t n_pairs;
  float* inner;
};
static_assert(kInnerColumns == kTileN);

// Three stages leave each multiplying warp 10 KiB.
using SharedForHidden = Shared<3, 5>;

template <class T>
__device__ inline void floats_of_pair(uint32_t pair, float (&v)[2]) {
  Pack<T, 2> pack;
  pack.word[0] = pair;
  pack.unpack(v);
}

// What a multiplying warp does after the products of a tile: 16 rows, 64 columns at a time. Of two
// pairs of boxes one fills with pre while the other becomes its gradient in place.
template <class T, bool kGated>
class HiddenStore {
 public:
  __device__ HiddenStore(const HiddenBackward& p, uint32_t boxes)
      : p_(p), boxes_(boxes), matrices_(matrices_in_warp_box()) {}

  // `row` is the first of the warp's `rows`. Asks for the first columns, so that they are there
  // after the products.
  __device__ void begin(const Tile& tile, int row, int rows) {
    row_ = row, rows_ = rows, column_ = tile.n * kTileN;
    load(0);
  }

  // `weight`, of this thread's two rows; adds to `inner`.
  template <Activation A>
  __device__ void store(const float (&weight)[2], const float (&sum)[128], float (&inner)[2]) {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const int column = column_ + c * kBoxWidth;
      if (column >= p_.width) break;
      copy_async_wait<0>();
      __syncwarp();
      const uint32_t gate_box = pair(c), up_box = gate_box + kWarpBoxBytes;
      const uint32_t hidden_box = boxes_ + 4 * kWarpBoxBytes;
      uint32_t hidden[4][4];
#pragma unroll
      for (int j = 0; j < 8; j += 2) {
        const uint32_t at = matrices_ ^ (j << 4);
        uint32_t gates[4], ups[4];
        load_matrices<false>(gates, gate_box + at);
        if (kGated) load_matrices<false>(ups, up_box + at);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int h = i % 2;
          const float* d = sum + 32 * c + 4 * (j + i / 2) + 2 * h;
          float gate[2], up[2] = {1, 1}, activated[2];
          floats_of_pair<T>(gates[i], gate);
          if constexpr (kGated) floats_of_pair<T>(ups[i], up);
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            float value, slope;
            act_value_slope<A>(gate[e], value, slope);
            const float weighted = weight[h] * d[e];
            activated[e] = kGated ? value * up[e] : value;
            inner[h] += d[e] * activated[e];
            activated[e] *= weight[h];
            gate[e] = (kGated ? weighted * up[e] : weighted) * slope;
            up[e] = weighted * value;
          }
          gates[i] = pair_of_floats<T>(gate[0], gate[1]);
          if constexpr (kGated) ups[i] = pair_of_floats<T>(up[0], up[1]);
          hidden[j / 2][i] = pair_of_floats<T>(activated[0], activated[1]);
        }
        store_matrices(gate_box + at, gates);
        if (kGated) store_matrices(up_box + at, ups);
        // By now the stores of the last columns have left the other boxes.
        if (j == 2) load(c + 1);
      }
#pragma unroll
      for (int j = 0; j < 8; j += 2) {
        store_matrices(hidden_box + (matrices_ ^ (j << 4)), hidden[j / 2]);
      }
      fence_async_proxy();
      __syncwarp();
      if (lane_id() == 0 && rows_ > 0) {
        tma_store(p_.grad_pre, gate_box, column, 0, 16 - rows_, row_ + rows_);
        if (kGated) tma_store(p_.grad_pre, up_box, column, 1, 16 - rows_, row_ + rows_);
        tma_store(p_.hidden, hidden_box, column, 0, 16 - rows_, row_ + rows_);
        tma_store_commit();
      }
    }
  }

 private:
  __device__ uint32_t pair(int c) const { return boxes_ + c % 2 * 2 * kWarpBoxBytes; }

  // Waits until the stores have read their boxes. Starts copies of columns 64 c on of pre.
  __device__ void load(int c) {
    const int lane = lane_id(), columns = p_.width - column_ - c * kBoxWidth;
    if (lane == 0) tma_store_wait_read<0>();
    __syncwarp();
    if (c < 4 && columns > 0) {
      const int64_t stride = int64_t(p_.width) * (kGated ? 2 : 1);
      const T* pre = static_cast<const T*>(p_.pre);
      const T* from = pre + row_ * stride + column_ + c * kBoxWidth;
#pragma unroll
      for (int i = 0; i < 16; i += 4) {
        const int row = i + lane / 8, chunk = lane % 8;
        const uint32_t to = pair(c) + row * 128 + ((chunk ^ (row & 7)) << 4);
        const bool there = row < rows_ && 8 * chunk < columns;
        const T* at = there ? from + row * stride + 8 * chunk : pre;
        copy_async(to, at, !there);
        if (kGated) copy_async(to + kWarpBoxBytes, at + (there ? p_.width : 0), !there);
      }
    }
    copy_async_commit();
  }

  const HiddenBackward& p_;
  uint32_t boxes_, matrices_;
  int row_, rows_, column_;
};

template <class T, bool kGated>
__global__ void SPARSEMOE_CLUSTER(2) __launch_bounds__(kThreads, 1)
    hidden_backward_kernel(const __grid_constant__ HiddenBackward p) {
#if SPARSEMOE_HOPPER
  using S = SharedForHidden;
  S& s = shared<S>();
  begin<true>(s);
  const int warpgroup = int(threadIdx.x / 128) - 1;
  if (warpgroup < 0) {
    registers_lower_to<kLoadRegisters>();
    load_tiles<T, true, false, false>(s, p);
  } else {
    registers_raise_to<kMultiplyRegisters>();
    RowTiles tiles(p.offsets, p.n_experts, p.n_rows, p.n_tiles);
    const int warp = warp_id() % 4, own_row = lane_id() / 4;
    HiddenStore<T, kGated> store(p, shared_address(s.boxes[warpgroup]) + warp * 5 * kWarpBoxBytes);
    Place<S::kStages> stage;
    PairQueue<S> queue(s, p.counter);
    Tile tile;
    for (int i = queue.first(); tiles.find(i, tile); i = queue.next()) {
      if (tile.n_rows <= warpgroup * 64) {
        skip(s, stage, p.blocks);
        continue;
      }
      const int row = tile.first_row + warpgroup * 64 + warp * 16;
      const int rows = max(min(tile.n_rows - warpgroup * 64 - warp * 16, 16), 0);
      store.begin(tile, row, rows);
      int pair[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int r = min(own_row + 8 * h, max(rows - 1, 0));
        pair[h] = p.weights && rows > 0 ? __ldg(p.row_pair + row + r) : 0;
      }
      float sum[128];
      multiply<T, false, true, true>(s, stage, warpgroup, p.blocks, sum);
      float weight[2], inner[2] = {};
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        weight[h] = 1;
        if (p.weights) {
          weight[h] = uint32_t(pair[h]) < uint64_t(p.n_pairs) ? __ldg(p.weights + pair[h]) : 0.0f;
        }
      }
      with_activation(p.activation, [&](auto a) {
        constexpr Activation A = decltype(a)::value;
        if constexpr (A != Activation::none && sparsemoe::kGated<A> == kGated) {
          store.template store<A>(weight, sum, inner);
        }
      });
      if (p.inner) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int r = own_row + 8 * h;
          inner[h] += __shfl_xor_sync(kFullWarp, inner[h], 1);
          inner[h] += __shfl_xor_sync(kFullWarp, inner[h], 2);
          if (lane_id() % 4 == 0 && r < rows) {
            p.inner[tile.n * int64_t(p.n_rows) + row + r] = inner[h];
          }
        }
      }
    }
    if (lane_id() == 0) tma_store_wait_read<0>();
  }
  cluster_sync();  // the other block may still arrive here, or send
#else
  __trap();
#endif
}

template <class T, bool kGated>
int hidden_backward_launch(const HiddenBackwardParams& params, void* stream) {
  HiddenBackward p{};
  p.counter = params.counter;
  p.offsets = params.experts.offsets;
  p.n_experts = int(params.experts.n_experts), p.n_rows = int(params.experts.n_rows);
  p.n_tiles = int(ceil_div(params.f, kTileN));
  p.k = int(params.h), p.blocks = int(ceil_div(params.h, kTileK));
  p.width = int(params.f);
  p.from = params.grad;
  p.activation = params.activation;
  p.weights = params.weights, p.row_pair = params.row_pair, p.n_pairs = params.n_pairs;
  p.inner = params.inner;
  p.pre = params.pre;
  const int64_t f = params.f, parts = kGated ? 2 : 1;
  const bool made = make_tensor_map(&p.b, params.dtype, params.down, {f, params.h, 1, p.n_experts},
                                    {f, f * params.h, f * params.h}, kTileK) &&
                    make_row_run_map(&p.grad_pre, params.dtype, params.grad_pre, p.n_rows, f, parts,
                                     f * parts, 16) &&
                    make_row_run_map(&p.hidden, params.dtype, params.hidden, p.n_rows, f, 1, f, 16);
  if (!made) return kNotTaken;
  return launch<SharedForHidden>(hidden_backward_kernel<T, kGated>, p,
                                 row_pairs_at_most(params.experts) * p.n_tiles, stream);
}

}  // namespace hopper
}  // namespace sparsemoe
