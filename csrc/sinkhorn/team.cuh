// Blocks that share a problem, and how they add up what each has summed over its rows. For each
// column one block of a cluster gathers the sums of the others, through shared memory; it tells the
// same block of other clusters, through device memory; and tells the result to its cluster. In
// device memory a value and the number of the exchange lie in one word, which is polled: one way
// there and one back, no barrier. Where there are no clusters, the blocks of a team do the same
// with words alone. Sums are in the order of ranks and clusters: the same bits in every block, on
// every run.
#pragma once

#include "common/hopper.cuh"
#include "common/together.cuh"

namespace sparsemoe {

constexpr int kSinkhornThreads = 512, kSinkhornWarps = kSinkhornThreads / 32;

// Values exchanged at once: one a column, and one more.
template <class Tile>
constexpr int kWidth = Tile::kPadded + 1;
template <class Tile>
constexpr int kSlots = Tile::kPadded + 4;

// Shared memory of the exchange. Exchanges take turns, so that one may begin before all threads
// have read the result of the last.
template <int kCluster, class Tile>
struct TeamShared {
  alignas(16) float partial[kSinkhornWarps][kSlots<Tile>];  // what each warp has
  alignas(16) float sums[2][kSlots<Tile>];                  // the result
  float gathered[2][kCluster][kSlots<Tile> / kCluster + 1];
  alignas(8) uint64_t arrived[2], told[2];
};

template <int kCluster, class Tile>
class Team {
 public:
  // Teams of `team_clusters` clusters, or of all there are. words: [2, clusters of the grid +
  // teams, kSlots].
  __device__ Team(TeamShared<kCluster, Tile>& shared, uint64_t* words, int team_clusters)
      : s_(shared), words_(words), all_clusters_(gridDim.x / kCluster) {
    clusters_ = min(team_clusters, all_clusters_);
    const int cluster = blockIdx.x / kCluster;
    index_ = cluster / clusters_;
    cluster_ = cluster - index_ * clusters_;
    if constexpr (kCluster > 1) {
      rank_ = cluster_rank();
      if (threadIdx.x == 0) {
        for (int turn = 0; turn < 2; ++turn) {
          barrier_init(&s_.arrived[turn], 1);
          barrier_init(&s_.told[turn], 1);
        }
        barriers_ready();
      }
      cluster_arrive();
    }
    if (clusters_ > 1 && index_ < count()) {
      // Memory may hold anything.
      for (int c = threadIdx.x; c < kWidth<Tile>; c += kSinkhornThreads) {
        for (int turn = 0; turn < 2; ++turn) {
          if (kCluster == 1 || c % kCluster == rank_) *word(turn, cluster_, c) = 0;
          if (kCluster == 1 && cluster_ == 0) *word(turn, result(), c) = 0;
        }
      }
    }
    if (clusters_ > 1) begun_ = cooperative_groups::this_grid().barrier_arrive();
  }
  // All blocks end so.
  __device__ void finish() {
    if (exchanges_ == 0) wait_for_others();
  }

  __device__ int index() const { return index_; }
  __device__ int count() const { return all_clusters_ / clusters_; }
  __device__ int block() const { return cluster_ * kCluster + rank_; }
  __device__ int blocks() const { return clusters_ * kCluster; }

  // The sums (or maxima) over warps and blocks of s.partial[warp][c], for each c. By all threads.
  __device__ const float* exchange(bool largest = false) {
    const int turn = exchanges_ % 2;
    const uint32_t parity = exchanges_ / 2 % 2;
    __syncthreads();
    if (exchanges_++ == 0) wait_for_others();
    if constexpr (kCluster > 1) {
      exchange_in_clusters(turn, parity, largest);
    } else {
      for (int c = threadIdx.x; c < kWidth<Tile>; c += kSinkhornThreads) {
        const float x = of_block(c, largest);
        if (clusters_ == 1) {
          s_.sums[turn][c] = x;
        } else {
          post(word(turn, cluster_, c), x);
        }
      }
      if (clusters_ > 1) exchange_words(turn, largest);
      __syncthreads();
    }
    return s_.sums[turn];
  }

 private:
  __device__ static float join(float a, float b, bool largest) {
    return largest ? fmaxf(a, b) : a + b;
  }
  __device__ void wait_for_others() {
    if constexpr (kCluster > 1) cluster_wait();
    if (clusters_ > 1) cooperative_groups::this_grid().barrier_wait(std::move(begun_));
  }
  __device__ float of_block(int c, bool largest) const {
    float x[4];
#pragma unroll
    for (int w = 0; w < 4; ++w) x[w] = s_.partial[w][c];
#pragma unroll
    for (int w = 4; w < kSinkhornWarps; ++w) x[w % 4] = join(x[w % 4], s_.partial[w][c], largest);
    return join(join(x[0], x[1], largest), join(x[2], x[3], largest), largest);
  }

  __device__ void exchange_in_clusters(int turn, uint32_t parity, bool largest) {
    const int mine = (kWidth<Tile> - rank_ + kCluster - 1) / kCluster;  // columns
    if (threadIdx.x == 0) {
      barrier_arrive_expecting(&s_.arrived[turn], kCluster * mine * 4);
      barrier_arrive_expecting(&s_.told[turn], kWidth<Tile> * 4);
    }
    for (int c = threadIdx.x; c < kWidth<Tile>; c += kSinkhornThreads) {
      store_at(as_int(&s_.gathered[turn][rank_][c / kCluster]),
               __float_as_int(of_block(c, largest)), &s_.arrived[turn], c % kCluster);
    }
    if (clusters_ > 1) {
      for (int i = threadIdx.x; i < mine; i += kSinkhornThreads) {
        post(word(turn, cluster_, i * kCluster + rank_), of_cluster(turn, parity, i, largest));
      }
    }
    // Some lanes to a column.
    constexpr int kLanes = 16;
    const int lane = lane_id() % kLanes;
    for (int i = threadIdx.x / kLanes; i < (mine + 1) / 2 * 2; i += kSinkhornThreads / kLanes) {
      const int c = min(i, mine - 1) * kCluster + rank_;
      float x = clusters_ > 1 ? poll_words<kLanes>(turn, c, largest)
                              : of_cluster(turn, parity, c / kCluster, largest);
      if (i < mine && lane < kCluster) {
        store_at(as_int(&s_.sums[turn][c]), __float_as_int(x), &s_.told[turn], lane);
      }
    }
    barrier_wait(&s_.told[turn], parity);
  }
  __device__ static int* as_int(float* place) { return reinterpret_cast<int*>(place); }
  __device__ float of_cluster(int turn, uint32_t parity, int i, bool largest) {
    barrier_wait(&s_.arrived[turn], parity);
    float x = s_.gathered[turn][0][i];
#pragma unroll
    for (int r = 1; r < kCluster; ++r) x = join(x, s_.gathered[turn][r][i], largest);
    return x;
  }

  // For blocks without clusters: for each column one adds up, and tells all.
  __device__ void exchange_words(int turn, bool largest) {
    for (int c = cluster_ + warp_id() * clusters_; c < kWidth<Tile>;
         c += kSinkhornWarps * clusters_) {
      const float x = poll_words<32>(turn, c, largest);
      if (lane_id() == 0) post(word(turn, result(), c), x);
    }
    for (int c = threadIdx.x; c < kWidth<Tile>; c += kSinkhornThreads) {
      s_.sums[turn][c] = poll(word(turn, result(), c));
    }
  }

  // Of all clusters, by kLanes lanes.
  template <int kLanes>
  __device__ float poll_words(int turn, int c, bool largest) const {
    float x = largest ? -kInfinity : 0.0f;
    for (int k = lane_id() % kLanes; k < clusters_; k += kLanes) {
      x = join(x, poll(word(turn, k, c)), largest);
    }
    __syncwarp();
#pragma unroll
    for (int step = kLanes / 2; step > 0; step /= 2) {
      x = join(x, __shfl_xor_sync(kFullWarp, x, step), largest);
    }
    return x;
  }
  // What the clusters of a team have of a column lies side by side; then come the results, where
  // there are no clusters.
  __device__ uint64_t* word(int turn, int cluster, int c) const {
    const int64_t columns = int64_t(turn) * count() * kSlots<Tile> + index_ * kSlots<Tile> + c;
    return words_ + columns * (clusters_ + (kCluster == 1)) + cluster;
  }
  __device__ int result() const { return clusters_; }
  __device__ void post(uint64_t* to, float x) const {
    const uint64_t word = uint64_t(exchanges_) << 32 | __float_as_uint(x);
    asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(to), "l"(word) : "memory");
  }
  __device__ float poll(const uint64_t* from) const {
    uint64_t word;
    do {
      asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(word) : "l"(from) : "memory");
    } while (uint32_t(word >> 32) != exchanges_);
    return __uint_as_float(uint32_t(word));
  }

  TeamShared<kCluster, Tile>& s_;
  uint64_t* words_;
  int all_clusters_, clusters_, cluster_, index_, rank_ = 0;
  uint32_t exchanges_ = 0;
  cooperative_groups::grid_group::arrival_token begun_{};
};

// How much a block may have, and for how many rows there is room beside `kFixed` bytes.
struct SinkhornShared {
  int bytes, rows;
};
template <class Tile, size_t kFixed>
SinkhornShared rows_that_fit() {
  const int bytes = most_shared_bytes();
  constexpr int kUnit = std::max(Tile::kVisit, 4);
  const int rows = (bytes - int(kFixed)) / (Tile::kPadded * 4 + 4) / kUnit * kUnit;
  return {bytes, rows};
}

}  // namespace sparsemoe
