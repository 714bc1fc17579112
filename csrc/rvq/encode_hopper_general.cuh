// The vectors of a block of encode_general and their residuals, and how codes come to it.
#pragma once

#include "rvq/encode_hopper_ring.cuh"
#include "rvq/encode_hopper_scores.cuh"
#include "rvq/encode_kernels.h"
#include "rvq/residuals.cuh"
#include "rvq/scale.cuh"
#include "rvq/vector.cuh"

namespace sparsemoe {
namespace hopper {
namespace general {

constexpr int kRows = 64, kCluster = 2, kMostSlots = 8, kNorms = 12;
constexpr int kMostCandidates = 16;                 // of a vector
constexpr int kPieceTiles = 1 << (kIndexBits - 5);  // of a warpgroup, that a score can tell apart
constexpr int kOperandBytes = kRows * int(kTileDepth) * 2;

// In registers a warp holds so many whole vectors, of kPieces x 128 columns, at a time.
template <int kPieces>
struct Threads {
  static constexpr int kGroups = kPieces >= 4 ? 2 : 3, kAll = 128 * (1 + kGroups);
  static constexpr int kWarps = 4 * kGroups, kMultiplying = 128 * kGroups;
  static_assert(kNorms % kGroups == 0, "their turns go round with the norms");
  static constexpr int kBatch = kPieces == 8 ? 1 : 2;
  static constexpr int kLoadRegisters = 24, kMultiplyRegisters = kGroups == 3 ? 160 : 240;
};

// Of a vector before a stage.
struct State {
  float weight, range, slack, noise;  // of scores, see there
  bool left;                          // to other kernels, or no vector at all
};

// After the ring, slots x [128 codes, 64 columns], and operands, depths x [64 rows, 64 columns].
struct GeneralShared {
  float4 norms2[kNorms][kTileCodes / 4];
  // A warpgroup has its own of `full`: it may not see how often others' codes came between.
  uint64_t full[3][kMostSlots], empty[kMostSlots];
  uint64_t norms_read[kNorms];
  StageConstants constants[kMostGeneralStages];
  float scale[kMostGeneralStages];
  State states[kRows];
  uint32_t lowest[3][kRows];  // of each warpgroup
  int count[kRows], candidates[kRows][kMostCandidates];
  // Of which all codes are candidates, too: 4 times the last tile, and the lane of four.
  int n_sets[kRows], sets[kRows][kMostSets];
  float least[12];  // what each warp has found in sets of one of them
  int found[12];
  int before[kRows];  // the nearest of the codes already looked at
  uint32_t before_score[kRows];
};

struct GeneralParams {
  EncodeTilesParams t;
  int depths, slots;
};

// A place in a ring of so many.
struct RingPlace {
  int size, index = 0;
  uint32_t phase = 0;
  __device__ explicit RingPlace(int size) : size(size) {}
  __device__ void advance() {
    if (++index == size) index = 0, phase ^= 1;
  }
};

// The vectors of a cluster, and those of all clusters.
__device__ inline int64_t first_of_cluster() {
  return int64_t(blockIdx.x / kCluster) * (kCluster * kRows);
}
__device__ inline int64_t cluster_stride() { return int64_t(gridDim.x) * kRows; }

template <int kGroups>
__device__ void send_all_codes(const GeneralParams& params, GeneralShared& s, char* ring) {
  const EncodeTilesParams& t = params.t;
  constexpr int kPart = kStepBytes / kCluster;
  constexpr uint32_t kNormBytes = 4 * kTileCodes;
  const int part = cluster_rank() * kPart;
  const int64_t n_tiles = t.p.n_stages * t.n_tiles;
  RingPlace place(params.slots), norms(kNorms), group(kGroups);
  for (int64_t first = first_of_cluster(); first < t.p.n; first += cluster_stride()) {
    const char* from = static_cast<const char*>(t.tiles) + part;
    for (int64_t tile = 0; tile < n_tiles; ++tile, group.advance()) {
      for (int depth = 0; depth < params.depths; ++depth, from += kStepBytes) {
        barrier_wait(&s.empty[place.index], place.phase ^ 1);
        uint64_t* const full = &s.full[group.index][place.index];
        barrier_arrive_expecting(full, kStepBytes + (depth ? 0 : kNormBytes));
        if (depth == 0) {
          barrier_wait(&s.norms_read[norms.index], norms.phase ^ 1);
          copy_bulk(s.norms2[norms.index], t.norms2 + tile * kTileCodes, kNormBytes, full);
          norms.advance();
        }
        copy_bulk_to_both(ring + place.index * kStepBytes + part, from, kPart, full);
        place.advance();
      }
    }
  }
}

template <int kPieces, bool kPacked>
class Residuals {
 public:
  __device__ Residuals(const GeneralParams& params, GeneralShared& s, char* operands)
      : t_(params.t),
        p_(params.t.p),
        s_(s),
        operands_(operands),
        depths_(params.depths),
        warp_(warp_id() - 4),
        width_(int(p_.width)) {}

 protected:
  using Of = Threads<kPieces>;
  using Row = Columns<kPieces>;

  // Of the multiplying warpgroups: what was written to shared memory is there, for products too.
  __device__ void all_meet() {
    fence_async_proxy();
    named_barrier(1, Of::kMultiplying);
  }
  __device__ bool moves() const { return p_.metric == Metric::l2; }
  __device__ const float* code_at(int stage, int code) const {
    return static_cast<const float*>(p_.codebooks) + (int64_t(stage) * p_.n_codes + code) * width_;
  }
  // From the lane's first column on; others are kWalkColumns further.
  __device__ float4* residual_at(int i) const {
    const int64_t row = int64_t(blockIdx.x) * kRows + i;
    return reinterpret_cast<float4*>(t_.residuals + row * depths_ * kTileDepth) + lane_id();
  }

  // --- row i is the affair of warp i % kWarps ---

  static constexpr int kBatch = Of::kBatch, kSame = 32 / kBatch;  // lanes that sum for a row
  __device__ static int row_of(int first, int b) { return first + b * Of::kWarps; }

  // Residuals before the first stage, or after `stage`.
  __device__ void next_residuals(int stage) {
    for (int first = warp_; first < kRows; first += kBatch * Of::kWarps) {
      Row residual[kBatch], nearest[kBatch];
      int code[kBatch];
      bool there[kBatch];
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const int i = row_of(first, b);
        there[b] = i < kRows && (stage < 0 || (!s_.states[i].left && separated(i)));
        code[b] = there[b] && stage >= 0 ? s_.candidates[i][0] : 0;
      }
      if (stage < 0) {
        with_vector_type(p_.dtype, [&](auto* type) {
          using T = std::remove_pointer_t<decltype(type)>;
#pragma unroll
          for (int b = 0; b < kBatch; ++b) {
            const int64_t row = min(first_row_ + row_of(first, b), p_.n - 1);
            const T* from = static_cast<const T*>(p_.x) + row * p_.x_stride;
            residual[b].template load<kPacked, true>(from, 0, width_);
          }
        });
      } else {
        if (stage + 1 < int(p_.n_stages)) {
#pragma unroll
          for (int b = 0; b < kBatch; ++b) {
            load_residual(residual[b], min(row_of(first, b), kRows - 1));
            nearest[b].template load<kPacked>(code_at(stage, code[b]), 0, width_);
          }
        }
        __syncwarp();
#pragma unroll
        for (int b = 0; b < kBatch; ++b) {
          const int i = row_of(first, b);
          if (lane_id() != 0 || i >= kRows) continue;
          if (there[b]) p_.codes[(first_row_ + i) * p_.n_stages + stage] = code[b];
          if (!separated(i)) leave(i, stage);
        }
        if (stage + 1 == int(p_.n_stages)) continue;
#pragma unroll
        for (int b = 0; b < kBatch; ++b) residual[b].subtract(nearest[b]);
      }
      keep(first, stage + 1, residual, there);
    }
  }
  __device__ void load_residual(Row& to, int i) const {
    const float4* from = residual_at(i);
#pragma unroll
    for (int k = 0; k < kPieces; ++k) {
      const bool inside = kWalkColumns * k + 4 * lane_id() < width_;
      to.v[k] = inside ? from[kWalkColumns / 4 * k] : make_float4(0, 0, 0, 0);
    }
  }
  // The residuals before `stage` of the rows that are there.
  __device__ void keep(int first, int stage, Row (&residual)[kBatch], const bool (&there)[kBatch]) {
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      if (!there[b]) continue;
      float4* const to = residual_at(row_of(first, b));
#pragma unroll
      for (int k = 0; k < kPieces; ++k) {
        if (kWalkColumns * k + 4 * lane_id() < width_) to[kWalkColumns / 4 * k] = residual[b].v[k];
      }
    }
    if (moves() && s_.constants[stage].other > 0) {
      const int padded = depths_ * int(kTileDepth);
      Row center;
      center.load_changing(t_.centers + int64_t(stage) * padded, 0, padded);
#pragma unroll
      for (int b = 0; b < kBatch; ++b) residual[b].subtract(center);
    }
    float sums[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) sums[b] = residual[b].sum_of_squares();
    const float norm = sqrtf(warp_sums(sums)) * kAbove;
    const float scale = kRowScale * power_of_two_below_8(norm);
    bool own = false;  // whether the row of the lane is there
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const float scale_of_row = __shfl_sync(kFullWarp, scale, b * kSame);
      sums[b] = there[b] ? put(row_of(first, b), scale_of_row, residual[b]) : 0.0f;
      if (lane_id() / kSame == b) own = there[b];
    }
    const float error = sqrtf(warp_sums(sums)) * kAbove;
    __syncwarp();
    if (lane_id() % kSame == 0 && own) {
      note(row_of(first, lane_id() / kSame), stage, scale, scale * norm, error);
    }
  }
  // A row as an operand; what rounding took from it, squared and summed over the lane's columns.
  __device__ float put(int i, float scale, const Row& residual) {
    // Columns lie as prepare_parts puts them: each two, and the next two in the other of two
    // chunks.
    const int lane = lane_id(), chunk = (lane / 8 % 2 * 4 + lane % 2 * 2) ^ (i % 8);
    const int at = lane / 16 * kOperandBytes + i * 128 + chunk * 16 + lane / 2 % 4 * 4;
    char* const to[2] = {operands_ + at, operands_ + (at ^ 16)};
    float error2 = 0;
#pragma unroll
    for (int k = 0; k < kPieces; ++k) {
      if (kWalkColumns * k + 4 * lane >= depths_ * int(kTileDepth)) break;
      const float4 v = scale * residual.v[k];
      const __half2 a = __floats2half2_rn(v.x, v.y), b = __floats2half2_rn(v.z, v.w);
      const float2 seen_a = __half22float2(a), seen_b = __half22float2(b);
      error2 += squares(v - make_float4(seen_a.x, seen_a.y, seen_b.x, seen_b.y));
      *reinterpret_cast<__half2*>(to[0] + 2 * k * kOperandBytes) = a;
      *reinterpret_cast<__half2*>(to[1] + 2 * k * kOperandBytes) = b;
    }
    return error2;
  }
  // What is known of row i before `stage`; all is scaled, the error is of what the tensor cores
  // see.
  __device__ void note(int i, int stage, float scale, float norm, float error) {
    const StageConstants& c = s_.constants[stage];
    const float weight = scale / s_.scale[stage];
    error += norm * 0x1p-22f;
    const float range = range_of_scores(norm, error, weight, c);
    const float slack = slack_of_scores(norm, error, weight, c, 4 * depths_, range);
    const float noise = moves() ? noise_of_distances(norm, weight, range) : 0.0f;
    const bool none = first_row_ + i >= p_.n;
    s_.states[i] = {weight, range, norm < kMostNorm ? slack : kInfinity, noise, none};
  }
  // Whether the candidates of row i are known; of one that is left, it makes no difference.
  __device__ bool separated(int i) const {
    return s_.states[i].left || (s_.count[i] > 0 && s_.count[i] <= kMostCandidates);
  }
  // Row i is for encode_finish, from this stage on.
  __device__ void leave(int i, int stage) {
    const int64_t row = first_row_ + i;
    const int at = atomicAdd(t_.late, 1);
    t_.late[2 + 2 * at] = int32_t(row);
    t_.late[3 + 2 * at] = stage;
    for (int q = stage; q < int(p_.n_stages); ++q) p_.codes[row * p_.n_stages + q] = kLeft;
    s_.states[i].left = true;
  }

  const EncodeTilesParams& t_;
  const RvqEncodeParams& p_;
  GeneralShared& s_;
  char* const operands_;
  const int depths_, warp_, width_;
  int64_t first_row_ = 0;
};

}  // namespace general
}  // namespace hopper
}  // namespace sparsemoe
