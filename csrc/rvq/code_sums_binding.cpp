#include "rvq/code_sums.h"

#include <cmath>
#include <tuple>

#include "rvq/code_sums_workspace.h"
#include "rvq/rvq_tensors.h"

namespace sparsemoe {
namespace {

std::tuple<Tensor, Tensor> rvq_code_sums(const Tensor& x_in, const Tensor& codes_in,
                                         int64_t num_codes, const OptionalTensor& codebooks_in,
                                         const OptionalTensor& weights_in, bool after) {
  check_dim(x_in, 2, "x", kVectorsShape);
  const DType dtype = real_dtype(x_in, "x");
  const ScalarType real = accumulator_type(dtype);
  SPARSEMOE_CHECK(num_codes >= 1 && num_codes < INT32_MAX, "num_codes must be at least 1, got ",
                  num_codes);
  const Tensor codes = checked_codes(codes_in, x_in, "x", num_codes);
  const int64_t n = x_in.size(0), width = x_in.size(1), n_stages = codes.size(1);
  check_size(codes, 0, n, "codes", kCodesShape);
  OptionalTensor codebooks, weights;
  if (codebooks_in) {
    codebooks = checked_codebooks(*codebooks_in, x_in, dtype, n_stages);
    check_size(*codebooks_in, 1, num_codes, "codebooks", kCodebooksShape);
  }
  SPARSEMOE_CHECK(codebooks || !after, "codebooks must be given for after=True, got None");
  if (weights_in) {
    check_dim(*weights_in, 2, "weights", kCodesShape);
    check_size(*weights_in, 0, n, "weights", kCodesShape);
    check_size(*weights_in, 1, n_stages, "weights", kCodesShape);
    check_type(*weights_in, real, "weights");
    check_device(*weights_in, x_in, "weights", "x");
    weights = as_contiguous(*weights_in);
  }
  SPARSEMOE_CHECK(n * std::max<int64_t>(n_stages, 1) < INT32_MAX,
                  "codes must hold fewer than 2^31 entries, got shape ", shape_text(codes));
  const Tensor x = with_dense_rows(x_in);
  Tensor sums = empty({n_stages, num_codes, width}, real, x);
  Tensor counts = empty({n_stages, num_codes}, real, x);
  if (counts.numel() > 0) {
    RvqCodeSumsParams p;
    p.n = n, p.width = width, p.n_stages = n_stages, p.n_codes = num_codes;
    p.x = pointer(x), p.x_stride = row_stride(x), p.dtype = dtype;
    p.codes = pointer<int32_t>(codes), p.codebooks = pointer(codebooks);
    p.weights = pointer(weights), p.after = after;
    p.sums = mutable_pointer(sums), p.counts = mutable_pointer(counts);
    const Tensor space = workspace(x.is_cuda() ? rvq_code_sums_workspace_bytes(p) : 0, x);
    p.workspace = mutable_pointer(space);
    SPARSEMOE_RUN(rvq_code_sums, x, p);
  }
  return {sums, counts};
}

void rvq_ema_(const Tensor& codebooks, const Tensor& cluster_size, const Tensor& embed_sum,
              const Tensor& sums_in, const Tensor& counts_in, double decay, double epsilon) {
  SPARSEMOE_CHECK(decay >= 0 && decay <= 1, "decay must be from 0 to 1, got ", decay);
  SPARSEMOE_CHECK(std::isfinite(epsilon) && epsilon > 0, "epsilon must be finite and above 0, got ",
                  epsilon);
  check_dim(codebooks, 3, "codebooks", kCodebooksShape);
  const ScalarType type = codebooks.scalar_type();
  SPARSEMOE_CHECK(type == ScalarType::Float || type == ScalarType::Double,
                  "codebooks must be float32 or (on the CPU) float64, got ", dtype_text(type));
  const DType dtype = real_dtype(codebooks, "codebooks");
  const struct {
    const Tensor* tensor;
    int64_t dim;
    const char *name, *shape;
  } others[] = {{&cluster_size, 2, "cluster_size", "[stages, codes]"},
                {&embed_sum, 3, "embed_sum", kCodebooksShape},
                {&sums_in, 3, "sums", kCodebooksShape},
                {&counts_in, 2, "counts", "[stages, codes]"}};
  for (const auto& other : others) {
    check_dim(*other.tensor, other.dim, other.name, other.shape);
    for (int64_t i = 0; i < other.dim; ++i) {
      check_size(*other.tensor, i, codebooks.size(i), other.name, other.shape);
    }
    check_type(*other.tensor, type, other.name);
    check_device(*other.tensor, codebooks, other.name, "codebooks");
  }
  SPARSEMOE_CHECK(
      codebooks.is_contiguous() && cluster_size.is_contiguous() && embed_sum.is_contiguous(),
      "codebooks, cluster_size and embed_sum must be contiguous: they are changed in place");
  if (cluster_size.numel() == 0) return;
  const Tensor sums = as_contiguous(sums_in), counts = as_contiguous(counts_in);
  RvqEmaParams p;
  p.n_stages = codebooks.size(0), p.n_codes = codebooks.size(1), p.width = codebooks.size(2);
  p.decay = decay, p.epsilon = epsilon, p.dtype = dtype;
  p.codebooks = mutable_pointer(codebooks), p.cluster_size = mutable_pointer(cluster_size);
  p.embed_sum = mutable_pointer(embed_sum), p.sums = pointer(sums), p.counts = pointer(counts);
  SPARSEMOE_RUN(rvq_ema, codebooks, p);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparsemoe, CPU, m) {
  m.impl("rvq_code_sums", TORCH_BOX(&rvq_code_sums));
  m.impl("rvq_ema_", TORCH_BOX(&rvq_ema_));
}
STABLE_TORCH_LIBRARY_IMPL(sparsemoe, CUDA, m) {
  m.impl("rvq_code_sums", TORCH_BOX(&rvq_code_sums));
  m.impl("rvq_ema_", TORCH_BOX(&rvq_ema_));
}

}  // namespace sparsemoe
