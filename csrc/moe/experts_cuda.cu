// Which kernel takes a matrix product of the experts: that for few rows, or Hopper's, where the
// GPU, the element type and the alignment allow it, else the portable one.
#include <cstdlib>
#include <cstring>

#include "common/cuda.cuh"
#include "moe/experts_hopper.h"

namespace sparsemoe {
namespace {

// SPARSEMOE_KERNELS=portable leaves Hopper's kernels out.
bool on_hopper() {
  const char* kernels = std::getenv("SPARSEMOE_KERNELS");
  return runs_sm_90a() && !(kernels && std::strcmp(kernels, "portable") == 0);
}

// Rows of 16-byte chunks, which the TMA and 16-byte copies need, and few enough for their indices.
bool whole_chunks(int64_t width, int64_t stride, const void* data) {
  return width > 0 && width % 8 == 0 && stride % 8 == 0 && uintptr_t(data) % 16 == 0;
}
bool takes(const Rows& rows, int64_t width) {
  return whole_chunks(width, rows.stride, rows.data) && rows.stride >= width &&
         width < (int64_t(1) << 31) - 1024 && rows.n * (rows.stride / 8) < (int64_t(1) << 32) - 1;
}

bool takes(const Matrices& b, int64_t k, int64_t n) {
  const int64_t width = b.by_column ? k : n;
  return whole_chunks(width, b.stride, b.data) && b.stride >= width && b.expert_stride % 8 == 0;
}

constexpr int64_t kIndices = (int64_t(1) << 31) - 1024;
bool takes(const ExpertRows& experts, int64_t columns) {
  return experts.n_rows < kIndices && columns < kIndices &&
         (experts.n_rows / 256 + experts.n_experts) * (columns / 128 + 1) < kIndices;
}

// `launch` with a null pointer of the element type, or `portable` where that is not taken.
template <class F, class G>
int with_half(DType dtype, F launch, G portable) {
  const int error = dtype == DType::bf16 ? launch(static_cast<__nv_bfloat16*>(nullptr))
                                         : launch(static_cast<__half*>(nullptr));
  return error == hopper::kNotTaken ? portable() : error;
}
bool is_half(DType dtype) { return dtype == DType::bf16 || dtype == DType::f16; }

__global__ void clear_tail_kernel(const int32_t* end, int64_t n_rows, int64_t row_bytes,
                                  char* rows) {
  const int64_t first = min(int64_t(max(*end, 0)), n_rows) * row_bytes, last = n_rows * row_bytes;
  for (int64_t i = first + 2 * (blockIdx.x * int64_t(blockDim.x) + threadIdx.x); i < last;
       i += 2 * int64_t(gridDim.x) * blockDim.x) {
    *reinterpret_cast<uint16_t*>(rows + i) = 0;
  }
}

}  // namespace

int rows_product_cuda(const RowsProductParams& p, void* stream) {
  if (p.n == 0 || p.experts.n_rows == 0) return 0;
  if (p.b.by_column && few_rows(p.experts, p.k, p.n)) return rows_product_few(p, stream);
  const int64_t width = p.n / columns_per_hidden(p.activation);
  const bool gathers = p.a.index != nullptr, gated = width != p.n;
  if (!is_half(p.dtype) || !takes(p.a, p.k) || !takes(p.experts, p.n) || !takes(p.b, p.k, p.n) ||
      !whole_chunks(width, p.out_stride, p.out) || (p.pre && !whole_chunks(width, p.n, p.pre)) ||
      (!gathers && p.activation != Activation::none) || !on_hopper()) {
    return rows_product_portable(p, stream);
  }
  return with_half(
      p.dtype,
      [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        const auto launch = [&](auto by_column) {
          constexpr bool kByColumn = decltype(by_column)::value;
          if (gated) return hopper::rows_product_launch<T, true, kByColumn, true>(p, stream);
          if (gathers) return hopper::rows_product_launch<T, true, kByColumn, false>(p, stream);
          return hopper::rows_product_launch<T, false, kByColumn, false>(p, stream);
        };
        return p.b.by_column ? launch(std::true_type()) : launch(std::false_type());
      },
      [&] { return rows_product_portable(p, stream); });
}

int hidden_backward_cuda(const HiddenBackwardParams& p, void* stream) {
  if (p.f == 0 || p.experts.n_rows == 0) return 0;
  if (!is_half(p.dtype) || !p.grad.index || !takes(p.grad, p.h) || !takes(p.experts, p.f) ||
      !takes(p.down, p.h, p.f) || p.f % 8 != 0 || uintptr_t(p.pre) % 16 ||
      uintptr_t(p.grad_pre) % 16 || uintptr_t(p.hidden) % 16 || !on_hopper()) {
    return hidden_backward_portable(p, stream);
  }
  return with_half(
      p.dtype,
      [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        const auto launch = [&](auto by_column) {
          constexpr bool kByColumn = decltype(by_column)::value;
          return columns_per_hidden(p.activation) == 2
                     ? hopper::hidden_backward_launch<T, kByColumn, true>(p, stream)
                     : hopper::hidden_backward_launch<T, kByColumn, false>(p, stream);
        };
        return p.down.by_column ? launch(std::true_type()) : launch(std::false_type());
      },
      [&] { return hidden_backward_portable(p, stream); });
}

int weight_grad_cuda(const WeightGradParams& p, void* stream) {
  if (p.m == 0 || p.n == 0 || p.experts.n_experts == 0) return 0;
  const bool gathers_a = p.a.index != nullptr, gathers_b = p.b.index != nullptr;
  const int64_t tiles = p.experts.n_experts * (p.m / 128 + 1) * (p.n / 128 + 1);
  if (!is_half(p.dtype) || !takes(p.a, p.m) || !takes(p.b, p.n) || tiles >= kIndices ||
      p.experts.n_rows >= kIndices || uintptr_t(p.out) % 16 || (gathers_a && gathers_b) ||
      p.experts.n_rows == 0 || !on_hopper()) {
    return weight_grad_portable(p, stream);
  }
  return with_half(
      p.dtype,
      [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        if (gathers_a) return hopper::weight_grad_launch<T, true, false>(p, stream);
        return gathers_b ? hopper::weight_grad_launch<T, true, true>(p, stream)
                         : hopper::weight_grad_launch<T, false, false>(p, stream);
      },
      [&] { return weight_grad_portable(p, stream); });
}

int clear_tail_cuda(const ClearTailParams& p, void* stream) {
  const int64_t bytes = p.n_rows * p.row_bytes;
  if (bytes == 0) return 0;
  const unsigned blocks = unsigned(std::min<int64_t>(ceil_div(bytes, 2 * 256), 264));
  clear_tail_kernel<<<blocks, 256, 0, cudaStream_t(stream)>>>(p.end, p.n_rows, p.row_bytes,
                                                              static_cast<char*>(p.rows));
  return int(cudaGetLastError());
}

}  // namespace sparsemoe
