#include <cuda_runtime.h>

#include "common/tensor_map.h"

namespace sparsemoe {
namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

// From the driver that is there, so that the library does not link against one.
Encode find_encode() {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
  const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found,
                                                             12000, cudaEnableDefault, &result);
#else
  const cudaError_t error =
      cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result);
#endif
  return error == cudaSuccess && result == cudaDriverEntryPointSuccess ? Encode(found) : nullptr;
}

// The driver's calls need a current context, which a thread of autograd may not have yet.
bool make_context_current() {
  int device = 0;
  return cudaGetDevice(&device) == cudaSuccess && cudaSetDevice(device) == cudaSuccess;
}

}  // namespace

bool make_tensor_map(CUtensorMap* map, DType dtype, const void* data, const int64_t (&sizes)[4],
                     const int64_t (&strides)[3], int rows1, int rows2) {
  static const Encode encode = find_encode();
  thread_local const bool ready = make_context_current();
  if (!encode || !ready) return false;
  cuuint64_t size[4], stride[3];
  for (int i = 0; i < 4; ++i) size[i] = cuuint64_t(sizes[i]);
  for (int i = 0; i < 3; ++i) stride[i] = cuuint64_t(strides[i]) * 2;
  const cuuint32_t box[4] = {kBoxWidth, cuuint32_t(rows1), cuuint32_t(rows2), 1};
  const cuuint32_t step[4] = {1, 1, 1, 1};
  const auto type =
      dtype == DType::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  return encode(map, type, 4, const_cast<void*>(data), size, stride, box, step,
                CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

bool make_row_run_map(CUtensorMap* map, DType dtype, const void* data, int64_t n_rows,
                      int64_t width, int64_t parts, int64_t stride, int run) {
  // Index 2 of a box runs to run - 1 and no further, and index 3 moves it: row = i2 + i3 - run.
  const char* base = static_cast<const char*>(data) - run * stride * 2;
  return make_tensor_map(map, dtype, base, {width, parts, run, n_rows + 1},
                         {parts > 1 ? width : stride, stride, stride}, 1, run);
}

}  // namespace sparsemoe
