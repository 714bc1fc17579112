#include "rvq/decode.h"

#include "rvq/rvq_tensors.h"

namespace sparsemoe {
namespace {

Tensor rvq_decode(const Tensor& codes_in, const Tensor& codebooks_in) {
  check_dim(codebooks_in, 3, "codebooks", kCodebooksShape);
  const DType dtype = real_dtype(codebooks_in, "codebooks");
  const int64_t n_codes = codebooks_in.size(1), width = codebooks_in.size(2);
  const Tensor codes = checked_codes(codes_in, codebooks_in, "codebooks", n_codes);
  const int64_t n = codes.size(0), n_stages = codes.size(1);
  SPARSEMOE_CHECK(n_stages <= codebooks_in.size(0), "codes must have at most the ",
                  codebooks_in.size(0), " stages of codebooks, got shape ", shape_text(codes));
  const Tensor codebooks = as_contiguous(codebooks_in);
  Tensor y = empty({n, width}, codebooks.scalar_type(), codebooks);
  if (y.numel() > 0) {
    RvqDecodeParams p;
    p.n = n, p.width = width, p.n_stages = n_stages, p.n_codes = n_codes;
    p.codes = pointer<int32_t>(codes), p.codebooks = pointer(codebooks), p.dtype = dtype;
    p.y = mutable_pointer(y);
    SPARSEMOE_RUN(rvq_decode, codebooks, p);
  }
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparsemoe, CPU, m) { m.impl("rvq_decode", TORCH_BOX(&rvq_decode)); }
STABLE_TORCH_LIBRARY_IMPL(sparsemoe, CUDA, m) { m.impl("rvq_decode", TORCH_BOX(&rvq_decode)); }

}  // namespace sparsemoe
