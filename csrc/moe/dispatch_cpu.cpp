#include "moe/dispatch.h"

#define SPARSEMOE_THIS_FILE "moe/dispatch_cpu.cpp"
#include "common/for_each_isa.h"

#ifndef SPARSEMOE_DISPATCH
#include "moe/rows_cpu.h"

namespace sparsemoe {
namespace SPARSEMOE_ISA {

// Copies a line at a time to M places, so that the source is read once.
template <int M>
void copy_to(const char* from, char* const* to, int64_t bytes) {
  constexpr int kLine = 64;
  int64_t c = 0;
  for (; c + kLine <= bytes; c += kLine) {
    char line[kLine];
    std::memcpy(line, from + c, kLine);
    for (int m = 0; m < M; ++m) std::memcpy(to[m] + c, line, kLine);
  }
  for (int m = 0; m < M; ++m) std::memcpy(to[m] + c, from + c, bytes - c);
}

void dispatch(const DispatchParams& p) {
  const RowMap& map = p.map;
  char* rows = static_cast<char*>(p.rows);
  clear_unused(map, rows, p.row_bytes);
  const auto copy = [&](int64_t token, int held, const int64_t* row, const int64_t*) {
    const char* from = static_cast<const char*>(p.x) + token * p.x_stride_bytes;
    char* to[kRowsAtOnce];
    for (int m = 0; m < held; ++m) to[m] = rows + row[m] * p.row_bytes;
    with_count(held, [&](auto count) { copy_to<count>(from, to, p.row_bytes); });
  };
  for_each_token(map, p.row_bytes, copy);
}

}  // namespace SPARSEMOE_ISA
}  // namespace sparsemoe

#else
namespace sparsemoe {

void dispatch_cpu(const DispatchParams& p) { SPARSEMOE_BEST_ISA(dispatch, p); }

}  // namespace sparsemoe
#endif
