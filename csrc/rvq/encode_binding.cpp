#include "rvq/encode.h"

#include <string>
#include <tuple>

#include "rvq/encode_workspace.h"
#include "rvq/rvq_tensors.h"

namespace sparsemoe {
namespace {

Metric parse_metric(const std::string& name) {
  if (name == "l2") return Metric::l2;
  SPARSEMOE_CHECK(name == "cosine", "metric must be 'l2' or 'cosine', got '", name, "'");
  return Metric::cosine;
}

// What encode and beam_encode share: the inputs checked, the outputs allocated.
struct Encoding {
  DType dtype;
  Tensor x, codebooks, codes, quantized, errors;

  Encoding(const Tensor& x_in, const Tensor& codebooks_in, int64_t n_stages) {
    check_dim(x_in, 2, "x", kVectorsShape);
    dtype = real_dtype(x_in, "x");
    SPARSEMOE_CHECK(x_in.size(1) >= 1, "x must be at least 1 wide, got shape ", shape_text(x_in));
    codebooks = checked_codebooks(codebooks_in, x_in, dtype, n_stages);
    x = with_dense_rows(x_in);
    codes = empty({x.size(0), n_stages}, ScalarType::Int, x);
    quantized = empty({x.size(0), x.size(1)}, x.scalar_type(), x);
    errors = empty({x.size(0), n_stages}, accumulator_type(dtype), x);
  }
  template <class Params>
  void fill(Params* p) const {
    p->n = x.size(0), p->width = x.size(1);
    p->n_stages = codebooks.size(0), p->n_codes = codebooks.size(1);
    p->x = pointer(x), p->x_stride = row_stride(x), p->dtype = dtype;
    p->codebooks = pointer(codebooks);
    p->codes = mutable_pointer<int32_t>(codes), p->quantized = mutable_pointer(quantized);
    p->errors = mutable_pointer(errors);
  }
  std::tuple<Tensor, Tensor, Tensor> result() const { return {codes, quantized, errors}; }
};

std::tuple<Tensor, Tensor, Tensor> rvq_encode(const Tensor& x, const Tensor& codebooks,
                                              int64_t n_stages, std::string metric, bool exact) {
  const Metric by = parse_metric(metric);
  const Encoding encoding(x, codebooks, n_stages);
  if (x.size(0) > 0) {
    RvqEncodeParams p;
    encoding.fill(&p);
    p.metric = by, p.exact = exact;
    const Tensor space = workspace(x.is_cuda() ? rvq_encode_workspace_bytes(p) : 0, x);
    p.workspace = mutable_pointer(space);
    SPARSEMOE_RUN(rvq_encode, x, p);
  }
  return encoding.result();
}

std::tuple<Tensor, Tensor, Tensor> rvq_beam_encode(const Tensor& x, const Tensor& codebooks,
                                                   int64_t n_stages, int64_t beam) {
  SPARSEMOE_CHECK(beam >= 1 && beam <= kMaxBeam, "beam must be from 1 to ", kMaxBeam, ", got ",
                  beam);
  const Encoding encoding(x, codebooks, n_stages);
  if (x.size(0) > 0) {
    RvqBeamParams p;
    encoding.fill(&p);
    p.beam = beam;
    const Tensor space = workspace(x.is_cuda() ? rvq_beam_workspace_bytes(p) : 0, x);
    p.workspace = mutable_pointer(space);
    SPARSEMOE_RUN(rvq_beam_encode, x, p);
  }
  return encoding.result();
}

Tensor rvq_encode_backward(const Tensor& grad_quantized_in, const Tensor& grad_errors_in,
                           const Tensor& x_in, const Tensor& codebooks_in, const Tensor& codes_in) {
  check_dim(x_in, 2, "x", kVectorsShape);
  const DType dtype = real_dtype(x_in, "x");
  check_dim(codes_in, 2, "codes", kCodesShape);
  const int64_t n = x_in.size(0), width = x_in.size(1), n_stages = codes_in.size(1);
  const Tensor codebooks = checked_codebooks(codebooks_in, x_in, dtype, n_stages);
  const Tensor codes = checked_codes(codes_in, x_in, "x", codebooks.size(1));
  check_size(codes, 0, n, "codes", kCodesShape);
  check_dim(grad_quantized_in, 2, "grad_quantized", kVectorsShape);
  check_size(grad_quantized_in, 0, n, "grad_quantized", kVectorsShape);
  check_size(grad_quantized_in, 1, width, "grad_quantized", kVectorsShape);
  check_type(grad_quantized_in, x_in.scalar_type(), "grad_quantized");
  check_device(grad_quantized_in, x_in, "grad_quantized", "x");
  check_dim(grad_errors_in, 2, "grad_errors", kCodesShape);
  check_size(grad_errors_in, 0, n, "grad_errors", kCodesShape);
  check_size(grad_errors_in, 1, n_stages, "grad_errors", kCodesShape);
  check_type(grad_errors_in, accumulator_type(dtype), "grad_errors");
  check_device(grad_errors_in, x_in, "grad_errors", "x");
  const Tensor x = with_dense_rows(x_in), grad_quantized = as_contiguous(grad_quantized_in);
  const Tensor grad_errors = as_contiguous(grad_errors_in);
  Tensor grad_x = empty({n, width}, x.scalar_type(), x);
  if (n > 0) {
    RvqEncodeBackwardParams p;
    p.n = n, p.width = width, p.n_stages = n_stages, p.n_codes = codebooks.size(1);
    p.grad_quantized = pointer(grad_quantized), p.grad_errors = pointer(grad_errors);
    p.x = pointer(x), p.x_stride = row_stride(x), p.dtype = dtype;
    p.codebooks = pointer(codebooks), p.codes = pointer<int32_t>(codes);
    p.grad_x = mutable_pointer(grad_x);
    SPARSEMOE_RUN(rvq_encode_backward, x, p);
  }
  return grad_x;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparsemoe, CPU, m) {
  m.impl("rvq_encode", TORCH_BOX(&rvq_encode));
  m.impl("rvq_encode_backward", TORCH_BOX(&rvq_encode_backward));
  m.impl("rvq_beam_encode", TORCH_BOX(&rvq_beam_encode));
}
STABLE_TORCH_LIBRARY_IMPL(sparsemoe, CUDA, m) {
  m.impl("rvq_encode", TORCH_BOX(&rvq_encode));
  m.impl("rvq_encode_backward", TORCH_BOX(&rvq_encode_backward));
  m.impl("rvq_beam_encode", TORCH_BOX(&rvq_beam_encode));
}

}  // namespace sparsemoe
