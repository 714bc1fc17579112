#include "moe/experts_hopper_hidden.cuh"

namespace sparsemoe {
namespace hopper {

template int hidden_backward_launch<__nv_bfloat16, false, true>(const HiddenBackwardParams&, void*);
template int hidden_backward_launch<__nv_bfloat16, false, false>(const HiddenBackwardParams&,
                                                                 void*);
template int hidden_backward_launch<__nv_bfloat16, true, true>(const HiddenBackwardParams&, void*);
template int hidden_backward_launch<__nv_bfloat16, true, false>(const HiddenBackwardParams&, void*);

}  // namespace hopper
}  // namespace sparsemoe
