// out = activation(a @ b[e] + bias[e]) for rows of experts, on Hopper.
#pragma once

#include "moe/activation.cuh"
#include "moe/experts_hopper.cuh"

namespace sparsemoe {
namespace hopper {

struct RowsProduct {
  CUtensorMap a, b, pre, out;
  int32_t* counter;
  const int32_t* offsets;
  int n_experts, n_rows, n_tiles;
  int blocks;    // of kTileK, of the inner dimension
  int k, width;  // columns of out
  Rows from;     // where rows are gathered
  const void* bias;
  int64_t bias_stride;
  Activation activation;
  bool keep;  // pre
};

// Starts copies of a tile's gathered rows. Eight threads copy 128 bytes of a row.
class RowGather {
 public:
  __device__ RowGather(const Rows& from, int n_rows, int k)
      : from_(from), last_row_(n_rows - 1), k_(k), column_(threadIdx.x % 8 * 8) {
    const int row = threadIdx.x / 8;
    offset_ = row * 128 + ((threadIdx.x % 8 ^ (row & 7)) << 4);
  }
  __device__ void begin(const Tile& tile) {
    parts_ = (tile.n_rows + 63) / 64;
    // The warp copies 32 rows: each lane finds one.
    const int row = warp_id() * 4 + lane_id() % 4 + lane_id() / 4 * 16;
    const int index = __ldg(from_.index + min(tile.first_row + row, last_row_));
    const uint32_t chunk = row < tile.n_rows ? row_chunk(from_, index) : kNoRow;
#pragma unroll
    for (int i = 0; i < 8; ++i) at_[i] = __shfl_sync(kFullWarp, chunk, 4 * i + lane_id() / 8);
  }
  __device__ void copy(uint32_t to, int block) const {
    const int column = block * kTileK + column_;
    const uint4* data = static_cast<const uint4*>(from_.data) + column / 8;
    const bool inside = column < k_;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (i / 4 >= parts_) break;
      copy_row_chunk(to + offset_ + i * 2048, data, at_[i], inside);
    }
  }

 private:
  const Rows& from_;
  int last_row_, k_, column_, parts_;
  uint32_t offset_, at_[8];
};

__device__ inline void tma_load_b(const Tile& tile, uint32_t to, const CUtensorMap& b,
                                  uint64_t* full, int c0, int c1, int c2) {
  if (tile.alone) {
    tma_load(to, b, full, c0, c1, c2, tile.expert);
  } else {
    tma_load_to_both(to, b, full, c0, c1, c2, tile.expert);
  }
}

// The next pair of tiles is known and handed on after so many blocks of one: the answer is there.
constexpr int kHandOnAfter = 3;

// The loading warpgroup of kernels whose tiles are of rows of experts. Each half of b (of the gate
// and of what it gates, where kGated) lies by column in a box of 128 columns, by row in two of 64.
// `more`(tile, stage) loads what a tile needs besides.
template <class T, bool kGather, bool kByColumn, bool kGated, class Params, class More>
__device__ void load_tiles(Shared& s, const Params& p, const More& more) {
  if (!kGather && warp_id() != 0) return;
  const bool first_warp = warp_id() == 0, first_thread = threadIdx.x == 0;
  const int rank = cluster_rank();
  if (first_thread) {
    tma_prefetch(p.b);
    if constexpr (!kGather) tma_prefetch(p.a);
  }
  RowTiles tiles(p.offsets, p.n_experts, p.n_rows, p.n_tiles);
  RowGather gather(p.from, p.n_rows, p.k);
  Stage stage;
  PairQueue queue(s, p.counter);
  Tile tile;
  for (int i = queue.first(); tiles.find(i, tile); i = queue.next()) {
    if (first_thread) queue.ask(i);
    if (kGather) gather.begin(tile);
    for (int block = 0; block < p.blocks; ++block) {
      barrier_wait(&s.empty[stage.index], stage.phase ^ 1);
      uint64_t* full = &s.full[stage.index];
      const uint32_t a = shared_address(s.a[stage.index]), b = shared_address(s.b[stage.index]);
      if (first_warp && one_lane()) {
        const int k = block * kTileK, parts = kGather ? 0 : (tile.n_rows + 63) / 64;
        const int n = tile.n * (kGated ? kTileN / 2 : kTileN);
        int halves = kGated || n + kTileN / 2 < p.width ? 2 : 1;  // of b that hold anything
        if (tile.n_rows == 0) halves = 0;
        barrier_arrive_expecting(full, halves * (kBytesB / 2) + parts * kBoxBytes);
        if constexpr (!kGather) {
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            if (j < parts) tma_load(a + j * kBoxBytes, p.a, full, k, tile.first_row + 64 * j, 0, 0);
          }
        }
        // Each block loads its half, for both, or all.
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          if (half >= halves || (half != rank && !tile.alone)) continue;
          const uint32_t to = b + half * (kBytesB / 2);
          const int column = kGated ? n : n + half * 128, part = kGated ? half : 0;
          if (kByColumn) {
            tma_load_b(tile, to, p.b, full, k, column, part);
          } else {
            tma_load_b(tile, to, p.b, full, column, k, part);
            tma_load_b(tile, to + kBoxBytes, p.b, full, column + kBoxWidth, k, part);
          }
        }
      }
      if (kGather) {
        gather.copy(a, block);
        barrier_arrive_after_copies(full);
      }
      if (first_thread && block == min(kHandOnAfter, p.blocks - 1)) queue.hand_on();
      __syncwarp();  // no lane may fall behind by two phases
      stage.advance();
    }
    more(tile, stage);
  }
}

// Adds the bias of columns c, c + 1, c + 8, ... to a thread's sums of 64 columns.
template <class T>
__device__ void add_bias(float* sum, const T* bias, int columns) {
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    if (8 * j >= columns) break;
    const T* at = bias + 8 * j + lane_id() % 4 * 2;
    const float b0 = to_float(at[0]), b1 = to_float(at[1]);
    sum[4 * j] += b0, sum[4 * j + 1] += b1, sum[4 * j + 2] += b0, sum[4 * j + 3] += b1;
  }
}

// `row` is the first of a warp's `rows`.
template <Activation A, class T, bool kGated>
__device__ void store_tile(const RowsProduct& p, const Tile& tile, int row, int rows,
                           float (&sum)[128], WarpStore<T>& store) {
  constexpr int kBoxes = kGated ? 2 : 4;
  constexpr bool kActivated = A != Activation::none;
  const T* bias = static_cast<const T*>(p.bias);
  if (bias) bias += tile.expert * p.bias_stride;
  uint32_t box[8][2];
#pragma unroll
  for (int c = 0; c < kBoxes; ++c) {
    const int column = (tile.n * kBoxes + c) * kBoxWidth, columns = p.width - column;
    if (columns <= 0) break;
    float* gate = sum + 32 * c;
    float* up = sum + 64 + 32 * c;
    if (bias) {
      add_bias(gate, bias + column, columns);
      if (kGated) add_bias(up, bias + p.width + column, columns);
    }
    if (kActivated && p.keep) {
      pack_box<T>(gate, box);
      store.put(box, p.pre, column, 0, row, rows);
      if (kGated) {
        pack_box<T>(up, box);
        store.put(box, p.pre, column, 1, row, rows);
      }
    }
    if constexpr (kActivated) {
#pragma unroll
      for (int i = 0; i < 32; ++i) {
        gate[i] = act_value<A>(gate[i]);
        if (kGated) gate[i] *= up[i];
      }
    }
    pack_box<T>(gate, box);
    store.put(box, p.out, column, 0, row, rows);
  }
}

template <class T, bool kGather, bool kByColumn, bool kGated>
__global__ void SPARSEMOE_CLUSTER(2) __launch_bounds__(kThreads, 1)
    rows_product_kernel(const __grid_constant__ RowsProduct p) {
#if SPARSEMOE_HOPPER
  Shared& s = shared();
  begin<kGather>(s);
  const int warpgroup = int(threadIdx.x / 128) - 1;
  if (warpgroup < 0) {
    registers_lower_to<kLoadRegisters>();
    load_tiles<T, kGather, kByColumn, kGated>(s, p, [](const Tile&, Stage&) {});
  } else {
    registers_raise_to<kMultiplyRegisters>();
    RowTiles tiles(p.offsets, p.n_experts, p.n_rows, p.n_tiles);
    const int warp = warp_id() % 4;
    WarpStore<T> store(shared_address(s.boxes[warpgroup]) + warp * 2 * kWarpBoxBytes);
    Stage stage;
    PairQueue queue(s, p.counter);
    Tile tile;
    for (int i = queue.first(); tiles.find(i, tile); i = queue.next()) {
      const int rows = min(tile.n_rows - warpgroup * 64, 64);
      if (rows <= 0) {
        skip(s, stage, p.blocks);
        continue;
      }
      float sum[128];
      multiply<T, false, !kByColumn, kGather>(s, stage, warpgroup, p.blocks, sum);
      const int row = tile.first_row + warpgroup * 64 + warp * 16;
      const int own_rows = max(min(rows - warp * 16, 16), 0);
      if constexpr (kGather) {
        with_activation(p.activation, [&](auto a) {
          constexpr Activation A = decltype(a)::value;
          if constexpr (sparsemoe::kGated<A> == kGated) {
            store_tile<A, T, kGated>(p, tile, row, own_rows, sum, store);
          }
        });
      } else {
        store_tile<Activation::none, T, false>(p, tile, row, own_rows, sum, store);
      }
    }
    if (one_lane()) tma_store_wait_read<0>();
  }
  cluster_sync();  // the other block may still arrive here, or send
#else
  __trap();
#endif
}

// For tma_load_b: matrices [k, parts * width], in boxes that hold 64 of k.
template <bool kByColumn>
bool make_map_of_b(CUtensorMap* map, DType dtype, const Matrices& b, int64_t k, int64_t width,
                   int64_t parts, int64_t n_experts) {
  if (kByColumn) {
    return make_tensor_map(map, dtype, b.data, {k, width, parts, n_experts},
                           {b.stride, width * b.stride, b.expert_stride}, kTileN / 2);
  }
  return make_tensor_map(map, dtype, b.data, {width, k, parts, n_experts},
                         {b.stride, width, b.expert_stride}, kTileK);
}

template <class T, bool kGather, bool kByColumn, bool kGated>
int rows_product_launch(const RowsProductParams& params, void* stream) {
  RowsProduct p{};
  const int parts = kGated ? 2 : 1;
  const int64_t width = params.n / parts;  // of out
  p.counter = params.counter;
  p.offsets = params.experts.offsets;
  p.n_experts = int(params.experts.n_experts), p.n_rows = int(params.experts.n_rows);
  p.n_tiles = int(ceil_div(params.n, kTileN));
  if (kGated) p.n_tiles = int(ceil_div(width, kTileN / 2));
  p.k = int(params.k), p.blocks = int(ceil_div(params.k, kTileK));
  p.width = int(width);
  p.from = params.a;
  p.bias = params.bias, p.bias_stride = params.bias_stride;
  p.activation = params.activation;
  p.keep = params.pre != nullptr;
  bool made = true;
  if (!kGather) {
    made = make_tensor_map(&p.a, params.dtype, params.a.data, {params.k, p.n_rows, 1, 1},
                           {params.a.stride, params.a.stride, params.a.stride}, 64);
  }
  made = made && make_map_of_b<kByColumn>(&p.b, params.dtype, params.b, params.k, width, parts,
                                          p.n_experts);
  if (p.keep) {
    made = made &&
           make_row_run_map(&p.pre, params.dtype, params.pre, p.n_rows, width, parts, params.n, 16);
  }
  made = made && make_row_run_map(&p.out, params.dtype, params.out, p.n_rows, width, 1,
                                  params.out_stride, 16);
  if (!made) return kNotTaken;
  return launch(rows_product_kernel<T, kGather, kByColumn, kGated>, p,
                row_pairs_at_most(params.experts, p.n_tiles), stream);
}

}  // namespace hopper
}  // namespace sparsemoe
