#include "moe/experts_hopper_hidden.cuh"

namespace sparsemoe {
namespace hopper {

template int hidden_backward_launch<__nv_bfloat16, true>(const HiddenBackwardParams&, void*);
template int hidden_backward_launch<__nv_bfloat16, false>(const HiddenBackwardParams&, void*);

}  // namespace hopper
}  // namespace sparsemoe
