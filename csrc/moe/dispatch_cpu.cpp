// Copies only: one variant serves every processor.
#include "moe/dispatch.h"

#include <cstring>

#include "common/parallel.h"

namespace sparsemoe {

void dispatch_cpu(const DispatchParams& p) {
  const char* x = static_cast<const char*>(p.x);
  char* rows = static_cast<char*>(p.rows);
  parallel_for(0, p.map.n_rows, grain_for(p.row_bytes), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const uint32_t token = p.map.row_token[row];
      if (token >= uint64_t(p.map.n_tokens)) {
        std::memset(rows + row * p.row_bytes, 0, p.row_bytes);
      } else {
        std::memcpy(rows + row * p.row_bytes, x + int64_t(token) * p.x_stride_bytes, p.row_bytes);
      }
    }
  });
}

}  // namespace sparsemoe
