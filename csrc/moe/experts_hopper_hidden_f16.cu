#include "moe/experts_hopper_hidden.cuh"

namespace sparsemoe {
namespace hopper {

template int hidden_backward_launch<__half, false, true>(const HiddenBackwardParams&, void*);
template int hidden_backward_launch<__half, false, false>(const HiddenBackwardParams&, void*);
template int hidden_backward_launch<__half, true, true>(const HiddenBackwardParams&, void*);
template int hidden_backward_launch<__half, true, false>(const HiddenBackwardParams&, void*);

}  // namespace hopper
}  // namespace sparsemoe
