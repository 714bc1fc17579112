#include "moe/experts_portable_rows.cuh"
#include "moe/experts_portable_weight.cuh"

namespace sparsemoe {
namespace portable {

template int rows_product<__nv_bfloat16>(const RowsProductParams& p, void* stream);
template int hidden_backward<__nv_bfloat16>(const HiddenBackwardParams& p, void* stream);
template int weight_grad<__nv_bfloat16>(const WeightGradParams& p, void* stream);

}  // namespace portable
}  // namespace sparsemoe
