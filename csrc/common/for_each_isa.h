// Compiles the file that includes this one once for each CPU instruction set, each time in its own
// namespace SPARSEMOE_ISA, and once more with SPARSEMOE_DISPATCH defined, for the functions that
// choose. A kernel file reads:
//
//   #define SPARSEMOE_THIS_FILE "moe/gate_cpu.cpp"
//   #include "common/for_each_isa.h"
//   #ifndef SPARSEMOE_DISPATCH
//   namespace sparsemoe { namespace SPARSEMOE_ISA { ...kernels... } }
//   #else
//   namespace sparsemoe { void gate_cpu(const GateParams& p) { SPARSEMOE_BEST_ISA(gate, p); } }
//   #endif
//
// SPARSEMOE_VECTOR_BYTES is the size of a vector register.
// Standard headers go before the inclusion, so that their functions keep the baseline's code.
#ifndef SPARSEMOE_ISA_PASS
#define SPARSEMOE_ISA_PASS

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include "common/isa.h"
#include "common/isa_targets.h"
#include "common/parallel.h"

#define SPARSEMOE_ISA baseline
#define SPARSEMOE_VECTOR_BYTES 16
#include "common/scalar_cpu.h"
#include SPARSEMOE_THIS_FILE
#undef SPARSEMOE_ISA
#undef SPARSEMOE_VECTOR_BYTES

#if SPARSEMOE_X86_VARIANTS

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#define SPARSEMOE_ISA avx2
#define SPARSEMOE_VECTOR_BYTES 32
#include "common/scalar_cpu.h"
#include SPARSEMOE_THIS_FILE
#undef SPARSEMOE_ISA
#undef SPARSEMOE_VECTOR_BYTES
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#if defined(__clang__)
#pragma clang attribute push(                                                    \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif
#define SPARSEMOE_ISA avx512
#define SPARSEMOE_VECTOR_BYTES 64
#include "common/scalar_cpu.h"
#include SPARSEMOE_THIS_FILE
#undef SPARSEMOE_ISA
#undef SPARSEMOE_VECTOR_BYTES
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#define SPARSEMOE_BEST_ISA(function, ...)     \
  switch (cpu_isa()) {                        \
    case CpuIsa::avx512:                      \
      return avx512::function(__VA_ARGS__);   \
    case CpuIsa::avx2:                        \
      return avx2::function(__VA_ARGS__);     \
    default:                                  \
      return baseline::function(__VA_ARGS__); \
  }

#else

#define SPARSEMOE_BEST_ISA(function, ...) return baseline::function(__VA_ARGS__)

#endif

#define SPARSEMOE_DISPATCH
#endif
