// What bindings need of torch: checks that name the argument, allocation, and running a kernel on
// the tensor's device. Kernels never include this.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <string>
#include <vector>

#include "common/dtype.h"
#include "common/huge_pages.h"

// torch's current stream. Weak: a torch without CUDA does not have it.
extern "C" __attribute__((weak)) int32_t aoti_torch_get_current_cuda_stream(int32_t, void**);

namespace sparsemoe {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

#define SPARSEMOE_CHECK STD_TORCH_CHECK

inline std::string shape_text(const Tensor& tensor) {
  std::string text = "[";
  for (int64_t i = 0; i < tensor.dim(); ++i) {
    text += (i ? ", " : "") + std::to_string(tensor.size(i));
  }
  return text + "]";
}

inline const char* dtype_text(ScalarType type) { return torch::headeronly::toString(type); }

inline void check_dim(const Tensor& tensor, int64_t dim, const char* name, const char* shape) {
  SPARSEMOE_CHECK(tensor.dim() == dim, name, " must have shape ", shape, ", got ",
                  shape_text(tensor));
}

inline void check_size(const Tensor& tensor, int64_t dim, int64_t size, const char* name,
                       const char* shape) {
  SPARSEMOE_CHECK(dim < tensor.dim() && tensor.size(dim) == size, name, " must have shape ", shape,
                  " with size ", size, " in dimension ", dim, ", got ", shape_text(tensor));
}

inline void check_type(const Tensor& tensor, ScalarType type, const char* name) {
  SPARSEMOE_CHECK(tensor.scalar_type() == type, name, " must have dtype ", dtype_text(type),
                  ", got ", dtype_text(tensor.scalar_type()));
}

inline void check_device(const Tensor& tensor, const Tensor& like, const char* name,
                         const char* like_name) {
  SPARSEMOE_CHECK(
      tensor.is_cuda() == like.is_cuda() && tensor.get_device_index() == like.get_device_index(),
      name, " must be on the same device as ", like_name, ", got ",
      tensor.is_cuda() ? "cuda:" : "cpu:", tensor.get_device_index(), " and ",
      like.is_cuda() ? "cuda:" : "cpu:", like.get_device_index());
}

// The element type of a tensor of reals. float64 is for the CPU, where gradients are checked.
inline DType real_dtype(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::Half:
      return DType::f16;
    case ScalarType::BFloat16:
      return DType::bf16;
    case ScalarType::Double:
      SPARSEMOE_CHECK(!tensor.is_cuda(), name,
                      " must be float32, bfloat16 or float16 on a GPU, got float64");
      return DType::f64;
    default:
      SPARSEMOE_CHECK(false, name,
                      " must be float32, bfloat16, float16 or (on the CPU) float64, got ",
                      dtype_text(tensor.scalar_type()));
  }
  return DType::f32;
}

// What sums and weights of a dtype are held in.
inline ScalarType accumulator_type(DType dtype) {
  return dtype == DType::f64 ? ScalarType::Double : ScalarType::Float;
}

// The tensor itself where it is contiguous: torch's own contiguous() costs a call even then.
inline Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// The tensor itself where the elements of a row are adjacent, else a contiguous copy.
inline Tensor with_dense_rows(const Tensor& tensor) {
  const bool dense = tensor.size(1) <= 1 || tensor.stride(1) == 1;
  const bool ordered = tensor.size(0) <= 1 || tensor.stride(0) >= tensor.size(1);
  return dense && ordered ? tensor : torch::stable::contiguous(tensor);
}

inline int64_t row_stride(const Tensor& tensor) {
  return tensor.size(0) <= 1 ? tensor.size(1) : tensor.stride(0);
}

// An optional tensor that must match in device, dtype and size; contiguous.
inline OptionalTensor checked(const OptionalTensor& tensor, const Tensor& like,
                              const char* like_name, ScalarType type, int64_t size,
                              const char* name, const char* shape) {
  if (!tensor) return std::nullopt;
  check_dim(*tensor, 1, name, shape);
  check_size(*tensor, 0, size, name, shape);
  check_type(*tensor, type, name);
  check_device(*tensor, like, name, like_name);
  return as_contiguous(*tensor);
}

inline Tensor int32_input(const Tensor& tensor, const Tensor& like, const char* name,
                          const char* like_name) {
  check_type(tensor, ScalarType::Int, name);
  check_device(tensor, like, name, like_name);
  return as_contiguous(tensor);
}

template <class T = void>
const T* pointer(const OptionalTensor& tensor) {
  return tensor ? static_cast<const T*>(tensor->const_data_ptr()) : nullptr;
}
template <class T = void>
const T* pointer(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}
template <class T = void>
T* mutable_pointer(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

inline Tensor empty(const std::vector<int64_t>& sizes, ScalarType type, const Tensor& like) {
  Tensor tensor = torch::stable::empty(sizes, type, std::nullopt, like.device());
  if (!like.is_cuda()) {
    prefer_huge_pages(tensor.mutable_data_ptr(), tensor.numel() * tensor.element_size());
  }
  return tensor;
}

inline Tensor workspace(int64_t bytes, const Tensor& like) {
  return empty({bytes}, ScalarType::Byte, like);
}

inline void* current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  SPARSEMOE_CHECK(&aoti_torch_get_current_cuda_stream != nullptr &&
                      aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream) == 0,
                  "torch gave no CUDA stream for device ", tensor.get_device_index());
  return stream;
}

const char* cuda_error_text(int error);  // of a build with CUDA

template <class Params>
void run(const char* name, const Tensor& like, void (*cpu)(const Params&),
         int (*cuda)(const Params&, void*), const Params& p) {
  if (!like.is_cuda()) return cpu(p);
  SPARSEMOE_CHECK(cuda, name,
                  ": this sparsemoe was built without CUDA; reinstall it where nvcc is "
                  "found, with FORCE_CUDA=1");
#ifdef USE_CUDA
  torch::stable::accelerator::DeviceGuard guard(like.get_device_index());
  const int error = cuda(p, current_stream(like));
  SPARSEMOE_CHECK(error == 0, name, " failed on the GPU: ", cuda_error_text(error));
#endif
}

// Runs <op>_cpu or <op>_cuda.
#ifdef USE_CUDA
#define SPARSEMOE_RUN(op, like, params) run(#op, like, op##_cpu, op##_cuda, params)
#else
#define SPARSEMOE_RUN(op, like, params) \
  run(#op, like, op##_cpu, decltype (&op##_cuda)(nullptr), params)
#endif

}  // namespace sparsemoe
