#include "moe/experts_hopper_rows.cuh"

namespace sparsemoe {
namespace hopper {

template int rows_product_launch<__half, false, true, false>(const RowsProductParams&, void*);
template int rows_product_launch<__half, false, false, false>(const RowsProductParams&, void*);

}  // namespace hopper
}  // namespace sparsemoe
