#include "moe/experts_hopper_weight.cuh"

namespace sparsemoe {
namespace hopper {

template int weight_grad_launch<__nv_bfloat16, false, false>(const WeightGradParams&, void*);
template int weight_grad_launch<__nv_bfloat16, true, false>(const WeightGradParams&, void*);
template int weight_grad_launch<__nv_bfloat16, true, true>(const WeightGradParams&, void*);

}  // namespace hopper
}  // namespace sparsemoe
