// Checks that the bindings of this family share.
#pragma once

#include <algorithm>

#include "common/tensor.h"

namespace sparsemoe {

constexpr char kVectorsShape[] = "[vectors, width]";
constexpr char kCodebooksShape[] = "[stages, codes, width]";
constexpr char kCodesShape[] = "[vectors, stages]";

// The first n_stages codebooks, for vectors of this dtype; contiguous.
inline Tensor checked_codebooks(const Tensor& codebooks, const Tensor& x, DType dtype,
                                int64_t n_stages) {
  check_dim(codebooks, 3, "codebooks", kCodebooksShape);
  check_size(codebooks, 2, x.size(1), "codebooks", kCodebooksShape);
  check_type(codebooks, accumulator_type(dtype), "codebooks");
  check_device(codebooks, x, "codebooks", "x");
  SPARSEMOE_CHECK(codebooks.size(1) >= 1 && codebooks.size(1) < INT32_MAX,
                  "codebooks must have at least one code, got shape ", shape_text(codebooks));
  SPARSEMOE_CHECK(n_stages >= 0 && n_stages <= codebooks.size(0), "n_stages must be from 0 to the ",
                  codebooks.size(0), " of codebooks, got ", n_stages);
  Tensor all = codebooks;  // narrow takes no const tensor
  return as_contiguous(torch::stable::narrow(all, 0, 0, n_stages));
}

// On the CPU a wrong index is refused; on a GPU, where looking would stall, it is left out.
inline Tensor checked_codes(const Tensor& codes_in, const Tensor& like, const char* like_name,
                            int64_t n_codes) {
  check_dim(codes_in, 2, "codes", kCodesShape);
  const Tensor codes = int32_input(codes_in, like, "codes", like_name);
  if (codes.is_cuda()) return codes;
  const int32_t* values = pointer<int32_t>(codes);
  const int64_t n = codes.numel();
  bool valid = true;
  for (int64_t i = 0; i < n; ++i) valid &= values[i] >= -1 && values[i] < n_codes;
  if (valid) return codes;
  const int32_t* bad =
      std::find_if(values, values + n, [=](int32_t v) { return v < -1 || v >= n_codes; });
  SPARSEMOE_CHECK(false, "codes must hold indices from 0 to ", n_codes - 1,
                  ", or -1 for none, got ", *bad, " at [", (bad - values) / codes.size(1), ", ",
                  (bad - values) % codes.size(1), "]");
  return codes;
}

}  // namespace sparsemoe
