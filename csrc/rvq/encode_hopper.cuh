// Encoding on Hopper's tensor cores: all stages of 128 or 192 vectors a block at a time, in one
// launch.
//
// The score of a code, |e|^2 - 2 r.e, is computed from half-precision residuals and codes with an
// error that is bounded for each vector. Codes within twice that bound of the best are candidates;
// where there are several, float32 distances decide. So the choice is that of exact arithmetic but
// for float32 rounding. The few vectors with more candidates than a thread keeps are left to
// encode_exact.
//
// Two blocks make a cluster; each loads half of the codes that both need. One thread of a block's
// first warpgroup keeps tiles of codes coming into a ring in shared memory. The two or three other
// warpgroups multiply, each for 64 vectors whose residuals it holds.
#pragma once

#include "common/early.cuh"
#include "rvq/encode_hopper_residuals.cuh"
#include "rvq/vector.cuh"

namespace sparsemoe {
namespace hopper {

// The three lowest scores of a thread, the code in the lowest bits of each.
struct Best {
  float first, second, third;
  __device__ void clear() { first = second = third = kInfinity; }
  __device__ void add(float v, float w) {
    const float low = fminf(v, w), high = fmaxf(v, w);
    const float x = fmaxf(first, low), y = fminf(second, high);
    first = fminf(first, low);
    second = fminf(x, y);
    third = fminf(third, fmaxf(x, y));
  }
  __device__ void add(const Best& o) {
    const float a = fmaxf(first, o.first), b = fminf(second, o.second);
    const float c = fminf(fmaxf(first, o.second), fmaxf(second, o.first));
    third = fminf(fminf(third, o.third), c);
    first = fminf(first, o.first);
    second = fminf(a, b);
  }
  __device__ void set_bits(uint32_t bits) {
    first = __uint_as_float(__float_as_uint(first) | bits);
    second = __uint_as_float(__float_as_uint(second) | bits);
    third = __uint_as_float(__float_as_uint(third) | bits);
  }
};

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
        Best best[2][2];
        score_codes(stage, best);
        int code[2];
        choose(stage, best, code);
        if (stage + 1 < int(p_.n_stages)) next_residuals(stage, code);
      }
      if (is_last_but_one<kDepths>(first, p_.n) && lane_id() == 0) {
        __threadfence();
        barrier_arrive(&s_.last_round);
      }
    }
    if (kTurns && group_ == 0) named_barrier(1, 256);
  }

 private:
  // --- scores ---

  // best[h]: of the codes of the last tile and every other before, and of the tiles between.
  __device__ void score_codes(int stage, Best (&best)[2][2]) {
    const float weight[2] = {state_[0].scale / s_.scale[stage], state_[1].scale / s_.scale[stage]};
    // In a register of each thread: the instruction that puts the code in takes no uniform one.
    const uint32_t keep = __shfl_sync(kFullWarp, ~0u << t_.index_bits, 0);
#pragma unroll
    for (int i = 0; i < 4; ++i) best[i / 2][i % 2].clear();
    const int n_tiles = int(t_.n_tiles);
    for (int tile = 0; tile < n_tiles; ++tile) {
      float sum[64];
      multiply(sum);
      end_multiply(sum);
      Best of_tile[2];
      of_tile[0].clear(), of_tile[1].clear();
      const float4* norms2 = s_.norms2[norm_tile_] + lane_id() % 4;
#pragma unroll
      for (int j = 0; j < 16; j += 2) {
        const float4 four = norms2[2 * j];
        const float norm2[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          float score[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float v = fmaf(norm2[i], weight[h], sum[4 * (j + i / 2) + 2 * h + i % 2]);
            score[i] = __uint_as_float((__float_as_uint(v) & keep) | uint32_t(2 * j + i));
          }
          of_tile[h].add(score[0], score[1]);
          of_tile[h].add(score[2], score[3]);
        }
      }
      barrier_arrive(&s_.norms_read[norm_tile_]);
      if (++norm_tile_ == kNormTiles<kDepths>) norm_tile_ = 0;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        of_tile[h].set_bits(uint32_t(tile) << 5);
        of_tile[h].add(best[h][1]);
        best[h][1] = best[h][0];
        best[h][0] = of_tile[h];
      }
    }
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

  __device__ int code_of(float score, int lane) const {
    const uint32_t index = __float_as_uint(score) & ~(~0u << t_.index_bits);
    return int((index >> 5) * kTileCodes + (index % 32 / 2) * 8 + 2 * (lane % 4) + index % 2);
  }

  // How far above the lowest score of row h that of the nearest code can be.
  __device__ float slack(int stage, int h, float lowest) const {
    const StageConstants& c = s_.constants[stage];
    const float weight = state_[h].scale / s_.scale[stage];
    const float products = state_[h].norm * c.code, norms = weight * c.norm2;
    const float rounding = state_[h].error * c.code + state_[h].norm * c.rounding;
    const float sums = (4 * kDepths + 4) * 0x1p-22f * products + 0x1p-18f * norms;
    const float index = __uint_as_float(uint32_t(127 - 23 + t_.index_bits) << 23);
    const float scores = 2 * (rounding + sums);
    return scores + 2.02f * index * (fabsf(lowest) + scores);
  }

  __device__ void choose(int stage, const Best (&best)[2][2], int (&code)[2]) {
    const int quad = lane_id() / 4 * 4;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const Best &a = best[h][0], &b = best[h][1];
      const float own = fminf(a.first, b.first);
      float lowest = fminf(own, __shfl_xor_sync(kFullWarp, own, 1));
      lowest = fminf(lowest, __shfl_xor_sync(kFullWarp, lowest, 2));
      const float limit = lowest + slack(stage, h, lowest);
      const unsigned has = __ballot_sync(kFullWarp, own == lowest) >> quad & 15;
      code[h] = __shfl_sync(kFullWarp, code_of(own, lane_id()), quad + max(__ffs(has) - 1, 0));
      // Bit 4 i + l of a quad's candidates: the i-th of these four scores, in lane l of it.
      unsigned candidates = (__ballot_sync(kFullWarp, a.first <= limit) >> quad & 15) |
                            (__ballot_sync(kFullWarp, a.second <= limit) >> quad & 15) << 4 |
                            (__ballot_sync(kFullWarp, b.first <= limit) >> quad & 15) << 8 |
                            (__ballot_sync(kFullWarp, b.second <= limit) >> quad & 15) << 12;
      const bool more = a.third <= limit || b.third <= limit;
      const bool unkept = __ballot_sync(kFullWarp, more) >> quad & 15;
      const float weight = state_[h].scale / s_.scale[stage];
      distance_[h] = sqrtf(fmaxf(state_[h].norm * state_[h].norm + limit * weight, 0.0f)) * kAbove;
      if (!state_[h].late && (!(limit < kInfinity) || (p_.exact && unkept))) {
        state_[h].late = true;
        leave(h, stage);
      }
      const bool several = p_.exact && !state_[h].late && __popc(candidates) > 1;
      unsigned rows = __ballot_sync(kFullWarp, several && lane_id() % 4 == 0);
      while (rows) {
        const int lane = __ffs(rows) - 1;
        rows &= rows - 1;
        const int found = nearest(stage, h, lane, a, b, __shfl_sync(kFullWarp, candidates, lane));
        if (quad == lane) code[h] = found;
      }
      if (state_[h].late || code[h] >= int(p_.n_codes)) code[h] = 0;
      if (lane_id() % 4 == 0 && !state_[h].late) p_.codes[row(h) * p_.n_stages + stage] = code[h];
    }
    __syncwarp();
  }

  // Of the candidates of row h of the quad from `lane` on, in float32. By the warp.
  __device__ int nearest(int stage, int h, int lane, const Best& a, const Best& b,
                         unsigned candidates) {
    const int64_t at = first_row_ - lane_id() / 4 + lane / 4 + 8 * h;
    const int width = int(p_.width);
    const int before = lane_id() < stage ? __ldcg(p_.codes + at * p_.n_stages + lane_id()) : 0;
    const auto take = [&] {
      const int bit = __ffs(candidates) - 1, source = lane + bit % 4;
      candidates &= candidates - 1;
      const float score = bit < 4 ? a.first : bit < 8 ? a.second : bit < 12 ? b.first : b.second;
      return code_of(__shfl_sync(kFullWarp, score, source), source);
    };
    Row residual, e, other;
    int code = take(), other_code = take();
    e.template load<true>(codebook(stage) + int64_t(code) * width, 0, width);
    other.template load<true>(codebook(stage) + int64_t(other_code) * width, 0, width);
    const int64_t first = at * p_.x_stride;
    if (p_.dtype == DType::f32) {
      residual.template load<true>(static_cast<const float*>(p_.x) + first, 0, width);
    } else if (p_.dtype == DType::f16) {
      residual.template load<true>(static_cast<const __half*>(p_.x) + first, 0, width);
    } else {
      residual.template load<true>(static_cast<const __nv_bfloat16*>(p_.x) + first, 0, width);
    }
#pragma unroll 2
    for (int q = 0; q < stage; ++q) {
      Row past;
      const int64_t past_code = __shfl_sync(kFullWarp, before, q);
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
    if (moves()) {
      Row difference = residual;
      difference.subtract(e);
      return warp_sum(difference.sum_of_squares());
    }
    return -warp_sum(residual.product(e)) *
           inverse_norm(__ldg(t_.norms + stage * p_.n_codes + code));
  }

  Place place_, held_;  // of the next step, and of the first that has not been released
  int norm_tile_ = 0;
};

template <int kDepths, bool kWhole>
__global__ void __launch_bounds__(Shape<kDepths>::kThreads, 1) SPARSEMOE_CLUSTER(2)
    encode_kernel(const __grid_constant__ EncodeTilesParams params) {
#if SPARSEMOE_HOPPER
  using Of = Shape<kDepths>;
  extern __shared__ __align__(1024) unsigned char memory[];
  Shared<kDepths>& s = *reinterpret_cast<Shared<kDepths>*>(memory);
  if (threadIdx.x == 0) {
    for (int i = 0; i < kSlots; ++i) {
      barrier_init(&s.full[i], 1);
      barrier_init(&s.empty[i], 8 * Of::kGroups);  // the multiplying warps of the cluster
    }
    for (auto& read : s.norms_read) barrier_init(&read, 128 * Of::kGroups);
    barrier_init(&s.last_round, 4 * Of::kGroups);
    barriers_ready();
  }
  for (int stage = warp_id(); stage < int(params.p.n_stages); stage += Of::kThreads / 32) {
    const StageConstants* of = params.constants + int64_t(stage) * (params.n_parts + 1);
    StageConstants most{};
    for (int i = lane_id(); i < int(params.n_parts); i += 32) {
      most.code = larger(most.code, of[i].code);
      most.rounding = larger(most.rounding, of[i].rounding);
      most.norm2 = larger(most.norm2, of[i].norm2);
    }
    for (int step = 16; step > 0; step /= 2) {
      most.code = larger(most.code, __shfl_xor_sync(kFullWarp, most.code, step));
      most.rounding = larger(most.rounding, __shfl_xor_sync(kFullWarp, most.rounding, step));
      most.norm2 = larger(most.norm2, __shfl_xor_sync(kFullWarp, most.norm2, step));
    }
    most.other = of[params.n_parts].other;
    s.constants[stage] = most;
    s.scale[stage] = of[params.n_parts].code;
  }
  cluster_sync();
  if (threadIdx.x < 128) {
    registers_lower_to<Of::kLoadRegisters>();
    if (threadIdx.x == 0) send_codes<kDepths>(params, s);
    if (threadIdx.x == 32) {
      // From the last round on the next kernel may read the codes of the rounds before.
      if (first_pair<kDepths>() + pair_stride<kDepths>() < params.p.n) {
        barrier_wait(&s.last_round, 0);
      }
      __threadfence();
      let_next_begin();
    }
  } else {
    registers_raise_to<Of::kMultiplyRegisters>();
    Encoder<kDepths, kWhole>(params, s).run();
  }
  cluster_sync();  // nothing is on its way to a block that has ended
#else
  __trap();
#endif
}

template <int kDepths>
int encode_tiles(const EncodeTilesParams& params, int64_t* known, void* stream) {
  const RvqEncodeParams& p = params.p;
  const auto kernel = p.width == kDepths * kTileDepth ? encode_kernel<kDepths, true>
                                                      : encode_kernel<kDepths, false>;
  const int bytes = int(sizeof(Shared<kDepths>));
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return int(error);
  constexpr int64_t kPair = 2 * Shape<kDepths>::kRows;
  const int64_t clusters =
      std::min<int64_t>(ceil_div(p.n, kPair), std::max(multiprocessors() / 2, 1));
  const int64_t last_round = std::min(p.n, clusters * kPair);
  *known = ceil_div(p.n - last_round, kPair) * kPair;
  kernel<<<unsigned(2 * clusters), Shape<kDepths>::kThreads, bytes, cudaStream_t(stream)>>>(params);
  return int(cudaGetLastError());
}

}  // namespace hopper
}  // namespace sparsemoe
