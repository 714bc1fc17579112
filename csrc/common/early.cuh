// A kernel that begins before the last one of its stream has ended (programmatic dependent launch,
// compute capability 9.0 on). Each of ours lets the next begin only after it has waited itself: a
// kernel that follows one of ours runs only when all that came before that one is done.
#pragma once

#include <utility>

#include "common/cuda.cuh"

namespace sparsemoe {

// Waits until the last kernel has ended. What it has written must not be read by load() or __ldg()
// right after it: they may be moved to before the wait.
__device__ inline void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next kernel begin, once every block has called this or ended.
__device__ inline void let_next_begin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// For use before the wait, of what was written before the last kernel: in the multiprocessor's own
// cache it may be older. Stays where it stands, which __ldcg() of a half type need not.
struct LoadThroughL2 {
  template <class V>
  __device__ V operator()(const V* from) const {
    if constexpr (sizeof(V) == 2) {
      const unsigned short bits = __ldcg(reinterpret_cast<const unsigned short*>(from));
      return *reinterpret_cast<const V*>(&bits);
    } else {
      return __ldcg(from);
    }
  }
};

// Launches a kernel of which at least one block calls wait_for_previous(): it has not ended before.
template <class... Parameters, class... Arguments>
int launch_early(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared_bytes,
                 void* stream, Arguments&&... arguments) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid, config.blockDim = threads;
  config.dynamicSmemBytes = shared_bytes, config.stream = cudaStream_t(stream);
  config.attrs = &attribute, config.numAttrs = runs_sm_90a() ? 1 : 0;
  return int(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...));
}

}  // namespace sparsemoe
