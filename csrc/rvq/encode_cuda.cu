#include <cstdlib>
#include <cstring>

#include "common/cuda.cuh"
#include "rvq/encode_hopper.h"
#include "rvq/encode_kernels.h"
#include "rvq/encode_workspace.h"

namespace sparsemoe {
namespace {

bool on_hopper(const RvqEncodeParams& p, const RvqEncodeSpace& space) {
  const char* kernels = std::getenv("SPARSEMOE_KERNELS");
  if (!runs_sm_90a() || (kernels && std::strcmp(kernels, "portable") == 0)) return false;
  return space.n_depths <= kMostGeneralDepths && p.n_stages <= kMostGeneralStages &&
         p.n < INT32_MAX;
}
// Whether encode_tiles takes it, which is faster than encode_general.
bool for_tiles(const RvqEncodeParams& p, const RvqEncodeSpace& space) {
  const bool packed = p.width % 4 == 0 && p.x_stride % 4 == 0 && uintptr_t(p.codebooks) % 16 == 0 &&
                      uintptr_t(p.x) % (p.dtype == DType::f32 ? 16 : 8) == 0;
  return packed && space.n_depths <= kMostDepths && p.n_codes <= kMostCodes &&
         p.n_stages <= kMostStages;
}

int tiles_of(int64_t depths, const hopper::EncodeTilesParams& t, void* stream) {
  switch (depths) {
    case 1:
      return hopper::encode_tiles<1>(t, stream);
    case 2:
      return hopper::encode_tiles<2>(t, stream);
    case 4:
      return hopper::encode_tiles<4>(t, stream);
    case 6:
      return hopper::encode_tiles<6>(t, stream);
    default:
      return hopper::encode_tiles<8>(t, stream);
  }
}

}  // namespace

int rvq_encode_cuda(const RvqEncodeParams& p, void* stream) {
  if (p.n_stages == 0) return encode_finish(p, nullptr, stream);
  const RvqEncodeSpace space(p);
  char* const base = static_cast<char*>(p.workspace);
  float* const residuals = reinterpret_cast<float*>(base + space.residuals);
  GroupNotes* const groups = reinterpret_cast<GroupNotes*>(base + space.groups);
  if (!on_hopper(p, space)) {
    const int error = encode_exactly(p, groups, residuals, space.n_blocks, stream);
    return error ? error : encode_finish(p, nullptr, stream);
  }
  hopper::EncodeTilesParams t;
  t.p = p, t.n_tiles = space.n_tiles, t.n_parts = space.n_parts, t.n_padded = space.n_padded;
  t.tiles = base + space.tiles, t.norms2 = reinterpret_cast<float*>(base + space.norms2);
  t.centers = reinterpret_cast<float*>(base + space.centers);
  t.norms = reinterpret_cast<float*>(base + space.norms);
  t.constants = reinterpret_cast<hopper::StageConstants*>(base + space.constants);
  t.late = reinterpret_cast<int32_t*>(base + space.late);
  t.groups = groups;
  t.residuals = residuals;
  const int error = for_tiles(p, space) ? tiles_of(space.n_depths, t, stream)
                                        : hopper::encode_general(t, space.n_depths, stream);
  const LateVectors late{t.late, groups, residuals, space.n_blocks};
  return error ? error : encode_finish(p, &late, stream);
}

}  // namespace sparsemoe
