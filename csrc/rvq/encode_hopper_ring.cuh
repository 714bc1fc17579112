// How codes reach the multiplying warpgroups: a ring of steps of 128 codes x 64 columns in shared
// memory. See encode_hopper.cuh.
#pragma once

#include "common/hopper.cuh"
#include "rvq/encode_hopper.h"
#include "rvq/encode_workspace.h"
#include "rvq/scale.cuh"

namespace sparsemoe {
namespace hopper {

// A thread of a multiplying warpgroup holds 16 * depths registers of residuals and 64 of sums: with
// few depths there is room for a third warpgroup.
template <int kDepths>
struct Shape {
  static constexpr int kGroups = kDepths <= 2 ? 3 : 2;
  static constexpr int kThreads = 128 * (1 + kGroups), kRows = 64 * kGroups;
  static constexpr int kLoadRegisters = 24, kMultiplyRegisters = kGroups == 3 ? 160 : 240;
  static constexpr int kBlocks = 2 * kDepths;               // of 32 columns
  static constexpr int kChunk = kBlocks < 4 ? kBlocks : 4;  // so many of them are changed at a time
  static constexpr int kPieces = (kDepths + 1) / 2;         // of 128 columns
};
constexpr int kStepBytes = int(kTileCodes * kTileDepth) * 2;
constexpr int kSlots = 8;
constexpr float kMostNorm = 65000;  // of what is held in half precision
constexpr float kRowScale = 4096;   // brings norms of 4 .. 8 to where half precision ends

// Norms of tiles: of the one that a warpgroup looks at, and of those that are in the ring.
template <int kDepths>
constexpr int kNormTiles = (kSlots + kDepths - 1) / kDepths + 1;

// Of the vectors of a warpgroup that have several: kept codes, a bit for each that is one, and the
// codes of the stages before. Bit 4 i + l of `sets`: all codes of lane l's set i are; the nearest
// is then found by several warps.
struct Candidates {
  uint16_t codes[64][32], before[64][kMostStages];
  unsigned mask[64], sets[64];
  float least[4];  // what each warp has found in sets of one of them
  int found[4];
};

template <int kDepths>
struct Shared {
  using Of = Shape<kDepths>;
  uint16_t codes[kSlots][kTileCodes * kTileDepth];
  // eight bytes of each row: [warpgroup][32 columns][thread]
  uint4 low[Of::kGroups][Of::kBlocks][128];
  union {
    uint4 operands[Of::kChunk][2][128];  // [32 columns][16 of them][thread]
    Candidates candidates;
  } passing[Of::kGroups];
  float4 norms2[kNormTiles<kDepths>][kTileCodes / 4];
  uint64_t full[kSlots], empty[kSlots];
  uint64_t norms_read[kNormTiles<kDepths>];  // norms2 may be overwritten; all threads arrive
  StageConstants constants[kMostStages];     // of all tiles of codes together
  float scale[kMostStages];
  unsigned several[Of::kGroups][4];  // of each warp, vectors with several candidates
  int nearest[Of::kGroups][64];      // of the candidates of a vector
};

// Of every stage, by so many warps: those of all parts of its tiles together, and its scale.
__device__ inline void find_constants(const EncodeTilesParams& t, int warps,
                                      StageConstants* constants, float* scales) {
  for (int stage = warp_id(); stage < int(t.p.n_stages); stage += warps) {
    const StageConstants* of = t.constants + int64_t(stage) * (t.n_parts + 1);
    StageConstants most{};
    for (int i = lane_id(); i < int(t.n_parts); i += 32) {
      most.code = larger(most.code, of[i].code);
      most.rounding = larger(most.rounding, of[i].rounding);
      most.norm2 = larger(most.norm2, of[i].norm2);
    }
    for (int step = 16; step > 0; step /= 2) {
      most.code = larger(most.code, __shfl_xor_sync(kFullWarp, most.code, step));
      most.rounding = larger(most.rounding, __shfl_xor_sync(kFullWarp, most.rounding, step));
      most.norm2 = larger(most.norm2, __shfl_xor_sync(kFullWarp, most.norm2, step));
    }
    most.other = of[t.n_parts].other;
    constants[stage] = most;
    scales[stage] = of[t.n_parts].code;
  }
}

// A place in the ring.
struct Place {
  int index = 0;
  uint32_t phase = 0;
  __device__ void advance() {
    if (++index == kSlots) index = 0, phase ^= 1;
  }
};

__device__ inline void copy_bulk(void* to_shared, const void* from, uint32_t bytes,
                                 uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared_address(to_shared)),
      "l"(from), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
}
// The same to this place and barrier in both blocks of a cluster of two.
__device__ inline void copy_bulk_to_both(void* to_shared, const void* from, uint32_t bytes,
                                         uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
      " [%0], [%1], %2, [%3], %4;" ::"r"(shared_address(to_shared)),
      "l"(from), "r"(bytes), "r"(shared_address(barrier)), "h"(uint16_t(3))
      : "memory");
}
__device__ inline void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
// d (64 x 128) = a (64 x 16) @ b (16 x 128), or d += with `accumulate`. a is in registers as of
// mma.m16n8k16, or a matrix_descriptor as b is.
#define SPARSEMOE_PRODUCT_128                                                        \
  " wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16\n {"                         \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63},\n"
__device__ inline void product_128(float (&d)[64], const uint32_t (&a)[4], uint64_t b,
                                   bool accumulate) {
  asm volatile("{\n .reg .pred p;\n setp.ne.b32 p, %69, 0;\n" SPARSEMOE_PRODUCT_128
               " {%64, %65, %66, %67}, %68, p, 1, 1, 0;\n}"
               : SPARSEMOE_D16(0), SPARSEMOE_D16(16), SPARSEMOE_D16(32), SPARSEMOE_D16(48)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(accumulate)));
}
__device__ inline void product_128(float (&d)[64], uint64_t a, uint64_t b, bool accumulate) {
  asm volatile("{\n .reg .pred p;\n setp.ne.b32 p, %66, 0;\n" SPARSEMOE_PRODUCT_128
               " %64, %65, p, 1, 1, 0, 0;\n}"
               : SPARSEMOE_D16(0), SPARSEMOE_D16(16), SPARSEMOE_D16(32), SPARSEMOE_D16(48)
               : "l"(a), "l"(b), "r"(int(accumulate)));
}

// The vectors of both blocks of a cluster, and those of all clusters.
template <int kDepths>
__device__ inline int64_t first_pair() {
  return int64_t(blockIdx.x / 2) * (2 * Shape<kDepths>::kRows);
}
template <int kDepths>
__device__ inline int64_t pair_stride() {
  return int64_t(gridDim.x) * Shape<kDepths>::kRows;
}

// Brings vectors to the L2, lest all blocks wait for device memory at the same time.
__device__ inline void prefetch_rows(const EncodeTilesParams& t, int64_t first, int count) {
  const int64_t element = t.p.dtype == DType::f32 ? 4 : 2, bytes = t.p.width * element / 16 * 16;
  for (int64_t row = first; bytes > 0 && row < min(first + count, t.p.n); ++row) {
    const char* from = static_cast<const char*>(t.p.x) + row * t.p.x_stride * element;
    if (reinterpret_cast<uintptr_t>(from) % 16 != 0) return;
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(uint32_t(bytes))
                 : "memory");
  }
}

template <int kDepths>
__device__ void send_codes(const EncodeTilesParams& t, Shared<kDepths>& s) {
  constexpr int kRows = Shape<kDepths>::kRows;
  constexpr uint32_t kNormBytes = 4 * kTileCodes;
  Place place;
  int norm_tile = 0;
  uint32_t norm_phase = 1;
  const int steps = int(t.p.n_stages * t.n_tiles) * kDepths;
  const int half = cluster_rank() * (kStepBytes / 2);
  // The next vectors are fetched while the last eighth of the codes is sent.
  const int n_last = (steps + 7) / 8, rows_each = (kRows + n_last - 1) / n_last;
  for (int64_t first = first_pair<kDepths>(); first < t.p.n; first += pair_stride<kDepths>()) {
    const char* from = static_cast<const char*>(t.tiles) + half;
    for (int step = 0; step < steps; ++step, from += kStepBytes) {
      if (step >= steps - n_last) {
        const int done = (step - (steps - n_last)) * rows_each;
        prefetch_rows(t, first + pair_stride<kDepths>() + cluster_rank() * kRows + done,
                      min(rows_each, kRows - done));
      }
      barrier_wait(&s.empty[place.index], place.phase ^ 1);
      const bool begins = step % kDepths == 0;
      barrier_arrive_expecting(&s.full[place.index], kStepBytes + (begins ? kNormBytes : 0));
      if (begins) {
        barrier_wait(&s.norms_read[norm_tile], norm_phase);
        copy_bulk(s.norms2[norm_tile], t.norms2 + step / kDepths * kTileCodes, kNormBytes,
                  &s.full[place.index]);
        if (++norm_tile == kNormTiles<kDepths>) norm_tile = 0, norm_phase ^= 1;
      }
      copy_bulk_to_both(reinterpret_cast<char*>(s.codes[place.index]) + half, from, kStepBytes / 2,
                        &s.full[place.index]);
      place.advance();
    }
  }
}

}  // namespace hopper
}  // namespace sparsemoe
