// Instructions of compute capability 8.0 that CUDA C++ has no name for.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace sparsemoe {

// 2^x and 1/x to within two units in the last place; subnormal results are zero.
__device__ inline float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ inline float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ inline uint32_t shared_address(const void* p) {
  return uint32_t(__cvta_generic_to_shared(p));
}

// Starts a copy of 16 bytes to shared memory, or clears them: `from` is then not read.
__device__ inline void copy_async(uint32_t to, const void* from, bool clears) {
  asm volatile(
      "{\n"
      ".reg .pred clears;\n"
      "setp.ne.u32 clears, %2, 0;\n"
      "cp.async.cg.shared.global.L2::128B [%0], [%1], 16, clears;\n"
      "}\n" ::"r"(to),
      "l"(from), "r"(uint32_t(clears))
      : "memory");
}
// The same of 4 bytes.
__device__ inline void copy_async_word(uint32_t to, const void* from, bool clears) {
  asm volatile(
      "{\n"
      ".reg .pred clears;\n"
      "setp.ne.u32 clears, %2, 0;\n"
      "cp.async.ca.shared.global [%0], [%1], 4, clears;\n"
      "}\n" ::"r"(to),
      "l"(from), "r"(uint32_t(clears))
      : "memory");
}
__device__ inline void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits for all but the last kPending groups of this thread.
template <int kPending>
__device__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four 8x8 matrices of 16-bit elements. Lane l gives the address of row l % 8 of matrix l / 8, and
// receives elements 2(l % 4) and 2(l % 4) + 1 of row l / 4 of each; of the transposed matrices with
// kTransposed.
template <bool kTransposed>
__device__ void load_matrices(uint32_t (&out)[4], uint32_t address) {
  if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(address)
                 : "memory");
  }
}

// sum[16][8] += a[16][16] * b[16][8]. With g = lane / 4 and c = 2 (lane % 4), a lane holds
//   a: (g, c), (g + 8, c), (g, c + 8), (g + 8, c + 8), each with its right neighbour;
//   b: (c, g), (c + 8, g), each with its lower neighbour;
//   sum: (g, c), (g, c + 1), (g + 8, c), (g + 8, c + 1).
__device__ inline void multiply_add(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0,
                                    uint32_t b1, __nv_bfloat16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ inline void multiply_add(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0,
                                    uint32_t b1, __half) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace sparsemoe
