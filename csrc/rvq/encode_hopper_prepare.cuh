// Codebooks as the kernels on Hopper's tensor cores read them: tiles of codes in half precision,
// and what they are wrong by. Made at the start of those kernels.
#pragma once

#include "common/hopper.cuh"
#include "common/together.cuh"
#include "rvq/block_groups.cuh"
#include "rvq/encode_hopper.h"
#include "rvq/encode_kernels.h"
#include "rvq/encode_workspace.h"
#include "rvq/residuals.cuh"
#include "rvq/scale.cuh"

namespace sparsemoe {
namespace hopper {
namespace preparing {

// threadIdx.x, but not in a register that the rest of the kernel would then have to keep.
__device__ inline int thread_id() {
  int id;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(id));
  return id;
}

// A part of a tile of codes is prepared by a team: all threads of a block, or each half of 512.
template <int kBlockThreads>
struct Team {
  static constexpr int kTeams = kBlockThreads == 512 ? 2 : 1, kThreads = kBlockThreads / kTeams;
  static constexpr int kWarps = kThreads / 32;
  __device__ static int own() { return kTeams == 1 ? 0 : thread_id() / kThreads; }
};
constexpr int kTeamBarrier = 8;  // and one more: not those of the search
constexpr int kSamples = 4;      // of a warp

template <int kMostWidth, int kWarps>
struct Shared {
  float center[kMostWidth], part_of_center[kWarps][kMostWidth];
  float largest[kWarps][3];
};

__device__ inline void forget_codes(const RvqEncodeParams& p) {
  const int64_t total = p.n * p.n_stages, threads = int64_t(gridDim.x) * blockDim.x;
  const int64_t thread = int64_t(blockIdx.x) * blockDim.x + thread_id();
  for (int64_t i = thread; i < (total + 3) / 4; i += threads) {  // codes begin on packs of four
    if (4 * i + 4 <= total) {
      reinterpret_cast<int4*>(p.codes)[i] = make_int4(kUnknown, kUnknown, kUnknown, kUnknown);
    } else {
      for (int64_t j = 4 * i; j < total; ++j) p.codes[j] = kUnknown;
    }
  }
}

// The parts from `begin` to `end` of all stages. Codes are moved by a center, which cancels in
// differences of distances, and by a power of two to norms below 8, give or take: both from a
// sample of the codes. Any center and scale is right; good ones keep the errors of the scores
// small. All that is read is asked for at once, where registers hold it.
template <int kMostWidth, bool kPacked, class Of>
__device__ void prepare_parts(const EncodeTilesParams& params, int depths, int begin, int end,
                              Shared<kMostWidth, Of::kWarps>& s) {
  constexpr int kTeam = Of::kThreads, kWarps = Of::kWarps;
  const RvqEncodeParams& p = params.p;
  const int n_codes = int(p.n_codes), width = int(p.width), padded = depths * int(kTileDepth);
  const int thread = thread_id() - Of::own() * kTeam, warp = thread / 32, lane = thread % 32;
  const auto team_meets = [] { named_barrier(kTeamBarrier + Of::own(), kTeam); };
  const bool cosine = p.metric == Metric::cosine;
  float scale = 0, center_norm2 = 0;  // of the stage
  for (int at = begin; at < end; ++at) {
    const int stage = at / int(params.n_parts), part = at % int(params.n_parts);
    const float* codebook =
        static_cast<const float*>(p.codebooks) + int64_t(stage) * n_codes * width;

    // Of each code, lane l has columns 8 l .. 8 l + 7, and every 256 further.
    constexpr int kOwn = (int(kPartCodes) + kWarps - 1) / kWarps;
    constexpr int kChunks = kMostWidth > 256 ? kMostWidth / 256 : 1;
    const int first = part * int(kPartCodes) + warp * kOwn;
    const int last = min(first + kOwn, (part + 1) * int(kPartCodes));
    struct Own {
      float4 v[kChunks][2];
    };
    const auto load_own = [&](int code) {
      Own own;
      const float* row = codebook + int64_t(min(code, n_codes - 1)) * width;
#pragma unroll
      for (int c = 0; c < 2 * kChunks; ++c) {
        own.v[c / 2][c % 2] = load4<kPacked>(row, 256 * (c / 2) + 8 * lane + 4 * (c % 2), width);
      }
      return own;
    };
    constexpr bool kRoom = kMostWidth <= 512;  // in registers, for what is asked for early
    Own next;
    if (kRoom) next = load_own(first);
    if (at == begin || part == 0) {
      const int n_samples = min(n_codes, kWarps * kSamples);
      Columns<kMostWidth / kWalkColumns> sample[kSamples], sum;
      sum.clear();
#pragma unroll
      for (int i = 0; i < kSamples; ++i) {
        const int row = min(warp * kSamples + i, n_samples - 1);
        sample[i].template load<kPacked>(codebook + int64_t(row) * n_codes / n_samples * width, 0,
                                         width);
      }
      float norms2[kSamples];
      if (cosine) {
#pragma unroll
        for (int i = 0; i < kSamples; ++i) norms2[i] = sample[i].sum_of_squares();
        const float to_1 = inverse_norm(sqrtf(warp_sums(norms2)));
#pragma unroll
        for (int i = 0; i < kSamples; ++i) {
          sample[i].scale(__shfl_sync(kFullWarp, to_1, i * (32 / kSamples)));
        }
      }
#pragma unroll
      for (int i = 0; i < kSamples; ++i) {
        if (warp * kSamples + i < n_samples) sum.add(sample[i]);
      }
      sum.template store<true>(s.part_of_center[warp], 0, kMostWidth);
      team_meets();
      for (int d = thread; d < kMostWidth; d += kTeam) {
        float of_all = 0;
        for (int w = 0; w < kWarps; ++w) of_all += s.part_of_center[w][d];
        of_all /= n_samples;
        s.center[d] = isfinite(of_all) ? of_all : 0.0f;
      }
      team_meets();
      Columns<kMostWidth / kWalkColumns> middle;
      middle.load_changing(s.center, 0, kMostWidth);
      center_norm2 = warp_sum(middle.sum_of_squares());
#pragma unroll
      for (int i = 0; i < kSamples; ++i) {
        sample[i].subtract(middle);
        norms2[i] = sample[i].sum_of_squares();
      }
      float most = warp_max(sqrtf(warp_sums(norms2)));
      if (lane == 0) s.largest[warp][0] = most;
      team_meets();
      most = s.largest[0][0];
      for (int w = 1; w < kWarps; ++w) most = fmaxf(most, s.largest[w][0]);
      scale = power_of_two_below_8(most);
      team_meets();
      if (2 * sqrtf(center_norm2) <= most) {  // little would be gained: none costs less
        for (int d = thread; d < kMostWidth; d += kTeam) s.center[d] = 0;
        center_norm2 = 0;
        team_meets();
      }
    }
    StageConstants* constants = params.constants + int64_t(stage) * (params.n_parts + 1);
    if (part == 0) {
      for (int d = thread; d < padded; d += kTeam) {
        params.centers[int64_t(stage) * padded + d] = s.center[d];
      }
      if (thread == 0) {
        constants[params.n_parts] = {scale, 0, 0, sqrtf(center_norm2) * kAbove};
      }
    }

    if (!kRoom) next = load_own(first);
    float most = 0;  // of what is summed below
    const int tile = part / int(kTileCodes / kPartCodes);
    uint16_t* const tiles =
        static_cast<uint16_t*>(params.tiles) +
        (int64_t(stage) * params.n_tiles + tile) * depths * kTileCodes * kTileDepth;
#pragma unroll 1
    for (int code = first; code < last; ++code) {
      const Own own = next;
      if (code + 1 < last) next = load_own(code + 1);
      const int in_tile = code % int(kTileCodes);
      float factor = scale;
      if (cosine && code < n_codes) {
        float sum = 0;
#pragma unroll
        for (int c = 0; c < 2 * kChunks; ++c) sum += squares(own.v[c / 2][c % 2]);
        const float norm = sqrtf(warp_sum(sum));
        if (lane == 0) params.norms[int64_t(stage) * n_codes + code] = norm;
        factor *= inverse_norm(norm);
      }
      float norm2 = 0, seen2 = 0, rounding2 = 0;
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        const int chunk = 32 * c + lane;
        if (chunk >= padded / 8) break;
        float4 v[2];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int d = 8 * chunk + 4 * j;
          v[j] = make_float4(0, 0, 0, 0);
          if (code < n_codes && d < width) {
            v[j] = factor * own.v[c][j] - scale * *reinterpret_cast<const float4*>(s.center + d);
          }
          norm2 += squares(v[j]);
        }
        const float e[8] = {v[0].x, v[0].y, v[0].z, v[0].w, v[1].x, v[1].y, v[1].z, v[1].w};
        // The columns 8 c .. 8 c + 7 of each 32 go where lane c of four has its elements of the two
        // products of 16 columns; chunks of 16 bytes are swizzled as Hopper reads them.
        uint32_t* to = reinterpret_cast<uint32_t*>(tiles + (chunk / 8) * kTileCodes * kTileDepth +
                                                   in_tile * kTileDepth);
#pragma unroll
        for (int m = 0; m < 4; ++m) {
          const float a = -2 * e[2 * m], b = -2 * e[2 * m + 1];
          const __half2 pair = __floats2half2_rn(a, b);
          const float2 seen = __half22float2(pair);
          seen2 += seen.x * seen.x + seen.y * seen.y;
          rounding2 += (a - seen.x) * (a - seen.x) + (b - seen.y) * (b - seen.y);
          const int chunk_to = (chunk % 8 / 4 * 4 + m) ^ (in_tile % 8);
          to[chunk_to * 4 + chunk % 4] = *reinterpret_cast<const uint32_t*>(&pair);
        }
      }
      float sums[4] = {norm2, seen2, rounding2, 0};
      const float of_code = warp_sums(sums);  // of each, in 8 lanes
      if (lane == 0) {
        const float to_add = cosine ? 0.0f : of_code;
        // In fours, as lane c of four has them: 8 i + 2 c, the next, and both 8 further.
        const int place =
            in_tile / 16 * 16 + in_tile % 8 / 2 * 4 + in_tile / 8 % 2 * 2 + in_tile % 2;
        params.norms2[stage * params.n_padded + tile * kTileCodes + place] =
            code < n_codes ? to_add : 0.0f;
      }
      most = larger(most, of_code);
    }
    if (lane % 8 == 0 && lane < 24) s.largest[warp][lane / 8] = most;
    team_meets();
    if (thread == 0) {
      float of_all[3] = {};
      for (int w = 0; w < kWarps; ++w) {
#pragma unroll
        for (int i = 0; i < 3; ++i) of_all[i] = larger(of_all[i], s.largest[w][i]);
      }
      // For cosines, what rounding takes from normalized codes may be more than is left of them.
      const float rounding = sqrtf(of_all[2]) * kAbove + (cosine ? 0x1p-17f * scale : 0.0f);
      constants[part] = {sqrtf(of_all[1]) * kAbove, rounding, of_all[0] * kAbove, 0};
    }
    team_meets();
  }
}

// By all blocks of the kernel, which wait for each other. `memory` is shared, and free.
template <int kMostWidth, bool kPacked, int kThreads>
__device__ void prepare_codes(const EncodeTilesParams& params, int depths, void* memory) {
  using Of = Team<kThreads>;
  const int team = Of::own(), n_teams = int(gridDim.x) * Of::kTeams;
  if (blockIdx.x == 0 && thread_id() == 0) params.late[0] = 0;
  if (blockIdx.x == 0) clear_counters(params.groups, thread_id(), kThreads);
  forget_codes(params.p);
  const int total = int(params.n_parts * params.p.n_stages), each = (total + n_teams - 1) / n_teams;
  const int begin = (int(blockIdx.x) * Of::kTeams + team) * each;
  using Memory = Shared<kMostWidth, Of::kWarps>;
  prepare_parts<kMostWidth, kPacked, Of>(params, depths, begin, min(begin + each, total),
                                         static_cast<Memory*>(memory)[team]);
  fence_async_proxy_all();  // the TMA sees what has been written
  grid_sync();
  fence_async_proxy_all();
}

}  // namespace preparing
}  // namespace hopper
}  // namespace sparsemoe
