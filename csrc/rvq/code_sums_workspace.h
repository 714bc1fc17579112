// Where the CUDA kernels of code_sums keep what they need beside their outputs.
#pragma once

#include <algorithm>

#include "rvq/code_sums.h"

namespace sparsemoe {

// Rows are sorted by code in chunks, and summed in pieces of a code's rows.
constexpr int64_t kSortRows = 256, kMostChunks = 128, kPieceRows = 128;

// Offsets in bytes. Arrays of int32 are [n_stages, ..].
struct RvqCodeSumsSpace {
  int64_t chunk_rows, n_chunks;
  int64_t n_pieces, n_partial;  // at most: of all codes, and of those with several
  int64_t starts;               // [n_chunks, n_codes] rows of each code, then where they begin
  int64_t order;                // [n] rows sorted by code
  int64_t pieces;               // [n_pieces, 4] code, first place in order, rows, partial sum or -1
  int64_t parts;                // [n_codes, 2] first partial sum, and how many
  int64_t partial;              // [n_partial, width] reals
  int64_t bytes;

  explicit RvqCodeSumsSpace(const RvqCodeSumsParams& p) {
    const int64_t sorts = (p.n + kSortRows - 1) / kSortRows;
    chunk_rows = std::max<int64_t>((sorts + kMostChunks - 1) / kMostChunks, 1) * kSortRows;
    n_chunks = std::max<int64_t>((p.n + chunk_rows - 1) / chunk_rows, 1);
    n_pieces = p.n_codes + p.n / kPieceRows;
    n_partial = 2 * (p.n / kPieceRows);
    bytes = 0;
    starts = take(p.n_stages * n_chunks * p.n_codes * 4);
    order = take(p.n_stages * p.n * 4);
    pieces = take(p.n_stages * n_pieces * 16);
    parts = take(p.n_stages * p.n_codes * 8);
    partial = take(p.n_stages * n_partial * p.width * 4);
  }

 private:
  int64_t take(int64_t count) {
    const int64_t at = bytes;
    bytes += (count + 255) / 256 * 256;
    return at;
  }
};

inline int64_t rvq_code_sums_workspace_bytes(const RvqCodeSumsParams& p) {
  return RvqCodeSumsSpace(p).bytes;
}

}  // namespace sparsemoe
