#include "rvq/encode_hopper.cuh"

namespace sparsemoe {
namespace hopper {

template int encode_tiles<4>(const EncodeTilesParams& p, void* stream);
template int encode_tiles<6>(const EncodeTilesParams& p, void* stream);

}  // namespace hopper
}  // namespace sparsemoe
