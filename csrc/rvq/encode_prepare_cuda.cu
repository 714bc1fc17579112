#include "common/hopper.cuh"
#include "rvq/encode_hopper.h"
#include "rvq/encode_workspace.h"
#include "rvq/residuals.cuh"
#include "rvq/rows.h"
#include "rvq/scale.cuh"

namespace sparsemoe {
namespace hopper {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kSamples = 4;  // of a warp

// One block for each part of a tile of codes. Codes are moved by a center, which cancels in
// differences of distances, and by a power of two to norms below 8, give or take: both from a
// sample of the codes. Any center and scale is right; good ones keep the errors of the scores
// small. All that is read is asked for at once, where registers hold it.
template <int kMostWidth, bool kPacked>
__global__ void __launch_bounds__(kThreads)
    prepare_kernel(const EncodeTilesParams params, const int depths) {
  __shared__ __align__(16) float center[kMostWidth], part_of_center[kWarps][kMostWidth];
  __shared__ float largest[kWarps][3];
  const RvqEncodeParams& p = params.p;
  const int n_codes = int(p.n_codes), width = int(p.width), padded = depths * kTileDepth;
  const int part = blockIdx.x, stage = blockIdx.y, warp = warp_id(), lane = lane_id();
  const float* codebook = static_cast<const float*>(p.codebooks) + int64_t(stage) * n_codes * width;
  const bool cosine = p.metric == Metric::cosine;
  if (part == 0 && stage == 0 && threadIdx.x == 0) params.late[0] = 0;
  const int64_t n_blocks = int64_t(gridDim.x) * gridDim.y;
  const int64_t block = int64_t(blockIdx.y) * gridDim.x + blockIdx.x;
  const int64_t total = p.n * p.n_stages;  // of codes, which begin on packs of four
  for (int64_t i = block * kThreads + threadIdx.x; i < (total + 3) / 4; i += n_blocks * kThreads) {
    if (4 * i + 4 <= total) {
      reinterpret_cast<int4*>(p.codes)[i] = make_int4(kUnknown, kUnknown, kUnknown, kUnknown);
    } else {
      for (int64_t j = 4 * i; j < total; ++j) p.codes[j] = kUnknown;
    }
  }

  // Of each code, lane l has columns 8 l .. 8 l + 7, and every 256 further.
  constexpr int kOwn = kPartCodes / kWarps, kChunks = kMostWidth > 256 ? kMostWidth / 256 : 1;
  const int first = part * int(kPartCodes) + warp * kOwn;
  float4 own[kOwn][kChunks][2];
  const auto load_own = [&] {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const float* row = codebook + int64_t(min(first + i, n_codes - 1)) * width;
#pragma unroll
      for (int c = 0; c < 2 * kChunks; ++c) {
        const int column = 256 * (c / 2) + 8 * lane + 4 * (c % 2);
        const float4 v = load4<kPacked>(row, column, width);
        own[i][c / 2][c % 2] = first + i < n_codes ? v : make_float4(0, 0, 0, 0);
      }
    }
  };
  constexpr bool kRoom = kMostWidth <= 512;  // in registers
  if (kRoom) load_own();
  const int n_samples = min(n_codes, kWarps * kSamples);
  Columns<kMostWidth / kWalkColumns> sample[kSamples], sum;
  sum.clear();
#pragma unroll
  for (int i = 0; i < kSamples; ++i) {
    const int s = min(warp * kSamples + i, n_samples - 1);
    sample[i].template load<kPacked>(codebook + int64_t(s) * n_codes / n_samples * width, 0, width);
  }
#pragma unroll
  for (int i = 0; i < kSamples; ++i) {
    if (cosine) {
      const float to_1 = inverse_norm(sqrtf(warp_sum(sample[i].sum_of_squares())));
      sample[i].scale(to_1);
    }
    if (warp * kSamples + i < n_samples) sum.add(sample[i]);
  }
  sum.template store<true>(part_of_center[warp], 0, kMostWidth);
  __syncthreads();
  for (int d = threadIdx.x; d < kMostWidth; d += kThreads) {
    float of_all = 0;
    for (int w = 0; w < kWarps; ++w) of_all += part_of_center[w][d];
    of_all /= n_samples;
    center[d] = isfinite(of_all) ? of_all : 0.0f;
  }
  __syncthreads();
  Columns<kMostWidth / kWalkColumns> middle;
  middle.load_changing(center, 0, kMostWidth);
  float most = 0, center_norm2 = warp_sum(middle.sum_of_squares());
#pragma unroll
  for (int i = 0; i < kSamples; ++i) {
    sample[i].subtract(middle);
    most = fmaxf(most, sqrtf(warp_sum(sample[i].sum_of_squares())));
  }
  if (lane == 0) largest[warp][0] = most;
  __syncthreads();
  most = largest[0][0];
  for (int w = 1; w < kWarps; ++w) most = fmaxf(most, largest[w][0]);
  const float scale = power_of_two_below_8(most);
  __syncthreads();
  if (2 * sqrtf(center_norm2) <= most) {  // little would be gained: none costs less
    for (int d = threadIdx.x; d < kMostWidth; d += kThreads) center[d] = 0;
    center_norm2 = 0;
    __syncthreads();
  }
  StageConstants* constants = params.constants + int64_t(stage) * (params.n_parts + 1);
  if (part == 0) {
    for (int d = threadIdx.x; d < padded; d += kThreads) {
      params.centers[int64_t(stage) * padded + d] = center[d];
    }
    if (threadIdx.x == 0) {
      constants[params.n_parts] = {scale, 0, 0, sqrtf(center_norm2) * kAbove};
    }
  }

  if (!kRoom) load_own();
  float most_code = 0, most_rounding = 0, most_norm2 = 0;
  const int tile = part / int(kTileCodes / kPartCodes);
  uint16_t* const tiles =
      static_cast<uint16_t*>(params.tiles) +
      (int64_t(stage) * params.n_tiles + tile) * depths * kTileCodes * kTileDepth;
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    const int code = first + i, in_tile = code % int(kTileCodes);
    float factor = scale;
    if (cosine && code < n_codes) {
      float sum = 0;
#pragma unroll
      for (int c = 0; c < 2 * kChunks; ++c) sum += squares(own[i][c / 2][c % 2]);
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
          v[j] = factor * own[i][c][j] - scale * *reinterpret_cast<const float4*>(center + d);
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
    norm2 = warp_sum(norm2), seen2 = warp_sum(seen2), rounding2 = warp_sum(rounding2);
    if (lane == 0) {
      const float to_add = cosine ? 0.0f : norm2;
      // In fours, as lane c of four has them: 8 i + 2 c, the next, and both 8 further.
      const int place = in_tile / 16 * 16 + in_tile % 8 / 2 * 4 + in_tile / 8 % 2 * 2 + in_tile % 2;
      params.norms2[stage * params.n_padded + tile * kTileCodes + place] =
          code < n_codes ? to_add : 0.0f;
    }
    most_code = larger(most_code, sqrtf(seen2));
    most_rounding = larger(most_rounding, sqrtf(rounding2));
    most_norm2 = larger(most_norm2, norm2);
  }
  if (lane == 0) {
    largest[warp][0] = most_code, largest[warp][1] = most_rounding, largest[warp][2] = most_norm2;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int w = 1; w < kWarps; ++w) {
      most_code = larger(most_code, largest[w][0]);
      most_rounding = larger(most_rounding, largest[w][1]);
      most_norm2 = larger(most_norm2, largest[w][2]);
    }
    constants[part] = {most_code * kAbove, most_rounding * kAbove, most_norm2 * kAbove, 0};
  }
}

}  // namespace

int prepare_tiles(const EncodeTilesParams& params, int64_t depths, void* stream) {
  const dim3 grid(unsigned(params.n_parts), unsigned(params.p.n_stages));
  const auto launch = [&](auto kernel) {
    kernel<<<grid, kThreads, 0, cudaStream_t(stream)>>>(params, int(depths));
    return int(cudaGetLastError());
  };
  const bool packed = packs_of_4<float>(params.p.codebooks, params.p.width, params.p.width);
  return with_pieces(params.p.width, [&](auto pieces) {
    constexpr int kWidth = decltype(pieces)::value * kWalkColumns;
    return packed ? launch(prepare_kernel<kWidth, true>) : launch(prepare_kernel<kWidth, false>);
  });
}

}  // namespace hopper
}  // namespace sparsemoe
