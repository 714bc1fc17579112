// Which variant of the CPU kernels this machine runs.
#pragma once

namespace sparsemoe {

enum class CpuIsa { baseline, avx2, avx512 };

// The best variant that was compiled in and that the processor has. SPARSEMOE_CPU_ISA
// (baseline, avx2 or avx512) in the environment lowers it, for tests.
CpuIsa cpu_isa();
const char* cpu_isa_name();
const char* cpu_isas_compiled();  // space-separated

}  // namespace sparsemoe
