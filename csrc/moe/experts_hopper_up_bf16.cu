#include "moe/experts_hopper_rows.cuh"

namespace sparsemoe {
namespace hopper {

template int rows_product_launch<__nv_bfloat16, true, true, true>(const RowsProductParams&, void*);
template int rows_product_launch<__nv_bfloat16, true, true, false>(const RowsProductParams&, void*);
template int rows_product_launch<__nv_bfloat16, true, false, true>(const RowsProductParams&, void*);
template int rows_product_launch<__nv_bfloat16, true, false, false>(const RowsProductParams&,
                                                                    void*);

}  // namespace hopper
}  // namespace sparsemoe
