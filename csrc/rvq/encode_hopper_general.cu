// Encoding on Hopper's tensor cores for the shapes that encode_hopper.cuh does not take: any width
// up to 1024, any number of codes, more stages.
//
// Scores and candidates are those of encode_hopper.cuh, and codes come into shared memory in the
// same way. But a block takes 64 vectors, whose residuals are in device memory in float32 and, in
// half precision, in shared memory. All its warpgroups multiply by them, each the tiles of codes
// whose turn it is.
#include "common/early.cuh"
#include "rvq/encode_hopper_general.cuh"
#include "rvq/encode_hopper_prepare.cuh"

namespace sparsemoe {
namespace hopper {
namespace general {

template <int kPieces, bool kPacked>
class Searcher : Residuals<kPieces, kPacked> {
  using Base = Residuals<kPieces, kPacked>;
  using Base::all_meet;
  using Base::code_at;
  using Base::depths_;
  using Base::first_row_;
  using Base::leave;
  using Base::load_residual;
  using Base::moves;
  using Base::next_residuals;
  using Base::operands_;
  using Base::p_;
  using Base::s_;
  using Base::separated;
  using Base::t_;
  using Base::warp_;
  using Base::width_;
  using Of = Threads<kPieces>;
  using Row = Columns<kPieces>;

 public:
  __device__ Searcher(const GeneralParams& params, GeneralShared& s, char* ring)
      : Base(params, s, ring + params.slots * kStepBytes),
        ring_(ring),
        group_(threadIdx.x / 128 - 1),
        slots_(params.slots),
        slot_(group_ * depths_ % slots_),
        norms_(group_),
        tile_(group_) {}

  __device__ void run() {
    const int n_tiles = int(t_.n_tiles);
    for (int64_t first = first_of_cluster(); first < p_.n; first += cluster_stride()) {
      first_row_ = first + cluster_rank() * kRows;
      next_residuals(-1);
      all_meet();
      for (int stage = 0; stage < int(p_.n_stages); ++stage) {
        for (int begin = 0; begin < n_tiles; begin += kPieceTiles * Of::kGroups) {
          const int end = min(begin + kPieceTiles * Of::kGroups, n_tiles), first_tile = tile_;
          Kept kept[2];
          score_codes(end, kept);
          find_candidates(begin > 0, first_tile, kept);
          choose(stage, begin);
          all_meet();
        }
        next_residuals(stage);
        all_meet();
        tile_ -= n_tiles;
      }
    }
  }

 private:
  // --- scores ---

  __device__ void score_codes(int end, Kept (&kept)[2]) {
    float weight[2], range[2], base[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const State& state = s_.states[place_of(h)];
      weight[h] = state.weight, range[h] = state.range, base[h] = kBase * range[h];
    }
    const int n_tiles = int(t_.n_tiles);
    // As in encode_hopper.cuh.
    const uint32_t to_index = __shfl_sync(kFullWarp, 1u << kIndexBits, 0);
    for (uint32_t turn = 0; tile_ < end; ++turn, tile_ += Of::kGroups) {
      float sum[64];
      multiply(sum);
      if (tile_ + 1 == n_tiles) leave_out_padding(int(p_.n_codes), n_tiles, range, sum);
      Best of_tile[2];
      score_tile(sum, s_.norms2[norms_] + lane_id() % 4, weight, base, to_index, of_tile);
      barrier_arrive(&s_.norms_read[norms_]);
      norms_ = (norms_ + Of::kGroups) % kNorms;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        of_tile[h].set_bits(turn << 5);
        kept[h].add(of_tile[h]);
      }
    }
  }
  // The row h of the thread in products.
  __device__ int place_of(int h) const { return warp_ % 4 * 16 + lane_id() / 4 + 8 * h; }
  // The next step is waited for while the last ones are multiplied.
  __device__ void multiply(float (&sum)[64]) {
    int held = slot_;
    await_slot();
    for (int depth = 0; depth < depths_; ++depth) {
      products_begin();
      const uint64_t a = matrix_descriptor(operands_ + depth * kOperandBytes, 16, 1024);
      const uint64_t b = matrix_descriptor(ring_ + slot_ * kStepBytes, 16, 1024);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        product_128(sum, a + 2 * i, b + 2 * i, depth + i > 0);
      }
      products_commit();
      if (++slot_ == slots_) slot_ = 0;
      if (depth > 1) release(held);
      if (depth + 1 < depths_) await_slot();
      products_wait<1>();
    }
    products_wait<0>();
#pragma unroll
    for (int i = 0; i < 64; ++i) products_give(sum[i]);
    if (depths_ > 1) release(held);
    release(held);
    slot_ = (slot_ + (Of::kGroups - 1) * depths_) % slots_;
  }
  __device__ void await_slot() {
    barrier_wait(&s_.full[group_][slot_], phases_ >> slot_ & 1);
    phases_ ^= 1u << slot_;
  }
  __device__ void release(int& slot) {
    __syncwarp();
    if (lane_id() < kCluster) barrier_arrive_at(&s_.empty[slot], lane_id());
    if (++slot == slots_) slot = 0;
  }

  // --- choosing ---

  // Of the row, in the tiles just looked at and the best of those before.
  __device__ uint32_t lowest_of(int row, bool any_before) const {
    uint32_t lowest = any_before ? s_.before_score[row] : kNoScore;
#pragma unroll
    for (int group = 0; group < Of::kGroups; ++group) lowest = min(lowest, s_.lowest[group][row]);
    return lowest;
  }
  __device__ void add_candidate(int row, int code) {
    if (!p_.exact) {  // they seem alike
      atomicMax(&s_.count[row], 1);
      atomicMin(&s_.candidates[row][0], code);
      return;
    }
    const int at = atomicAdd(&s_.count[row], 1);
    if (at < kMostCandidates) s_.candidates[row][at] = code;
  }
  __device__ void add_set(int row, int last_tile, int lane_of_4) {
    const int at = atomicAdd(&s_.n_sets[row], 1);
    if (at < kMostSets) {
      s_.sets[row][at] = 4 * last_tile + lane_of_4;
    } else {
      leave_out(row);
    }
  }
  __device__ void leave_out(int row) { atomicAdd(&s_.count[row], kMostCandidates + 1); }
  __device__ void find_candidates(bool any_before, int first_tile, const Kept (&kept)[2]) {
    const int lane = lane_id();
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      uint32_t lowest = kept[h].lowest();
      lowest = min(lowest, __shfl_xor_sync(kFullWarp, lowest, 1));
      lowest = min(lowest, __shfl_xor_sync(kFullWarp, lowest, 2));
      if (lane % 4 != 0) continue;
      s_.lowest[group_][place_of(h)] = lowest;
      if (group_ != 0) continue;
      s_.count[place_of(h)] = s_.n_sets[place_of(h)] = 0;
      s_.candidates[place_of(h)][0] = 0x7fffffff;
    }
    all_meet();
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = place_of(h);
      const State& state = s_.states[row];
      const uint32_t lowest = lowest_of(row, any_before);
      const uint32_t highest = highest_candidate(lowest, state.slack, state.range * 0x1p-20f);
      const uint32_t limit = p_.exact ? highest : lowest | kAllIndexBits;
#pragma unroll
      for (int i = 0; i < 2 * kSets; ++i) {
        const uint32_t score = kept[h].scores[i];
        if (score > limit) continue;
        const int tile = first_tile + Of::kGroups * int((score & kAllIndexBits) >> 5);
        add_candidate(row, tile * int(kTileCodes) + code_in_tile(score, lane));
      }
      unsigned sets = p_.exact ? kept[h].sets_that_dropped(limit) : 0;
      if (sets && state.slack < state.noise) leave_out(row);
      for (; sets; sets &= sets - 1) {
        add_set(row, tile_ - Of::kGroups * __ffs(sets), lane % 4);
      }
      if (!(state.slack < kMostSlack)) leave_out(row);
      if (any_before && group_ == 0 && lane % 4 == 0 && s_.before_score[row] <= limit) {
        add_candidate(row, s_.before[row]);
      }
    }
    all_meet();
  }

  // Of rows that have several candidates, the nearest becomes the first. Their order is not always
  // the same, what is chosen is. The warps share the rows.
  __device__ void choose(int stage, int begin) {
    const int lane = lane_id(), own = threadIdx.x - 128;
    int at = 0;
    unsigned with_sets[kRows / 32];
#pragma unroll
    for (int half = 0; half < kRows; half += 32) {
      const int count = s_.count[half + lane];
      with_sets[half / 32] = __ballot_sync(kFullWarp, s_.n_sets[half + lane] > 0);
      const bool several = !s_.states[half + lane].left && count > 1 && count <= kMostCandidates;
      for (unsigned rows = __ballot_sync(kFullWarp, several); rows; rows &= rows - 1, ++at) {
        if (at % Of::kWarps != warp_) continue;
        const int i = half + __ffs(rows) - 1, code = nearest(stage, i);
        __syncwarp();
        if (lane == 0) s_.candidates[i][0] = code;
      }
    }
    if (with_sets[0] | with_sets[1]) look_at_sets(stage, begin, with_sets);
    if (t_.n_tiles <= kPieceTiles * Of::kGroups) return;
    all_meet();
    if (own >= kRows) return;
    s_.before_score[own] = lowest_of(own, begin > 0), s_.before[own] = s_.candidates[own][0];
    if (!separated(own)) leave(own, stage);
  }
  // Where rows have sets: the nearest of what has been found and of the sets' codes, which the
  // warps share.
  __device__ void look_at_sets(int stage, int begin, const unsigned (&with_sets)[kRows / 32]) {
    const int lane = lane_id();
    all_meet();
#pragma unroll 1
    for (int i = 0; i < kRows; ++i) {
      const bool looks = with_sets[i / 32] >> (i % 32) & 1;
      if (!looks || s_.states[i].left || !separated(i)) continue;
      float least = kInfinity;
      int found = s_.candidates[i][0];
      nearest_of_sets(stage, i, begin, least, found);
      if (lane == 0) s_.least[warp_] = least, s_.found[warp_] = found;
      all_meet();
      least = lane < Of::kWarps ? s_.least[lane] : kInfinity;
      found = lane < Of::kWarps ? s_.found[lane] : 0x7fffffff;
      least_of(least, found, 16);
      if (threadIdx.x == 128 && least < kInfinity) s_.candidates[i][0] = found;
      all_meet();
    }
  }
  // Of the code found so far, and of the warp's share of those of the sets.
  __device__ void nearest_of_sets(int stage, int i, int begin, float& least, int& found) const {
    Row residual;
    load_residual(residual, i);
    const auto look_at = [&](int code) {
      Row e;
      e.template load<kPacked>(code_at(stage, code), 0, width_);
      const float* norm = t_.norms + int64_t(stage) * p_.n_codes + code;
      const float d = distance(p_.metric, residual, e, norm);
      if (nearer(d, code, least, found)) least = d, found = code;
    };
    look_at(found);
    const int n_sets = s_.n_sets[i];
#pragma unroll 1
    for (int k = 0; k < n_sets; ++k) {
      const int set = s_.sets[i][k];
      for_codes_of_set(set / 4, begin, Of::kGroups, set, warp_, Of::kWarps, int(p_.n_codes),
                       look_at);
    }
  }
  // Of the candidates of row i, in float32.
  __device__ int nearest(int stage, int i) const {
    Row residual;
    load_residual(residual, i);
    float least = kInfinity;
    int found = 0x7fffffff;
    const int count = s_.count[i];
#pragma unroll 2
    for (int k = 0; k < count; ++k) {
      const int code = s_.candidates[i][k];
      Row e;
      e.template load<kPacked>(code_at(stage, code), 0, width_);
      const float d =
          distance(p_.metric, residual, e, t_.norms + int64_t(stage) * p_.n_codes + code);
      if (nearer(d, code, least, found)) least = d, found = code;
    }
    return found < int(p_.n_codes) ? found : 0;
  }

  char* const ring_;
  const int group_, slots_;
  // Of the next tile that is this warpgroup's: its place in the ring and among norms, and in its
  // stage.
  int slot_, norms_, tile_;
  uint32_t phases_ = 0;  // of the slots
};

template <int kPieces, bool kPacked>
__global__ void __launch_bounds__(Threads<kPieces>::kAll, 1) SPARSEMOE_CLUSTER(2)
    general_kernel(const __grid_constant__ GeneralParams params) {
#if SPARSEMOE_HOPPER
  using Of = Threads<kPieces>;
  extern __shared__ __align__(1024) char memory[];
  const EncodeTilesParams& t = params.t;
  GeneralShared& s = *reinterpret_cast<GeneralShared*>(memory + params.slots * kStepBytes +
                                                       params.depths * kOperandBytes);
  if (threadIdx.x == 0) {
    for (auto& of_group : s.full) {
      for (auto& full : of_group) barrier_init(&full, 1);
    }
    for (auto& empty : s.empty) barrier_init(&empty, 4 * kCluster);  // of a warpgroup of each block
    for (auto& read : s.norms_read) barrier_init(&read, 128);        // of a warpgroup
    barriers_ready();
  }
  preparing::prepare_codes<kPieces * kWalkColumns, kPacked, Of::kAll>(t, params.depths, memory);
  find_constants(t, Of::kAll / 32, s.constants, s.scale);
  cluster_sync();
  let_next_begin();
  if (threadIdx.x < 128) {
    registers_lower_to<Of::kLoadRegisters>();
    if (threadIdx.x == 0) send_all_codes<Of::kGroups>(params, s, memory);
  } else {
    registers_raise_to<Of::kMultiplyRegisters>();
    Searcher<kPieces, kPacked>(params, s, memory).run();
  }
  cluster_sync();  // nothing is on its way to a block that has ended
#else
  __trap();
#endif
}

template <int kPieces, bool kPacked>
int launch(const EncodeTilesParams& t, int depths, void* stream) {
  const int other_bytes = depths * kOperandBytes + int(sizeof(GeneralShared));
  const int slots = std::min(kMostSlots, (kMostSharedBytes - other_bytes) / kStepBytes);
  const int bytes = slots * kStepBytes + other_bytes;
  return launch_together<general_kernel<kPieces, kPacked>, kCluster>(
      t.n_clusters(kCluster * kRows), Threads<kPieces>::kAll, bytes, stream,
      GeneralParams{t, depths, slots});
}

}  // namespace general

int encode_general(const EncodeTilesParams& t, int64_t depths, void* stream) {
  const RvqEncodeParams& p = t.p;
  const bool packed = packs_of_4<float>(p.codebooks, p.width, p.width) &&
                      packs_of_4<float>(p.x, p.width, p.x_stride);
  return with_pieces(p.width, [&](auto pieces) {
    constexpr int kPieces = decltype(pieces)::value;
    return packed ? general::launch<kPieces, true>(t, int(depths), stream)
                  : general::launch<kPieces, false>(t, int(depths), stream);
  });
}

}  // namespace hopper
}  // namespace sparsemoe
