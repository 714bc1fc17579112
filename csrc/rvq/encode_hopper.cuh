// Encoding on Hopper's tensor cores: all stages of 128 or 192 vectors a block at a time, in one
// launch, which begins with the codebooks: see encode_hopper_prepare.cuh.
//
// The score of a code, |e|^2 - 2 r.e, is computed from half-precision residuals and codes with an
// error that is bounded for each vector. Codes within twice that bound of the best are candidates;
// where there are several, float32 distances decide. So the choice is that of exact arithmetic but
// for float32 rounding. Where a thread has dropped some, all codes of the set that they were of are
// looked at. Vectors with very many are left to encode_finish.
//
// Two blocks make a cluster; each loads half of the codes that both need. One thread of a block's
// first warpgroup keeps tiles of codes coming into a ring in shared memory. The two or three other
// warpgroups multiply, each for 64 vectors whose residuals it holds.
#pragma once

#include "common/early.cuh"
#include "rvq/encode_hopper_prepare.cuh"
#include "rvq/encode_hopper_residuals.cuh"
#include "rvq/encode_hopper_scores.cuh"
#include "rvq/vector.cuh"

namespace sparsemoe {
namespace hopper {

template <int kDepths, bool kWhole>
class Encoder : Residuals<kDepths, kWhole> {
  using Base = Residuals<kDepths, kWhole>;
  using Base::codebook;
  using Base::distance_;
  using Base::first_row_;
  using Base::group_;
  using Base::leave;
  using Base::load_rows;
  using Base::moves;
  using Base::next_residuals;
  using Base::p_;
  using Base::row;
  using Base::s_;
  using Base::state_;
  using Base::t_;
  using Base::upper_;
  using Of = Shape<kDepths>;
  static constexpr bool kTurns = Of::kGroups == 2;

 public:
  using Base::Base;

  __device__ void run() {
    if (kTurns && group_ == 1) named_barrier_arrive(1, 256);  // the first turn is the other's
    for (int64_t first = first_pair<kDepths>(); first < p_.n; first += pair_stride<kDepths>()) {
      const int in_pair = cluster_rank() * Of::kRows + group_ * 64 + warp_id() % 4 * 16;
      load_rows(first + in_pair + lane_id() / 4);
      for (int stage = 0; stage < int(p_.n_stages); ++stage) {
        Kept kept[2];
        score_codes(stage, kept);
        int code[2];
        choose(stage, kept, code);
        if (stage + 1 < int(p_.n_stages)) next_residuals(stage, code);
      }
    }
    if (kTurns && group_ == 0) named_barrier(1, 256);
  }

 private:
  // --- scores ---

  __device__ void score_codes(int stage, Kept (&kept)[2]) {
    const float weight[2] = {state_[0].scale / s_.scale[stage], state_[1].scale / s_.scale[stage]};
    const float range[2] = {this->range(stage, 0), this->range(stage, 1)};
    const float base[2] = {kBase * range[0], kBase * range[1]};
    // In a register, and nothing that the compiler knows: it would shift, see kIndexBits.
    const uint32_t to_index = __shfl_sync(kFullWarp, 1u << kIndexBits, 0);
    const int n_tiles = int(t_.n_tiles);
    for (int tile = 0; tile < n_tiles; ++tile) {
      float sum[64];
      multiply(sum);
      end_multiply(sum);
      if (tile + 1 == n_tiles) leave_out_padding(int(p_.n_codes), n_tiles, range, sum);
      Best of_tile[2];
      score_tile(sum, s_.norms2[norm_tile_] + lane_id() % 4, weight, base, to_index, of_tile);
      barrier_arrive(&s_.norms_read[norm_tile_]);
      if (++norm_tile_ == kNormTiles<kDepths>) norm_tile_ = 0;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        of_tile[h].set_bits(uint32_t(tile) << 5);
        kept[h].add(of_tile[h]);
      }
    }
  }
  __device__ float range(int stage, int h) const {
    const float weight = state_[h].scale / s_.scale[stage];
    return range_of_scores(state_[h].norm, state_[h].error, weight, s_.constants[stage]);
  }
  // Begins to multiply by the next tile. Two warpgroups take turns, the next from the middle of the
  // last on, so that one looks at its scores while the other multiplies; three need not be told.
  __device__ void multiply(float (&sum)[64]) {
    if (kTurns) named_barrier(1 + group_, 256);
    held_ = place_;
    barrier_wait(&s_.full[place_.index], place_.phase);
#pragma unroll
    for (int i = 0; i < 4 * kDepths; ++i) {
      if (i % 4 == 0) products_begin();
      const uint64_t b = matrix_descriptor(s_.codes[place_.index], 16, 1024);
      product_128(sum, upper_[i], b + 2 * (i % 4), i > 0);
      if (i % 4 == 3) {
        products_commit();
        place_.advance();
        if (i + 1 < 4 * kDepths) barrier_wait(&s_.full[place_.index], place_.phase);
      }
      if (kTurns && i == 2 * kDepths - 1) named_barrier_arrive(2 - group_, 256);
      if (i % 4 == 3 && i > 4) {
        products_wait<1>();
        release(held_.index);
        held_.advance();
      }
    }
  }
  __device__ void end_multiply(float (&sum)[64]) {
    products_wait<0>();
#pragma unroll
    for (int i = 0; i < 64; ++i) products_give(sum[i]);
    release(held_.index);
    held_.advance();
  }
  __device__ void release(int slot) {
    __syncwarp();
    if (lane_id() < 2) barrier_arrive_at(&s_.empty[slot], lane_id());
  }

  // --- choosing ---

  __device__ static int code_of(uint32_t score, int lane) {
    return int((score & kAllIndexBits) >> 5) * int(kTileCodes) + code_in_tile(score, lane);
  }

  __device__ float slack(int stage, int h) const {
    const float weight = state_[h].scale / s_.scale[stage];
    return slack_of_scores(state_[h].norm, state_[h].error, weight, s_.constants[stage],
                           4 * kDepths, range(stage, h));
  }

  __device__ void choose(int stage, const Kept (&kept)[2], int (&code)[2]) {
    const int quad = lane_id() / 4 * 4;
    unsigned candidates[2], sets[2];
    bool several[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const uint32_t own = kept[h].lowest();
      uint32_t lowest = min(own, __shfl_xor_sync(kFullWarp, own, 1));
      lowest = min(lowest, __shfl_xor_sync(kFullWarp, lowest, 2));
      const float above = slack(stage, h), unit = range(stage, h) * 0x1p-20f;
      const uint32_t limit = highest_candidate(lowest, above, unit);
      const unsigned has = __ballot_sync(kFullWarp, own == lowest) >> quad & 15;
      code[h] = __shfl_sync(kFullWarp, code_of(own, lane_id()), quad + max(__ffs(has) - 1, 0));
      candidates[h] = 0;  // bit 4 i + l: the i-th of these scores, in lane l of the quad
#pragma unroll
      for (int i = 0; i < 2 * kSets; ++i) {
        const bool close = kept[h].scores[i] <= limit;
        candidates[h] |= (__ballot_sync(kFullWarp, close) >> quad & 15) << 4 * i;
      }
      const float weight = state_[h].scale / s_.scale[stage];
      bool too_many = false;
      sets[h] = 0;
      if (p_.exact && __any_sync(kFullWarp, kept[h].dropped <= limit)) {
        const unsigned own_sets = kept[h].sets_that_dropped(limit);
#pragma unroll
        for (int i = 0; i < kSets; ++i) {
          const bool dropped = own_sets >> i & 1;
          sets[h] |= (__ballot_sync(kFullWarp, dropped) >> quad & 15) << 4 * i;
        }
        const float noise = noise_of_distances(state_[h].norm, weight, range(stage, h));
        too_many = __popc(sets[h]) > kMostSets || (sets[h] && moves() && above < noise);
      }
      const float highest = (int(lowest >> kIndexBits) - 0x100000) * unit + above;
      distance_[h] =
          sqrtf(fmaxf(state_[h].norm * state_[h].norm + highest * weight, 0.0f)) * kAbove;
      if (!state_[h].late && (!(above < kMostSlack) || too_many)) {
        state_[h].late = true;
        leave(h, stage);
      }
      several[h] = p_.exact && !state_[h].late && __popc(candidates[h]) > 1;
    }
    if (p_.exact) choose_nearest(stage, kept, candidates, sets, several, code);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (state_[h].late || code[h] >= int(p_.n_codes)) code[h] = 0;
      if (lane_id() % 4 == 0 && !state_[h].late) p_.codes[row(h) * p_.n_stages + stage] = code[h];
    }
    __syncwarp();
  }

  // Where there are several candidates, the nearest of them. The warps of the warpgroup share the
  // vectors.
  __device__ void choose_nearest(int stage, const Kept (&kept)[2], const unsigned (&candidates)[2],
                                 const unsigned (&sets)[2], const bool (&several)[2],
                                 int (&code)[2]) {
    const int warp = warp_id() % 4, quad = lane_id() / 4;
    Candidates& shared = s_.passing[group_].candidates;
    named_barrier(3 + group_, 128);  // `passing` has been read
    unsigned rows = 0;               // bit 4 quad + h, and 2 further where there are sets
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      rows |= (__ballot_sync(kFullWarp, several[h]) & 0x11111111) << h;
      rows |= (__ballot_sync(kFullWarp, several[h] && sets[h]) & 0x11111111) << (2 + h);
      if (!several[h]) continue;
      const int place = 16 * warp + quad + 8 * h;
#pragma unroll
      for (int i = 0; i < 2 * kSets; ++i) {
        shared.codes[place][4 * i + lane_id() % 4] = code_of(kept[h].scores[i], lane_id());
      }
      for (int q = lane_id() % 4; q < stage; q += 4) {
        shared.before[place][q] = __ldcg(p_.codes + row(h) * p_.n_stages + q);
      }
      shared.mask[place] = candidates[h], shared.sets[place] = sets[h];
    }
    if (lane_id() == 0) s_.several[group_][warp] = rows;
    named_barrier(3 + group_, 128);
    unsigned of_warp[4], any = 0;
#pragma unroll
    for (int w = 0; w < 4; ++w) of_warp[w] = s_.several[group_][w], any |= of_warp[w];
    if (any == 0) return;
    int at = 0;  // of all
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      for (unsigned left = of_warp[w] & 0x33333333; left; left &= left - 1, ++at) {
        if (at % 4 != warp) continue;
        const int bit = __ffs(left) - 1, place = 16 * w + bit / 4 + 8 * (bit % 4);
        const int64_t row = first_row_ - quad - 16 * warp + place;
        const int found = nearest(stage, row, shared, place);
        if (lane_id() == 0) s_.nearest[group_][place] = found;
      }
    }
    named_barrier(3 + group_, 128);
    if (any & 0xcccccccc) look_at_sets(stage, shared);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (several[h]) code[h] = s_.nearest[group_][16 * warp + quad + 8 * h];
    }
  }

  // Where vectors have sets: the nearest of what has been found and of the sets' codes, which the
  // warps share.
  __device__ void look_at_sets(int stage, Candidates& shared) {
    const int warp = warp_id() % 4, lane = lane_id();
#pragma unroll 1
    for (int w = 0; w < 4; ++w) {
#pragma unroll 1
      for (unsigned left = s_.several[group_][w] >> 2 & 0x33333333; left; left &= left - 1) {
        const int bit = __ffs(left) - 1, place = 16 * w + bit / 4 + 8 * (bit % 4);
        const int64_t row = first_row_ - lane / 4 - 16 * warp + place;
        float least = kInfinity;
        int found = s_.nearest[group_][place];
        nearest_of_sets(stage, row, shared, place, least, found);
        if (lane == 0) shared.least[warp] = least, shared.found[warp] = found;
        named_barrier(3 + group_, 128);
        least = shared.least[lane % 4], found = shared.found[lane % 4];
        least_of(least, found, 4);
        if (threadIdx.x % 128 == 0) s_.nearest[group_][place] = found;
        named_barrier(3 + group_, 128);
      }
    }
  }
  // Of the code found so far, and of the warp's share of those of the sets.
  __device__ void nearest_of_sets(int stage, int64_t at, const Candidates& shared, int place,
                                  float& least, int& found) const {
    const int width = int(p_.width);
    Row residual;
    with_vector_type(p_.dtype, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      const T* x = static_cast<const T*>(p_.x) + at * p_.x_stride;
      residual.template load<true>(x, 0, width);
    });
#pragma unroll 1
    for (int q = 0; q < stage; ++q) {
      Row past;
      past.template load<true>(codebook(q) + int64_t(shared.before[place][q]) * width, 0, width);
      residual.subtract(past);
    }
    const auto look_at = [&](int code) {
      Row e;
      e.template load<true>(codebook(stage) + int64_t(code) * width, 0, width);
      const float d = distance(stage, code, e, residual);
      if (nearer(d, code, least, found)) least = d, found = code;
    };
    look_at(min(found, int(p_.n_codes) - 1));
#pragma unroll 1
    for (unsigned sets = shared.sets[place]; sets; sets &= sets - 1) {
      const int bit = __ffs(sets) - 1;
      for_codes_of_set(int(t_.n_tiles) - 1 - bit / 4, 0, 1, bit, warp_id() % 4, 4, int(p_.n_codes),
                       look_at);
    }
  }
  // Of the candidates of a vector, in float32. By the warp.
  __device__ int nearest(int stage, int64_t at, const Candidates& shared, int place) const {
    const int width = int(p_.width);
    unsigned candidates = shared.mask[place];
    const auto take = [&] {
      const int bit = __ffs(candidates) - 1;
      candidates &= candidates - 1;
      return int(shared.codes[place][bit]);
    };
    Row residual, e, other;
    int code = take(), other_code = take();
    e.template load<true>(codebook(stage) + int64_t(code) * width, 0, width);
    other.template load<true>(codebook(stage) + int64_t(other_code) * width, 0, width);
    const int64_t first = at * p_.x_stride;
    with_vector_type(p_.dtype, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      residual.template load<true>(static_cast<const T*>(p_.x) + first, 0, width);
    });
#pragma unroll 2
    for (int q = 0; q < stage; ++q) {
      Row past;
      const int64_t past_code = shared.before[place][q];
      past.template load<true>(codebook(q) + past_code * width, 0, width);
      residual.subtract(past);
    }
    float least = distance(stage, code, e, residual);
    int found = least < kInfinity ? code : 0x7fffffff;
    while (true) {
      const float d = distance(stage, other_code, other, residual);
      if (nearer(d, other_code, least, found)) least = d, found = other_code;
      if (!candidates) return found;
      other_code = take();
      other.template load<true>(codebook(stage) + int64_t(other_code) * width, 0, width);
    }
  }
  using Row = Columns<Of::kPieces>;
  __device__ float distance(int stage, int code, const Row& e, const Row& residual) const {
    return sparsemoe::distance(p_.metric, residual, e, t_.norms + stage * p_.n_codes + code);
  }

  Place place_, held_;  // of the next step, and of the first that has not been released
  int norm_tile_ = 0;
};

template <int kDepths, bool kWhole>
__global__ void __launch_bounds__(Shape<kDepths>::kThreads, 1) SPARSEMOE_CLUSTER(2)
    encode_kernel(const __grid_constant__ EncodeTilesParams params) {
#if SPARSEMOE_HOPPER
  using Of = Shape<kDepths>;
  constexpr int kMostWidth = kDepths <= 2 ? 128 : kDepths <= 4 ? 256 : 512;
  extern __shared__ __align__(1024) unsigned char memory[];
  Shared<kDepths>& s = *reinterpret_cast<Shared<kDepths>*>(memory);
  if (threadIdx.x == 0) {
    for (int i = 0; i < kSlots; ++i) {
      barrier_init(&s.full[i], 1);
      barrier_init(&s.empty[i], 8 * Of::kGroups);  // the multiplying warps of the cluster
    }
    for (auto& read : s.norms_read) barrier_init(&read, 128 * Of::kGroups);
    barriers_ready();
  }
  preparing::prepare_codes<kMostWidth, true, Of::kThreads>(params, kDepths, s.codes);
  find_constants(params, Of::kThreads / 32, s.constants, s.scale);
  cluster_sync();
  let_next_begin();
  if (threadIdx.x < 128) {
    registers_lower_to<Of::kLoadRegisters>();
    if (threadIdx.x == 0) send_codes<kDepths>(params, s);
  } else {
    registers_raise_to<Of::kMultiplyRegisters>();
    Encoder<kDepths, kWhole>(params, s).run();
  }
  cluster_sync();  // nothing is on its way to a block that has ended
#else
  __trap();
#endif
}

template <int kDepths, bool kWhole>
int launch_tiles(const EncodeTilesParams& params, void* stream) {
  return launch_together<encode_kernel<kDepths, kWhole>, 2>(
      params.n_clusters(2 * Shape<kDepths>::kRows), Shape<kDepths>::kThreads,
      int(sizeof(Shared<kDepths>)), stream, params);
}
template <int kDepths>
int encode_tiles(const EncodeTilesParams& params, void* stream) {
  return params.p.width == kDepths * kTileDepth ? launch_tiles<kDepths, true>(params, stream)
                                                : launch_tiles<kDepths, false>(params, stream);
}

}  // namespace hopper
}  // namespace sparsemoe
