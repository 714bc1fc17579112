// Hopper's own instructions: barriers in shared memory, the tensor memory accelerator (TMA), and
// matrix products of a warpgroup. Names and terms are those of the PTX manual.
#pragma once

#include <cuda.h>

#include "common/cuda.cuh"
#include "common/ptx.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define SPARSEMOE_HOPPER 1
#else
#define SPARSEMOE_HOPPER 0  // kernels that use this file must then trap
#endif
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#define SPARSEMOE_CLUSTER(blocks)
#else
#define SPARSEMOE_CLUSTER(blocks) __cluster_dims__(blocks)
#endif

namespace sparsemoe {

// --- barriers ---

__device__ inline void barrier_init(uint64_t* barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals));
}
// After the inits, before other threads or the TMA use the barriers.
__device__ inline void barriers_ready() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ inline void barrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}
// Arrives, and lets the phase wait for so many bytes from the TMA.
__device__ inline void barrier_arrive_expecting(uint64_t* barrier, uint32_t bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}
// Arrives once this thread's copies so far (copy_async) are done; each thread counts.
__device__ inline void barrier_arrive_after_copies(uint64_t* barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(barrier))
               : "memory");
}
__device__ inline void barrier_wait(uint64_t* barrier, uint32_t parity) {
  const uint32_t address = shared_address(barrier);
  uint32_t done;
  do {
    asm volatile(
        "{\n .reg .pred p;\n"
        " mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        " selp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(address), "r"(parity)
        : "memory");
  } while (!done);
}

// --- clusters: blocks on neighbouring multiprocessors that reach each other's shared memory ---

__device__ inline int cluster_rank() {
  int rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
// Of all threads of all blocks of the cluster.
__device__ inline void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ inline void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
__device__ inline void cluster_sync() { cluster_arrive(), cluster_wait(); }
// Arrives at the same barrier of the block of that rank.
__device__ inline void barrier_arrive_at(uint64_t* barrier, int rank) {
  asm volatile(
      "{\n .reg .b32 there;\n"
      " mapa.shared::cluster.u32 there, %0, %1;\n"
      " mbarrier.arrive.shared::cluster.b64 _, [there];\n}" ::"r"(shared_address(barrier)),
      "r"(rank)
      : "memory");
}

// Writes 4 bytes to the same place of the block of that rank, and tells its barrier.
__device__ inline void store_at(int* place, int value, uint64_t* barrier, int rank) {
  asm volatile(
      "{\n .reg .b32 place, barrier;\n"
      " mapa.shared::cluster.u32 place, %0, %3;\n"
      " mapa.shared::cluster.u32 barrier, %2, %3;\n"
      " st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [place], %1, "
      "[barrier];\n}" ::"r"(shared_address(place)),
      "r"(value), "r"(shared_address(barrier)), "r"(rank)
      : "memory");
}

// A barrier among `threads` threads of the block; ids 1 to 15.
__device__ inline void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Makes ordinary accesses of shared memory visible to the TMA and the matrix units.
__device__ inline void fence_async_proxy() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Accesses of device memory, too.
__device__ inline void fence_async_proxy_all() { asm volatile("fence.proxy.async;" ::: "memory"); }

// --- copies ---

// True in one lane, the same each time. Asked by whole warps. Where a branch depends on nothing
// else that differs between lanes, the compiler knows that one is left; else it puts a loop over
// lanes around each use of the TMA.
__device__ inline bool one_lane() {
  uint32_t chosen;
  asm volatile(
      "{\n .reg .pred p;\n"
      " elect.sync _|p, %1;\n"
      " selp.u32 %0, 1, 0, p;\n}"
      : "=r"(chosen)
      : "r"(kFullWarp));
  return chosen;
}

__device__ inline void tma_prefetch(const CUtensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}
__device__ inline void tma_load(uint32_t to_shared, const CUtensorMap& map, uint64_t* barrier,
                                int c0, int c1, int c2, int c3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(to_shared),
      "l"(&map), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
      : "memory");
}
// The same to this place and barrier in both blocks of a cluster of two.
__device__ inline void tma_load_to_both(uint32_t to_shared, const CUtensorMap& map,
                                        uint64_t* barrier, int c0, int c1, int c2, int c3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(to_shared),
      "l"(&map), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "h"(uint16_t(3))
      : "memory");
}
__device__ inline void tma_store(const CUtensorMap& map, uint32_t from_shared, int c0, int c1,
                                 int c2, int c3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(
          &map),
      "r"(from_shared), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
      : "memory");
}
__device__ inline void tma_store_commit() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
// Until at most N of this thread's groups of stores still read shared memory.
template <int N>
__device__ inline void tma_store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory");
}

// Four 8 x 8 matrices of 16-bit elements from registers, as matrix products leave them, to rows of
// 16 bytes in shared memory: lane l gives the address of row l % 8 of matrix l / 8.
__device__ inline void store_matrices(uint32_t address, const uint32_t (&v)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
               "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3])
               : "memory");
}
__device__ inline void store_matrices_transposed(uint32_t address, const uint32_t (&v)[4]) {
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
      "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3])
      : "memory");
}
// --- matrix products ---

// How an operand lies in shared memory: in boxes of rows of 128 bytes, 8 rows of which make an atom
// of 1024 bytes in which the 16-byte chunk c of row r lies at chunk c ^ r (the TMA's 128-byte
// swizzle). `leading` and `stride` are bytes between atoms; see matrix-descriptor in the manual.
__device__ inline uint64_t matrix_descriptor(const void* shared, uint32_t leading,
                                             uint32_t stride) {
  return uint64_t((shared_address(shared) & 0x3ffff) >> 4) | uint64_t(leading >> 4) << 16 |
         uint64_t(stride >> 4) << 32 | uint64_t(1) << 62;
}

// Before the first product of a group: registers written before may now be read by it.
__device__ inline void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void products_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// After the wait: the compiler may not use the sum before.
__device__ inline void products_give(float& sum) { asm volatile("" : "+f"(sum)::"memory"); }
// Until at most N groups are not done.
template <int N>
__device__ inline void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

template <int N>
__device__ inline void registers_lower_to() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N>
__device__ inline void registers_raise_to() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}

// d (64 x N) = a (64 x 16) @ b (16 x N), or d += with `accumulate`, by the four warps of a
// warpgroup. Lane l of warp w holds d[row][column] at 4 * (column / 8) + 2 * (row / 8 % 2) + column
// % 2, where row % 8 = l / 4, row / 16 = w and column / 2 % 4 = l % 4. A transposed operand is
// stored with its rows (of a) or columns (of b) adjacent, otherwise the 16 of the inner dimension
// are.
#define SPARSEMOE_D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define SPARSEMOE_D16(i) \
  SPARSEMOE_D4(i), SPARSEMOE_D4(i + 4), SPARSEMOE_D4(i + 8), SPARSEMOE_D4(i + 12)

#define SPARSEMOE_PRODUCT_256(types)                                                               \
  asm volatile(                                                                                    \
      "{\n .reg .pred p;\n setp.ne.b32 p, %130, 0;\n"                                              \
      " wgmma.mma_async.sync.aligned.m64n256k16.f32." types                                        \
      "\n {"                                                                                       \
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                     \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "           \
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "           \
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "           \
      "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "           \
      "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "           \
      "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, "     \
      "%111, "                                                                                     \
      "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, " \
      "%127},\n"                                                                                   \
      " %128, %129, p, 1, 1, %131, %132;\n}"                                                       \
      : SPARSEMOE_D16(0), SPARSEMOE_D16(16), SPARSEMOE_D16(32), SPARSEMOE_D16(48),                 \
        SPARSEMOE_D16(64), SPARSEMOE_D16(80), SPARSEMOE_D16(96), SPARSEMOE_D16(112)                \
      : "l"(a), "l"(b), "r"(int(accumulate)), "n"(int(kTransA)), "n"(int(kTransB)))

template <class T, bool kTransA, bool kTransB>
__device__ inline void product(float (&d)[128], uint64_t a, uint64_t b, bool accumulate) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    SPARSEMOE_PRODUCT_256("bf16.bf16");
  } else {
    SPARSEMOE_PRODUCT_256("f16.f16");
  }
}

}  // namespace sparsemoe
