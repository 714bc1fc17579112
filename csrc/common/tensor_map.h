// Descriptions of tensors in device memory for the tensor memory accelerator (TMA).
#pragma once

#include <cuda.h>

#include <cstdint>

#include "common/dtype.h"

namespace sparsemoe {

// Boxes are 64 elements of 16 bits wide, one row of 128 bytes in shared memory, swizzled.
constexpr int kBoxWidth = 64;

// Element (i0, i1, i2, i3) of 16 bits lies at i0 + i1 * stride1 + i2 * stride2 + i3 * stride3;
// strides are multiples of 8. A load of what lies outside gives zeros, a store leaves it out. Boxes
// are rows1 x rows2 rows. False where the driver refuses.
bool make_tensor_map(CUtensorMap* map, DType dtype, const void* data, const int64_t (&sizes)[4],
                     const int64_t (&strides)[3], int rows1, int rows2 = 1);

// Runs of at most `run` rows of a matrix [n_rows, parts * width]: box (c, part, run - n, first + n)
// holds rows first .. first + n - 1, and outside of them as above, so that a run may end anywhere.
bool make_row_run_map(CUtensorMap* map, DType dtype, const void* data, int64_t n_rows,
                      int64_t width, int64_t parts, int64_t stride, int run);

}  // namespace sparsemoe
