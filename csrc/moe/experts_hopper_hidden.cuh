// The way back through the second projection, weighting and activation, on Hopper.
#pragma once

#include "moe/experts_hopper_rows.cuh"

namespace sparsemoe {
namespace hopper {

struct HiddenBackward {
  CUtensorMap b, pre, grad_pre, hidden;
  int32_t* counter;
  const int32_t* offsets;
  int n_experts, n_rows, n_tiles;
  int blocks, pre_blocks;  // stages of products, and of pre, of any tile: both blocks count alike
  int k, width;
  Rows from;
  Activation activation;
  const float* weights;
  const int32_t* row_pair;
  int64_t n_pairs;
  float* inner;
};
static_assert(kInnerColumns == kTileN);

// Once the operands of a tile are on their way, its pre follows through the stages of b: 64 columns
// of each part in one, in two boxes of 64 rows. The first of these stages has the rows' weights in
// place of a.
template <bool kGated>
__device__ void load_pre(Shared& s, const HiddenBackward& p, const Tile& tile, Stage& stage) {
  const int own = int(threadIdx.x);  // row of the tile
  const int pair = p.weights && own < tile.n_rows ? __ldg(p.row_pair + tile.first_row + own) : -1;
  const bool has_weight = uint32_t(pair) < uint64_t(p.n_pairs);
  const float* weight = p.weights + (has_weight ? pair : 0);
  for (int c = 0; c < p.pre_blocks; ++c) {
    barrier_wait(&s.empty[stage.index], stage.phase ^ 1);
    uint64_t* full = &s.full[stage.index];
    if (c == 0 && p.weights) {
      copy_async_word(shared_address(s.a[stage.index]) + 4 * own, weight, !has_weight);
    }
    if (warp_id() == 0 && one_lane()) {
      const uint32_t to = shared_address(s.b[stage.index]);
      const int column = tile.n * kTileN + c * kBoxWidth;
      const int boxes = column < p.width ? (tile.n_rows + 63) / 64 : 0;
      barrier_arrive_expecting(full, boxes * (kGated ? 2 : 1) * kBoxBytes);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        if (j >= boxes) break;
        const int row = tile.first_row + 64 * j;
        tma_load(to + j * kBoxBytes, p.pre, full, column, row, 0, 0);
        if (kGated) tma_load(to + (2 + j) * kBoxBytes, p.pre, full, column, row, 1, 0);
      }
    }
    barrier_arrive_after_copies(full);
    __syncwarp();
    stage.advance();
  }
}

template <class T>
__device__ inline void floats_of_pair(uint32_t pair, float (&v)[2]) {
  Pack<T, 2> pack;
  pack.word[0] = pair;
  pack.unpack(v);
}

// What a multiplying warp does after the products of a tile: 16 rows, 64 columns at a time, where
// pre becomes its gradient in place.
template <class T, bool kGated>
class HiddenStore {
 public:
  __device__ HiddenStore(Shared& s, const HiddenBackward& p, int warpgroup)
      : s_(s), p_(p), matrices_(matrices_in_warp_box()) {
    const int warp = warp_id() % 4;
    in_stage_ = warpgroup * kBoxBytes + warp * kWarpBoxBytes;
    own_row_ = warpgroup * 64 + warp * 16 + lane_id() / 4;
    hidden_ = shared_address(s.boxes[warpgroup]) + warp * 2 * kWarpBoxBytes;
  }

  // `row` is the first of the warp's `rows`. Adds to `inner`, of this thread's two.
  template <Activation A>
  __device__ void store(const Tile& tile, int row, int rows, const float (&sum)[128],
                        float (&inner)[2], Stage& stage) {
    int previous = 0;
    float weight[2] = {1, 1};
#pragma unroll
    for (int c = 0; c < kTileN / kBoxWidth; ++c) {
      if (c >= p_.pre_blocks) break;
      barrier_wait(&s_.full[stage.index], stage.phase);
      if (c == 0 && p_.weights) {
        const float* weights = reinterpret_cast<const float*>(s_.a[stage.index]) + own_row_;
        weight[0] = weights[0], weight[1] = weights[8];
      }
      const int column = tile.n * kTileN + c * kBoxWidth;
      const bool inside = column < p_.width;
      const uint32_t gate_box = shared_address(s_.b[stage.index]) + in_stage_;
      const uint32_t up_box = gate_box + 2 * kBoxBytes;
      const uint32_t hidden_box = hidden_ + c % 2 * kWarpBoxBytes;
      if (inside) {
#pragma unroll
        for (int j = 0; j < 8; j += 2) {
          const uint32_t at = matrices_ ^ (j << 4);
          uint32_t gates[4], ups[4], hidden[4];
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
            hidden[i] = pair_of_floats<T>(activated[0], activated[1]);
          }
          store_matrices(gate_box + at, gates);
          if (kGated) store_matrices(up_box + at, ups);
          store_matrices(hidden_box + at, hidden);
        }
        fence_async_proxy();
      }
      __syncwarp();
      if (one_lane()) {
        if (inside && rows > 0) {
          tma_store(p_.grad_pre, gate_box, column, 0, 16 - rows, row + rows);
          if (kGated) tma_store(p_.grad_pre, up_box, column, 1, 16 - rows, row + rows);
          tma_store(p_.hidden, hidden_box, column, 0, 16 - rows, row + rows);
        }
        tma_store_commit();  // one group each time, empty or not: that is what is counted
        tma_store_wait_read<1>();
      }
      __syncwarp();
      if (c > 0) release(s_, previous);  // the stores have left it
      previous = stage.index;
      stage.advance();
    }
    if (one_lane()) tma_store_wait_read<0>();
    __syncwarp();
    release(s_, previous);
  }

 private:
  Shared& s_;
  const HiddenBackward& p_;
  uint32_t matrices_, in_stage_, hidden_;
  int own_row_;
};

template <class T, bool kByColumn, bool kGated>
__global__ void SPARSEMOE_CLUSTER(2) __launch_bounds__(kThreads, 1)
    hidden_backward_kernel(const __grid_constant__ HiddenBackward p) {
#if SPARSEMOE_HOPPER
  Shared& s = shared();
  begin<true>(s);
  const int warpgroup = int(threadIdx.x / 128) - 1;
  if (warpgroup < 0) {
    registers_lower_to<kLoadRegisters>();
    load_tiles<T, true, kByColumn, false>(
        s, p, [&](const Tile& tile, Stage& stage) { load_pre<kGated>(s, p, tile, stage); });
  } else {
    registers_raise_to<kMultiplyRegisters>();
    RowTiles tiles(p.offsets, p.n_experts, p.n_rows, p.n_tiles);
    const int warp = warp_id() % 4;
    HiddenStore<T, kGated> store(s, p, warpgroup);
    Stage stage;
    PairQueue queue(s, p.counter);
    Tile tile;
    for (int i = queue.first(); tiles.find(i, tile); i = queue.next()) {
      if (tile.n_rows <= warpgroup * 64) {
        skip(s, stage, p.blocks + p.pre_blocks);
        continue;
      }
      const int row = tile.first_row + warpgroup * 64 + warp * 16;
      const int rows = max(min(tile.n_rows - warpgroup * 64 - warp * 16, 16), 0);
      float sum[128];
      multiply<T, false, !kByColumn, true>(s, stage, warpgroup, p.blocks, sum);
      float inner[2] = {};
      with_activation(p.activation, [&](auto a) {
        constexpr Activation A = decltype(a)::value;
        if constexpr (A != Activation::none && sparsemoe::kGated<A> == kGated) {
          store.template store<A>(tile, row, rows, sum, inner, stage);
        }
      });
      if (p.inner) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int r = lane_id() / 4 + 8 * h;
          inner[h] += __shfl_xor_sync(kFullWarp, inner[h], 1);
          inner[h] += __shfl_xor_sync(kFullWarp, inner[h], 2);
          if (lane_id() % 4 == 0 && r < rows) {
            p.inner[tile.n * int64_t(p.n_rows) + row + r] = inner[h];
          }
        }
      }
    }
  }
  cluster_sync();  // the other block may still arrive here, or send
#else
  __trap();
#endif
}

template <class T, bool kByColumn, bool kGated>
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
  const int64_t f = params.f, parts = kGated ? 2 : 1;
  p.pre_blocks = int(std::min<int64_t>(ceil_div(f, kBoxWidth), kTileN / kBoxWidth));
  const bool made =
      make_map_of_b<kByColumn>(&p.b, params.dtype, params.down, params.h, f, 1, p.n_experts) &&
      make_tensor_map(&p.pre, params.dtype, params.pre, {f, p.n_rows, parts, 1}, {f * parts, f, f},
                      64) &&
      make_row_run_map(&p.grad_pre, params.dtype, params.grad_pre, p.n_rows, f, parts, f * parts,
                       16) &&
      make_row_run_map(&p.hidden, params.dtype, params.hidden, p.n_rows, f, 1, f, 16);
  if (!made) return kNotTaken;
  return launch(hidden_backward_kernel<T, kByColumn, kGated>, p,
                row_pairs_at_most(params.experts, p.n_tiles), stream);
}

}  // namespace hopper
}  // namespace sparsemoe
