#include "moe/experts_hopper_weight.cuh"

namespace sparsemoe {
namespace hopper {

template int weight_grad_launch<__half, false, false>(const WeightGradParams&, void*);
template int weight_grad_launch<__half, true, false>(const WeightGradParams&, void*);
template int weight_grad_launch<__half, true, true>(const WeightGradParams&, void*);

}  // namespace hopper
}  // namespace sparsemoe
