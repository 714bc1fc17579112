// Matrix products of many sizes at once on the CPU, by torch's own: each on one thread, several
// side by side. That scales where a product on all threads would not, and no thread waits for
// another.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <vector>

#include "common/parallel.h"
#include "common/tensor.h"

namespace sparsemoe {

// A matrix anywhere in memory. One of the strides, in elements, is 1.
struct Matrix {
  char* data;
  int64_t rows, columns, row_stride, column_stride;
  ScalarType type;
  int64_t item;  // bytes an element

  Matrix transposed() const { return {data, columns, rows, column_stride, row_stride, type, item}; }
  Matrix block(int64_t row, int64_t n_rows, int64_t column, int64_t n_columns) const {
    char* first = data + (row * row_stride + column * column_stride) * item;
    return {first, n_rows, n_columns, row_stride, column_stride, type, item};
  }
  Matrix some_rows(int64_t row, int64_t n_rows) const { return block(row, n_rows, 0, columns); }

  Tensor as_tensor() const {
    const int64_t sizes[] = {rows, columns}, strides[] = {row_stride, column_stride};
    return torch::stable::from_blob(data, {sizes, 2}, {strides, 2},
                                    torch::stable::Device(torch::stable::DeviceType::CPU), type);
  }
};

// The left factor of a product must have rows this far apart, with zeros after the columns:
// oneDNN's product of half types (3.12, on AMX) reads on into the next row, and a NaN there comes
// through.
inline int64_t safe_stride(int64_t columns, ScalarType type) {
  const bool half = type == ScalarType::BFloat16 || type == ScalarType::Half;
  return half ? (columns + 31) / 32 * 32 : columns;
}

inline Matrix matrix_of(const Tensor& tensor) {
  return {mutable_pointer<char>(tensor),
          tensor.size(0),
          tensor.size(1),
          row_stride(tensor),
          1,
          tensor.scalar_type(),
          int64_t(tensor.element_size())};
}
// Of a stack of matrices, see with_dense_matrices.
inline Matrix matrix_of(const Tensor& stack, int64_t index) {
  const int64_t item = int64_t(stack.element_size());
  return {mutable_pointer<char>(stack) + index * stack.stride(0) * item,
          stack.size(1),
          stack.size(2),
          stack.stride(1),
          stack.stride(2),
          stack.scalar_type(),
          item};
}

// out = a @ b, by this thread where it is one of several.
inline void product(const Matrix& out, const Matrix& a, const Matrix& b) {
  if (out.rows == 0 || out.columns == 0) return;
  std::array<StableIValue, 3> stack{torch::stable::detail::from(a.as_tensor()),
                                    torch::stable::detail::from(b.as_tensor()),
                                    torch::stable::detail::from(out.as_tensor())};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  (void)torch::stable::detail::to<Tensor>(stack[0]);
}

// The same by all threads, a block of `out` each.
inline void product_by_all(const Matrix& out, const Matrix& a, const Matrix& b) {
  constexpr int64_t kRows = 128, kColumns = 32;  // of a block, at least
  const int64_t n_threads = torch::stable::get_num_threads();
  const auto share = [](int64_t n, int64_t parts) {  // in whole vectors
    return ((n + parts - 1) / parts + 31) / 32 * 32;
  };
  const int64_t down = std::clamp<int64_t>(out.rows / kRows, 1, n_threads);
  const int64_t across = std::clamp<int64_t>(out.columns / kColumns, 1, n_threads / down);
  const int64_t rows = share(out.rows, down), columns = share(out.columns, across);
  parallel_for(0, down * across, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / across * rows, column = i % across * columns;
      const int64_t n_rows = std::min(rows, out.rows - row);
      const int64_t n_columns = std::min(columns, out.columns - column);
      if (n_rows <= 0 || n_columns <= 0) continue;
      product(out.block(row, n_rows, column, n_columns), a.some_rows(row, n_rows),
              b.block(0, b.rows, column, n_columns));
    }
  });
}

// Zeroes the rows from `row` on.
inline void clear_rows_past(const Tensor& rows, int64_t row) {
  const int64_t bytes = rows.size(1) * int64_t(rows.element_size());
  if (rows.numel() == 0) return;
  std::memset(mutable_pointer<char>(rows) + row * bytes, 0, (rows.size(0) - row) * bytes);
}

// Zeroes what experts without rows have of a stack.
inline void clear_unused_experts(const Tensor& stack, const int32_t* offsets) {
  if (stack.numel() == 0) return;
  const int64_t n_experts = stack.size(0);
  const int64_t bytes = stack.numel() / n_experts * int64_t(stack.element_size());
  for (int64_t e = 0; e < n_experts; ++e) {
    if (offsets[e] < offsets[e + 1]) continue;
    std::memset(mutable_pointer<char>(stack) + e * bytes, 0, bytes);
  }
}

using Product = void (*)(const Matrix& out, const Matrix& a, const Matrix& b);

// Memory of one thread, which it uses again for each expert: fresh memory costs page faults.
class Scratch {
 public:
  explicit Scratch(const Tensor& like) : like_(like) {}

  // What was taken before is lost.
  void reserve(int64_t bytes) {
    used_ = 0;
    if (bytes <= size_) return;
    space_ = workspace(bytes, like_), size_ = bytes;
  }
  char* take(int64_t bytes) {
    char* taken = mutable_pointer<char>(*space_) + used_;
    used_ += padded(bytes);
    return taken;
  }
  static int64_t padded(int64_t bytes) { return (bytes + 63) / 64 * 64; }

 private:
  Tensor like_;
  OptionalTensor space_;
  int64_t size_ = 0, used_ = 0;
};

// One expert's part: the rows first .. first + n, and what to multiply them with.
struct ExpertTask {
  int64_t expert, first, n;
  Product multiply;
  Scratch& scratch;
};

// Calls work(task) for every expert with rows, those with most rows first. An expert too large to
// leave to one thread gets them all.
template <class F>
void for_each_expert(const int32_t* offsets, int64_t n_experts, const Tensor& like, F work) {
  const auto rows_of = [&](int64_t e) { return int64_t(offsets[e + 1]) - offsets[e]; };
  std::vector<int64_t> experts;
  for (int64_t e = 0; e < n_experts; ++e) {
    if (rows_of(e) > 0) experts.push_back(e);
  }
  std::stable_sort(experts.begin(), experts.end(),
                   [&](int64_t a, int64_t b) { return rows_of(a) > rows_of(b); });
  const int64_t n_threads = torch::stable::get_num_threads(), n = int64_t(experts.size());
  const auto run = [&](int64_t e, Product multiply, Scratch& scratch) {
    work(ExpertTask{e, offsets[e], rows_of(e), multiply, scratch});
  };
  int64_t first = 0, left = offsets[n_experts] - offsets[0];
  Scratch scratch(like);
  for (; n_threads > 1 && first < n; ++first) {
    const int64_t rows = rows_of(experts[first]);
    if (2 * rows * n_threads <= left) break;
    run(experts[first], product_by_all, scratch);
    left -= rows;
  }
  std::atomic<int64_t> next{first};
  parallel_for(0, std::min(n_threads, n - first), 1, [&](int64_t, int64_t) {
    Scratch own(like);
    for (int64_t i; (i = next++) < n;) run(experts[i], product, own);
  });
}

}  // namespace sparsemoe
