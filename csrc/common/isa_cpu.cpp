#include "common/isa.h"

#include <cstdlib>
#include <cstring>

#include "common/isa_targets.h"

namespace sparsemoe {
namespace {

CpuIsa detect() {
  CpuIsa best = CpuIsa::baseline;
#if SPARSEMOE_X86_VARIANTS
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) best = CpuIsa::avx2;
  if (best == CpuIsa::avx2 && __builtin_cpu_supports("avx512f") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    best = CpuIsa::avx512;
  }
  if (const char* wanted = std::getenv("SPARSEMOE_CPU_ISA")) {
    if (!std::strcmp(wanted, "baseline")) best = CpuIsa::baseline;
    if (!std::strcmp(wanted, "avx2") && best == CpuIsa::avx512) best = CpuIsa::avx2;
  }
#endif
  return best;
}

}  // namespace

CpuIsa cpu_isa() {
  static const CpuIsa isa = detect();
  return isa;
}

const char* cpu_isa_name() {
  switch (cpu_isa()) {
    case CpuIsa::avx512:
      return "avx512";
    case CpuIsa::avx2:
      return "avx2";
    default:
      return "baseline";
  }
}

const char* cpu_isas_compiled() {
#if SPARSEMOE_X86_VARIANTS
  return "baseline avx2 avx512";
#else
  return "baseline";
#endif
}

}  // namespace sparsemoe
