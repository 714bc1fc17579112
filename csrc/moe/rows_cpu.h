// What the CPU kernels that move rows by a plan share. Included once for each instruction set: no
// include guard. Of a plan that was changed by hand, indices out of range stand for none.

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

// The pair of an entry, or -1: then its weight is zero.
inline int64_t pair_of(const RowMap& map, int64_t entry, int64_t row) {
  if (!map.token_offsets) return entry;
  const int64_t pair = uint32_t(map.row_pair[row]);
  return pair < map.n_rows ? pair : -1;
}

// Calls f(token, held, row, entry) for up to kRowsAtOnce rows of a token at a time. Tokens in
// parallel.
template <class F>
void for_each_token(const RowMap& map, int64_t row_bytes, F f) {
  const int64_t per_token = map.n_rows / std::max<int64_t>(map.n_tokens, 1) + 1;
  const int64_t grain = grain_for(per_token * row_bytes);
  parallel_for(0, map.n_tokens, grain, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      Entries entries = entries_of(map, t);
      while (entries.next < entries.stop) {
        int64_t row[kRowsAtOnce], entry[kRowsAtOnce];
        const int held = take_rows(map, &entries, row, entry);
        f(t, held, row, entry);
      }
    }
  });
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

// Clears the rows without a token. Those of a plan by tokens come last.
inline void clear_unused(const RowMap& map, void* rows, int64_t row_bytes) {
  const auto unused = [&](int64_t row) {
    return uint32_t(map.row_token[row]) >= uint64_t(map.n_tokens);
  };
  if (map.n_rows == 0 || (!map.token_offsets && !unused(map.n_rows - 1))) return;
  parallel_for(0, map.n_rows, grain_for(row_bytes), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      if (unused(row)) std::memset(static_cast<char*>(rows) + row * row_bytes, 0, row_bytes);
    }
  });
}

}  // namespace SPARSEMOE_ISA
}  // namespace sparsemoe
