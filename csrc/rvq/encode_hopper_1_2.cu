#include "rvq/encode_hopper.cuh"

namespace sparsemoe {
namespace hopper {

template int encode_tiles<1>(const EncodeTilesParams& p, void* stream);
template int encode_tiles<2>(const EncodeTilesParams& p, void* stream);

}  // namespace hopper
}  // namespace sparsemoe
