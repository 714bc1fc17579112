// out[e] = the sum of outer(a[r], b[r]) over the rows of expert e, on Hopper. Where b is gathered,
// the two change places and the result is stored transposed.
#pragma once

#include "moe/experts_hopper.cuh"

namespace sparsemoe {
namespace hopper {

struct WeightGrad {
  CUtensorMap a, b, out;
  int32_t* counter;
  const int32_t* offsets;
  int n_experts, n_rows, m_pairs, n_tiles;
  int m, n;
  Rows from;  // a, where it is gathered
  void* sum;  // where it is accumulated, else null
};

__device__ inline bool find_weight_tile(const WeightGrad& p, int i, Tile& tile) {
  const int tiles = p.m_pairs * p.n_tiles;
  tile.expert = i / tiles;
  if (tile.expert >= p.n_experts) return false;
  place_tile(tile, i - tile.expert * tiles, p.m_pairs, p.n_tiles);
  tile.first_row = offset_of(p.offsets, tile.expert, p.n_rows);
  tile.n_rows = max(offset_of(p.offsets, tile.expert + 1, p.n_rows) - tile.first_row, 0);
  return true;
}

// Starts copies of kTileK gathered rows of kTileM columns, in two boxes of 64 columns. 16 threads
// copy a row.
class ColumnGather {
 public:
  static constexpr int kAhead = 4;  // blocks whose indices are read at once

  __device__ ColumnGather(const Rows& from, int width)
      : from_(from), width_(width), row_(threadIdx.x / 16), column_(threadIdx.x % 16 * 8) {
    // All rows that a thread copies are equal modulo 8.
    offset_ = column_ / 64 * kBoxBytes + row_ * 128 + ((column_ / 8 % 8 ^ row_) << 4);
  }

  // Asks for the indices of kAhead blocks, from row `first` of those up to `end` on: without a
  // branch, so that no read waits for another.
  __device__ void read(int first, int end) {
    there_ = end - first;
#pragma unroll
    for (int i = 0; i < 2 * kAhead; ++i) {
      later_[i] = __ldg(from_.index + max(min(first + lane_id() + 32 * i, end - 1), 0));
    }
  }
  // Goes on to those blocks.
  __device__ void begin() {
#pragma unroll
    for (int i = 0; i < 2 * kAhead; ++i) {
      now_[i] = lane_id() + 32 * i < there_ ? row_chunk(from_, later_[i]) : kNoRow;
    }
  }
  // The columns of the tile.
  __device__ void at(int column) {
    column += column_;
    inside_ = column < width_;
    data_ = static_cast<const uint4*>(from_.data) + column / 8;
  }
  // Block i of kAhead.
  __device__ void copy(uint32_t to, int i) const {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const uint32_t at = __shfl_sync(kFullWarp, now_[2 * i + j / 4], (row_ + 8 * j) % 32);
      copy_row_chunk(to + offset_ + j * 1024, data_, at, inside_);
    }
  }

 private:
  const Rows& from_;
  const uint4* data_;
  int width_, row_, column_, there_;
  uint32_t offset_;
  bool inside_;
  uint32_t now_[2 * kAhead];
  int later_[2 * kAhead];
};

template <class T, bool kGather>
__device__ void load_weight_tiles(Shared& s, const WeightGrad& p) {
  if (!kGather && warp_id() != 0) return;
  ColumnGather gather(p.from, p.m);
  constexpr int kAhead = ColumnGather::kAhead;
  const int rank = cluster_rank();
  Stage stage;
  PairQueue queue(s, p.counter);
  int i = queue.first();
  Tile tile, next;
  bool there = find_weight_tile(p, i, tile);
  const auto read = [&](const Tile& of, int done) {
    if (kGather) gather.read(of.first_row + done, of.first_row + of.n_rows);
  };
  const auto look = [&] {  // for the next tile, long before it begins
    i = queue.next();
    there = find_weight_tile(p, i, next);
    if (there) read(next, 0);
  };
  if (there) read(tile, 0);
  for (; there; tile = next) {
    if (threadIdx.x == 0) queue.ask(i);
    if (tile.n_rows == 0) {
      if (threadIdx.x == 0) queue.hand_on();
      look();
      continue;
    }
    const int m = tile.m * kPairM + rank * kTileM, n = tile.n * kTileN;
    const int blocks = (tile.n_rows + kTileK - 1) / kTileK;
    if (kGather) gather.at(m);
    for (int first = 0; first < blocks; first += kAhead) {
      if (kGather) gather.begin();
      const bool last = first + kAhead >= blocks;
      if (!last) read(tile, (first + kAhead) * kTileK);
#pragma unroll
      for (int ahead = 0; ahead < kAhead; ++ahead) {
        const int block = first + ahead;
        if (block >= blocks) break;
        barrier_wait(&s.empty[stage.index], stage.phase ^ 1);
        uint64_t* full = &s.full[stage.index];
        const uint32_t a = shared_address(s.a[stage.index]), b = shared_address(s.b[stage.index]);
        if (warp_id() == 0 && one_lane()) {
          const int rows = min(tile.n_rows - block * kTileK, kTileK);
          const int end = tile.first_row + block * kTileK + rows;
          const int boxes_a = kGather ? 0 : boxes_within(m, p.m, 2);
          const int boxes_b = boxes_within(n, p.n, 4);
          barrier_arrive_expecting(full, (boxes_a + boxes_b) * kBoxBytes);
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            if (j >= boxes_a) break;
            tma_load(a + j * kBoxBytes, p.a, full, m + j * kBoxWidth, 0, 64 - rows, end);
          }
          // Each block loads half of b, for both.
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const int j = rank + 2 * i;
            if (j >= boxes_b) break;
            tma_load_to_both(b + j * kBoxBytes, p.b, full, n + j * kBoxWidth, 0, 64 - rows, end);
          }
        }
        if (kGather) {
          __syncwarp();
          gather.copy(a, ahead);
          barrier_arrive_after_copies(full);
        }
        if (threadIdx.x == 0 && block == 0) queue.hand_on();
        __syncwarp();  // no lane may fall behind by two phases
        stage.advance();
        if (ahead == 0 && last) look();
      }
    }
  }
}

// Sends boxes of 64 x 64 results of a warpgroup to device memory through two buffers.
template <class T, bool kTransposed>
class BoxStore {
 public:
  __device__ BoxStore(Shared& s, int warpgroup)
      : buffers_(shared_address(s.boxes[warpgroup])), barrier_(1 + warpgroup) {
    matrices_ = kTransposed ? matrices_in_transposed_box() : matrices_in_box();
  }

  // v[j][h]: columns 8 j + 2 (lane % 4) and the next, of row 8 h + lane / 4 of the warp's 16.
  __device__ void put(const uint32_t (&v)[8][2], const CUtensorMap& map, int c0, int c1, int c2,
                      int c3) {
    const bool leads = warp_id() % 4 == 0;
    if (leads && one_lane()) tma_store_wait_read<1>();
    named_barrier(barrier_, 128);
    const uint32_t buffer = buffers_ + which_ * kBoxBytes;
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
      const uint32_t four[4] = {v[j][0], v[j][1], v[j + 1][0], v[j + 1][1]};
      if (kTransposed) {
        store_matrices_transposed(buffer + matrices_ + j * 1024, four);
      } else {
        store_matrices(buffer + (matrices_ ^ (j << 4)), four);
      }
    }
    fence_async_proxy();
    named_barrier(barrier_, 128);
    if (leads && one_lane()) {
      tma_store(map, buffer, c0, c1, c2, c3);
      tma_store_commit();
    }
    which_ ^= 1;
  }

 private:
  uint32_t buffers_, matrices_;
  int barrier_, which_ = 0;
};

// Adds a warpgroup's 64 x kTileN results to floats in device memory, of which rows x columns exist.
template <bool kTransposed>
__device__ void add_to(float* sum, int64_t stride, int rows, int columns,
                       const float (&value)[128]) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int row = warp_id() % 4 * 16 + lane_id() / 4 + 8 * h;
    if (row >= rows) continue;
#pragma unroll
    for (int j = 0; j < kTileN / 8; ++j) {
      const int column = 8 * j + lane_id() % 4 * 2;
      if (8 * j >= columns) break;
      const float v0 = value[4 * j + 2 * h], v1 = value[4 * j + 2 * h + 1];
      if (kTransposed) {
        sum[column * stride + row] += v0;
        sum[(column + 1) * stride + row] += v1;
      } else {
        float2* pair = reinterpret_cast<float2*>(sum + row * stride + column);
        const float2 old = *pair;
        *pair = {old.x + v0, old.y + v1};
      }
    }
  }
}

template <class T, bool kGather, bool kTransposed>
__global__ void SPARSEMOE_CLUSTER(2) __launch_bounds__(kThreads, 1)
    weight_grad_kernel(const __grid_constant__ WeightGrad p) {
#if SPARSEMOE_HOPPER
  Shared& s = shared();
  begin<kGather>(s);
  const int warpgroup = int(threadIdx.x / 128) - 1;
  if (warpgroup < 0) {
    registers_lower_to<kLoadRegisters + 16>();  // for the indices read ahead
    load_weight_tiles<T, kGather>(s, p);
  } else {
    registers_raise_to<kMultiplyRegisters - 8>();
    BoxStore<T, kTransposed> store(s, warpgroup);
    Stage stage;
    PairQueue queue(s, p.counter);
    Tile tile;
    for (int i = queue.first(); find_weight_tile(p, i, tile); i = queue.next()) {
      float sum[128];
      multiply<T, true, true, kGather>(s, stage, warpgroup, (tile.n_rows + kTileK - 1) / kTileK,
                                       sum);
      if (tile.n_rows == 0) {
        if (p.sum) continue;
#pragma unroll
        for (int j = 0; j < 128; ++j) sum[j] = 0;
      }
      const int m = tile.m * kPairM + cluster_rank() * kTileM + warpgroup * 64, n = tile.n * kTileN;
      if (m >= p.m) continue;
      if (p.sum) {
        float* to = static_cast<float*>(p.sum) + tile.expert * (int64_t(p.m) * p.n);
        to += kTransposed ? n * int64_t(p.m) + m : m * int64_t(p.n) + n;
        add_to<kTransposed>(to, kTransposed ? p.m : p.n, p.m - m, p.n - n, sum);
        continue;
      }
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const int column = n + c * kBoxWidth;
        if (column >= p.n) break;
        uint32_t box[8][2];
        pack_box<T>(sum + 32 * c, box);
        store.put(box, p.out, kTransposed ? m : column, kTransposed ? column : m, 0, tile.expert);
      }
    }
    if (warp_id() % 4 == 0 && one_lane()) tma_store_wait_read<0>();
  }
  cluster_sync();  // the other block may still arrive here, or send
#else
  __trap();
#endif
}

template <class T, bool kGather, bool kTransposed>
int weight_grad_launch(const WeightGradParams& params, void* stream) {
  const Rows& a = kTransposed ? params.b : params.a;
  const Rows& b = kTransposed ? params.a : params.b;
  const int64_t m = kTransposed ? params.n : params.m, n = kTransposed ? params.m : params.n;
  WeightGrad p{};
  p.counter = params.counter;
  p.offsets = params.experts.offsets;
  p.n_experts = int(params.experts.n_experts), p.n_rows = int(params.experts.n_rows);
  p.m = int(m), p.n = int(n);
  p.m_pairs = int(ceil_div(m, kPairM)), p.n_tiles = int(ceil_div(n, kTileN));
  p.from = a;
  p.sum = params.accumulate ? params.out : nullptr;
  bool made = make_row_run_map(&p.b, params.dtype, b.data, p.n_rows, n, 1, b.stride, 64);
  if (!kGather) {
    made = made && make_row_run_map(&p.a, params.dtype, a.data, p.n_rows, m, 1, a.stride, 64);
  }
  if (!params.accumulate) {
    made = made &&
           make_tensor_map(&p.out, params.dtype, params.out, {params.n, params.m, 1, p.n_experts},
                           {params.n, params.m * params.n, params.m * params.n}, 64);
  }
  if (!made) return kNotTaken;
  return launch(weight_grad_kernel<T, kGather, kTransposed>, p,
                params.experts.n_experts * p.m_pairs * p.n_tiles, stream);
}

}  // namespace hopper
}  // namespace sparsemoe
