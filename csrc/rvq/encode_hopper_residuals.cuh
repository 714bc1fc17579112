// The residuals of a warpgroup's 64 vectors on Hopper. See encode_hopper.cuh.
#pragma once

#include <cuda_fp8.h>

#include "rvq/encode_hopper_ring.cuh"
#include "rvq/encode_kernels.h"
#include "rvq/residuals.cuh"
#include "rvq/scale.cuh"

namespace sparsemoe {
namespace hopper {

// What a thread knows of the two rows, lane / 4 and 8 further, whose elements it shares with its
// three neighbours. Residuals are less the stage's center, and scaled.
struct RowState {
  float scale = 0, norm = 0;
  float drift = 0;  // of what is kept from the residual, at most
  float error = 0;  // of what the tensor cores see of it
  bool late = false;
};

// What sixteen elements of both rows are made of.
struct Fetched {
  float4 v[4][2];
};

// Sums over the elements of a row.
struct RowSums {
  float norm2 = 0, error2 = 0;
};

// Scaled to half precision in registers, as operands of the tensor cores; what rounding took from
// them, in 8 bits, in shared memory.
template <int kDepths, bool kWhole>
class Residuals {
 public:
  __device__ Residuals(const EncodeTilesParams& params, Shared<kDepths>& s)
      : t_(params),
        p_(params.p),
        s_(s),
        group_(threadIdx.x / 128 - 1),
        column_(8 * (lane_id() % 4)) {}

 protected:
  using Of = Shape<kDepths>;
  static constexpr int kBlocks = Of::kBlocks, kChunk = Of::kChunk;

  __device__ int64_t row(int h) const { return first_row_ + 8 * h; }
  __device__ const float* codebook(int stage) const {
    return static_cast<const float*>(p_.codebooks) + int64_t(stage) * p_.n_codes * p_.width;
  }
  __device__ float4 center_at(int stage, int column) const {
    const float* center = t_.centers + stage * (kDepths * kTileDepth);
    return *reinterpret_cast<const float4*>(center + column);
  }
  __device__ bool moves() const { return p_.metric == Metric::l2; }

  // Makes residuals a chunk at a time. fetch(block) begins to load what the new values of two
  // blocks are made of, element(fetched, block, v) makes them, from the old ones with kBefore.
  // Operands of the tensor cores that come out of loads lie as they must, those that come out of
  // arithmetic would be copied, and there are not registers for both: hence their way through
  // shared memory. There is one loop for all chunks, as instructions have to be fetched, too.
  template <bool kBefore, class Fetch, class Element>
  __device__ void make(Fetch fetch, Element element, RowSums (&sums)[2]) {
    auto next = fetch(0);
#pragma unroll 1
    for (int chunk = 0; chunk < kBlocks; chunk += kChunk) {
      if (kBefore) pass<true>(chunk);
#pragma unroll 1
      for (int b = 0; b < kChunk; b += 2) {
        const auto fetched = next;
        if (chunk + b + 2 < kBlocks) next = fetch(chunk + b + 2);
        float v[2][2][8];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if (kBefore) get(chunk + b + i, b + i, v[i]);
        }
        element(fetched, chunk + b, v);
#pragma unroll
        for (int i = 0; i < 2; ++i) put(chunk + b + i, b + i, v[i], sums);
      }
      pass<false>(chunk);
    }
  }
  // The operands of the chunk that begins there, from registers to shared memory or back.
  template <bool kToShared>
  __device__ void pass(int first) {
    const int thread = threadIdx.x % 128;
#pragma unroll
    for (int chunk = 0; chunk < kBlocks; chunk += kChunk) {
      if (first != chunk) continue;
#pragma unroll
      for (int i = 0; i < 2 * kChunk; ++i) {
        uint4* const place = &s_.passing[group_].operands[i / 2][i % 2][thread];
        if (kToShared) {
          store_shared(place, upper_[2 * chunk + i]);
        } else {
          load_shared(place, upper_[2 * chunk + i]);
        }
      }
    }
  }
  __device__ void put(int block, int place, const float (&v)[2][8], RowSums (&sums)[2]) {
    const int thread = threadIdx.x % 128;
    uint32_t upper[2][4], low[4];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        const float a = v[h][2 * m], b = v[h][2 * m + 1];
        const __half2 high = __floats2half2_rn(a, b);
        const float2 seen = __half22float2(high);
        const float da = a - seen.x, db = b - seen.y;
        const uint32_t bytes =
            __nv_cvt_float2_to_fp8x2(make_float2(da, db), __NV_SATFINITE, __NV_E4M3);
        sums[h].norm2 = fmaf(a, a, fmaf(b, b, sums[h].norm2));
        sums[h].error2 = fmaf(da, da, fmaf(db, db, sums[h].error2));
        upper[m / 2][2 * (m % 2) + h] = *reinterpret_cast<const uint32_t*>(&high);
        low[2 * h + m / 2] = m % 2 ? low[2 * h + m / 2] | bytes << 16 : bytes;
      }
    }
    store_shared(&s_.low[group_][block][thread], low);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      store_shared(&s_.passing[group_].operands[place][i][thread], upper[i]);
    }
  }
  // What was put.
  __device__ void get(int block, int place, float (&v)[2][8]) const {
    const int thread = threadIdx.x % 128;
    uint32_t upper[2][4], low[4];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      load_shared(&s_.passing[group_].operands[place][i][thread], upper[i]);
    }
    load_shared(&s_.low[group_][block][thread], low);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        const float2 high =
            __half22float2(*reinterpret_cast<const __half2*>(&upper[m / 2][2 * (m % 2) + h]));
        const float2 kept = low_of(low[2 * h + m / 2] >> (16 * (m % 2)) & 0xffff);
        v[h][2 * m] = high.x + kept.x;
        v[h][2 * m + 1] = high.y + kept.y;
      }
    }
  }
  __device__ static float2 low_of(uint32_t bytes) {
    const __half2_raw pair = __nv_cvt_fp8x2_to_halfraw2(__nv_fp8x2_storage_t(bytes), __NV_E4M3);
    return __half22float2(__half2(pair));
  }
  __device__ static void store_shared(uint4* place, const uint32_t (&v)[4]) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(place)), "r"(v[0]),
                 "r"(v[1]), "r"(v[2]), "r"(v[3])
                 : "memory");
  }
  __device__ static void load_shared(const uint4* place, uint32_t (&v)[4]) {
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
                 : "r"(shared_address(place))
                 : "memory");
  }
  __device__ static float quad_sum(float v) {
    v += __shfl_xor_sync(kFullWarp, v, 1);
    return v + __shfl_xor_sync(kFullWarp, v, 2);
  }

  __device__ void load_rows(int64_t first_row) {
    first_row_ = first_row;
    const float guess = kRowScale * s_.scale[0];
    state_[0] = state_[1] = RowState();
    state_[0].scale = state_[1].scale = guess;
    if (p_.dtype == DType::f32) return load_rows_as<float>();
    if (p_.dtype == DType::f16) return load_rows_as<__half>();
    load_rows_as<__nv_bfloat16>();
  }
  // Scaled by a guess from the codes' norms, and once more where that is far off.
  template <class T>
  __device__ void load_rows_as() {
    load_scaled<T>();
    bool again = false;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if ((state_[h].norm < kMostNorm && state_[h].norm > 256) || state_[h].norm == 0) continue;
      again = true;
      state_[h].scale *= kRowScale * power_of_two_below_8(state_[h].norm);
    }
    if (__any_sync(kFullWarp, again)) load_scaled<T>();
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      state_[h].late = !(state_[h].norm < kMostNorm) || row(h) >= p_.n;
      if (state_[h].late && row(h) < p_.n) leave(h, 0);
    }
  }
  template <class T>
  __device__ void load_scaled() {
    RowSums sums[2];
    const bool moved = moves() && s_.constants[0].other > 0;
    const T* x[2];  // past the end, the last row again
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      x[h] = static_cast<const T*>(p_.x) + min(row(h), p_.n - 1) * p_.x_stride + column_;
    }
    const auto fetch = [&](int block) { return fetch_rows(x, block); };
    const auto element = [&](const Fetched& fetched, int block, float (&v)[2][2][8]) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        float4 c = make_float4(0, 0, 0, 0);
        if (moved) c = center_at(0, 32 * block + column_ + fourth(k));
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const float4 r = state_[h].scale * (fetched.v[k][h] - c);
          float* to = &v[k / 2][h][4 * (k % 2)];
          to[0] = r.x, to[1] = r.y, to[2] = r.z, to[3] = r.w;
        }
      }
    };
    make<false>(fetch, element, sums);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      state_[h].norm = 0, state_[h].drift = 0;
      finish(h, 1, 0, sums[h]);
    }
  }
  // Of the sixteen elements that a thread has of two blocks, four: their column, less the first.
  __device__ static constexpr int fourth(int k) { return 32 * (k / 2) + 4 * (k % 2); }
  // Of both rows, of which the pointers are to the thread's first column.
  template <class T>
  __device__ Fetched fetch_rows(const T* (&rows)[2], int block) const {
    Fetched fetched;
    const int width = int(p_.width) - column_ - 32 * block;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const T* from = rows[h] + 32 * block;
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        fetched.v[k][h] = load4<true>(from, fourth(k), kWhole ? 64 : width);
      }
    }
    return fetched;
  }

  // After the elements of row h, whose scale has been changed by the ratio, were made with the
  // difference of centers of norms that sum to `moved`. What is below half precision is kept to
  // 1/16 of it, or 2^-10 an element.
  __device__ void finish(int h, float ratio, float moved, const RowSums& sums) {
    RowState& state = state_[h];
    const float before = ratio * state.norm, seen = sqrtf(quad_sum(sums.error2)) * kAbove;
    state.norm = sqrtf(quad_sum(sums.norm2)) * kAbove;
    const float rounded = before + state.norm + state.scale * moved;
    state.error = seen + ratio * state.drift + rounded * 0x1p-22f;
    state.drift = state.error - seen + seen / 16 + 0x1p-10f * sqrtf(kDepths * kTileDepth);
  }

  __device__ void next_residuals(int stage, const int (&code)[2]) {
    float ratio[2];
    RowSums sums[2];
    const float center = s_.constants[stage].other, next_center = s_.constants[stage + 1].other;
    const bool moved = moves() && center + next_center > 0;
    const float* chosen[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      chosen[h] = codebook(stage) + int64_t(code[h]) * p_.width + column_;
      float above = distance_[h];
      if (moves()) {
        above += state_[h].scale * next_center;
      } else {
        above = state_[h].norm + state_[h].scale * t_.norms[stage * p_.n_codes + code[h]] * kAbove;
      }
      ratio[h] = above > 0 && above < kInfinity ? kRowScale * power_of_two_below_8(above) : 1.0f;
      state_[h].scale *= ratio[h];
    }
    const auto fetch = [&](int block) { return fetch_rows(chosen, block); };
    const auto element = [&](const Fetched& fetched, int block, float (&v)[2][2][8]) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int d = 32 * block + column_ + fourth(k);
        float4 c = make_float4(0, 0, 0, 0);
        if (moved) c = center_at(stage + 1, d) - center_at(stage, d);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          float4 e = fetched.v[k][h];
          if (moved) e = e + c;
          float* to = &v[k / 2][h][4 * (k % 2)];
          to[0] = fmaf(-state_[h].scale, e.x, ratio[h] * to[0]);
          to[1] = fmaf(-state_[h].scale, e.y, ratio[h] * to[1]);
          to[2] = fmaf(-state_[h].scale, e.z, ratio[h] * to[2]);
          to[3] = fmaf(-state_[h].scale, e.w, ratio[h] * to[3]);
        }
      }
    };
    make<true>(fetch, element, sums);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      // From or to no center, the difference is exact.
      const bool rounds = moved && center > 0 && next_center > 0;
      finish(h, ratio[h], rounds ? center + next_center : 0, sums[h]);
    }
  }

  // Row h is for encode_finish, from this stage on.
  __device__ void leave(int h, int stage) {
    if (lane_id() % 4 != 0 || row(h) >= p_.n) return;
    const int at = atomicAdd(t_.late, 1);
    t_.late[2 + 2 * at] = int32_t(row(h));
    t_.late[3 + 2 * at] = stage;
    for (int q = stage; q < int(p_.n_stages); ++q) p_.codes[row(h) * p_.n_stages + q] = kLeft;
  }

  const EncodeTilesParams& t_;
  const RvqEncodeParams& p_;
  Shared<kDepths>& s_;
  const int group_, column_;
  int64_t first_row_ = 0;
  RowState state_[2];
  float distance_[2];  // above the norm of the residual after the stage, scaled
  uint32_t upper_[4 * kDepths][4];
};

}  // namespace hopper
}  // namespace sparsemoe
