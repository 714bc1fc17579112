#include "moe/experts_hopper_rows.cuh"

namespace sparsemoe {
namespace hopper {

template int rows_product_launch<__half, true, true, true>(const RowsProductParams&, void*);
template int rows_product_launch<__half, true, true, false>(const RowsProductParams&, void*);
template int rows_product_launch<__half, true, false, true>(const RowsProductParams&, void*);
template int rows_product_launch<__half, true, false, false>(const RowsProductParams&, void*);

}  // namespace hopper
}  // namespace sparsemoe
