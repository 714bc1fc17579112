// What the CPU kernels that move rows by a plan share. Included once for each instruction set: no
// include guard. Indices of a plan that are out of range stand for none.

namespace sparsemoe {
namespace SPARSEMOE_ISA {

// Rows that are read or written side by side.
constexpr int kRowsAtOnce = 4;

// The places of a token's rows in token_rows.
struct Entries {
  int64_t next, stop;
};
inline Entries entries_of(const RowMap& map, int64_t token) {
  if (!map.token_offsets) return {token * map.top_k, (token + 1) * map.top_k};
  return {std::max<int64_t>(map.token_offsets[token], 0),
          std::min<int64_t>(map.token_offsets[token + 1], map.n_rows)};
}

// Takes up to kRowsAtOnce rows, and with them the places they stand in.
inline int take_rows(const RowMap& map, Entries* entries, int64_t* row, int64_t* entry) {
  int held = 0;
  for (; entries->next < entries->stop && held < kRowsAtOnce; ++entries->next) {
    row[held] = uint32_t(map.token_rows[entries->next]);
    entry[held] = entries->next;
    if (row[held] < map.n_rows) ++held;
  }
  return held;
}

// The pair of an entry, or -1.
inline int64_t pair_of(const RowMap& map, int64_t entry, int64_t row) {
  if (!map.token_offsets) return entry;
  const int64_t pair = uint32_t(map.row_pair[row]);
  return pair < map.n_rows ? pair : -1;
}

// Calls f with a constant equal to n, which is 0 to kRowsAtOnce.
template <class F>
void with_count(int n, F f) {
  switch (n) {
    case 0:
      return f(std::integral_constant<int, 0>());
    case 1:
      return f(std::integral_constant<int, 1>());
    case 2:
      return f(std::integral_constant<int, 2>());
    case 3:
      return f(std::integral_constant<int, 3>());
    default:
      return f(std::integral_constant<int, kRowsAtOnce>());
  }
}

// Clears the rows without a token in the share of all rows that goes with tokens [begin, end) of
// n_parts.
inline void clear_unused(const RowMap& map, int64_t begin, int64_t end, int64_t n_parts, char* rows,
                         int64_t row_bytes) {
  const int64_t share = map.n_rows / n_parts;
  const int64_t stop = end == n_parts ? map.n_rows : share * end;
  for (int64_t row = share * begin; row < stop; ++row) {
    if (uint32_t(map.row_token[row]) >= uint64_t(map.n_tokens)) {
      std::memset(rows + row * row_bytes, 0, row_bytes);
    }
  }
}

}  // namespace SPARSEMOE_ISA
}  // namespace sparsemoe
