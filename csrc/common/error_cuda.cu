#include <cuda_runtime.h>

namespace sparsemoe {

const char* cuda_error_text(int error) { return cudaGetErrorString(cudaError_t(error)); }

}  // namespace sparsemoe
