#include "rvq/encode_hopper.cuh"

namespace sparsemoe {
namespace hopper {

template int encode_tiles<8>(const EncodeTilesParams& p, void* stream);

}  // namespace hopper
}  // namespace sparsemoe
