#include "rvq/code_sums.h"
#include "rvq/code_sums_workspace.h"
#include "rvq/residuals.cuh"

namespace sparsemoe {
namespace {

constexpr int kCountThreads = 256, kScanThreads = 1024;

struct Sorting {
  RvqCodeSumsParams p;
  int64_t chunk_rows, n_chunks, n_pieces, n_partial;
  int32_t *starts, *order;
  int4* pieces;
  int2* parts;
  float* partial;

  Sorting(const RvqCodeSumsParams& params, const RvqCodeSumsSpace& space) : p(params) {
    char* base = static_cast<char*>(p.workspace);
    chunk_rows = space.chunk_rows, n_chunks = space.n_chunks;
    n_pieces = space.n_pieces, n_partial = space.n_partial;
    starts = reinterpret_cast<int32_t*>(base + space.starts);
    order = reinterpret_cast<int32_t*>(base + space.order);
    pieces = reinterpret_cast<int4*>(base + space.pieces);
    parts = reinterpret_cast<int2*>(base + space.parts);
    partial = reinterpret_cast<float*>(base + space.partial);
  }
  __device__ int32_t* starts_of(int stage, int64_t chunk) const {
    return starts + (stage * n_chunks + chunk) * p.n_codes;
  }
};

// --- sorting rows by code, in order ---

// The rows of each code in each chunk; starts have been cleared.
__global__ void __launch_bounds__(kCountThreads) count_kernel(const Sorting s) {
  const int stage = blockIdx.y;
  int32_t* counts = s.starts_of(stage, blockIdx.x);
  const int64_t first = blockIdx.x * s.chunk_rows, last = min(first + s.chunk_rows, s.p.n);
  for (int64_t row = first + threadIdx.x; row < last; row += kCountThreads) {
    const int code = s.p.codes[row * s.p.n_stages + stage];
    if (uint32_t(code) < uint64_t(s.p.n_codes)) atomicAdd(counts + code, 1);
  }
}

// The sum of the values of this thread and those before, over the block.
__device__ int block_scan(int v, int* of_warp) {
  int sum = warp_scan(v);
  __syncthreads();
  if (lane_id() == 31) of_warp[warp_id()] = sum;
  __syncthreads();
  if (warp_id() == 0) {
    of_warp[lane_id()] = warp_scan(of_warp[lane_id()]);
  }
  __syncthreads();
  return sum + (warp_id() > 0 ? of_warp[warp_id() - 1] : 0);
}

// Counts become places; codes are cut into pieces. A block a stage.
__global__ void __launch_bounds__(kScanThreads) scan_kernel(const Sorting s) {
  __shared__ int of_warp[32], total[3];
  const int stage = blockIdx.x, n_codes = int(s.p.n_codes);
  int4* pieces = s.pieces + stage * s.n_pieces;
  int rows_before = 0, pieces_before = 0, parts_before = 0;
  for (int first = 0; first < n_codes; first += kScanThreads) {
    const int code = first + threadIdx.x;
    int rows = 0;
    if (code < n_codes) {
#pragma unroll 8
      for (int64_t c = 0; c < s.n_chunks; ++c) rows += s.starts_of(stage, c)[code];
    }
    const int n_pieces =
        code < n_codes ? max((rows + int(kPieceRows) - 1) / int(kPieceRows), 1) : 0;
    const int n_parts = n_pieces > 1 ? n_pieces : 0;
    const int row_end = rows_before + block_scan(rows, of_warp);
    const int piece_end = pieces_before + block_scan(n_pieces, of_warp);
    const int part_end = parts_before + block_scan(n_parts, of_warp);
    if (code < n_codes) {
      int place = row_end - rows;
#pragma unroll 8
      for (int64_t c = 0; c < s.n_chunks; ++c) {
        int32_t* start = s.starts_of(stage, c) + code;
        const int count = *start;
        *start = place;
        place += count;
      }
      static_cast<float*>(s.p.counts)[stage * s.p.n_codes + code] = float(rows);
      s.parts[stage * s.p.n_codes + code] = make_int2(part_end - n_parts, n_parts);
      for (int i = 0; i < n_pieces; ++i) {
        const int done = i * int(kPieceRows);
        pieces[piece_end - n_pieces + i] =
            make_int4(code, row_end - rows + done, min(rows - done, int(kPieceRows)),
                      n_parts ? part_end - n_parts + i : -1);
      }
    }
    if (threadIdx.x == kScanThreads - 1)
      total[0] = row_end, total[1] = piece_end, total[2] = part_end;
    __syncthreads();
    rows_before = total[0], pieces_before = total[1], parts_before = total[2];
    __syncthreads();
  }
  for (int64_t i = pieces_before + threadIdx.x; i < s.n_pieces; i += kScanThreads) {
    pieces[i] = make_int4(-1, 0, 0, -1);
  }
}

// A row's place is where those of its code begin in its chunk and how many of them come before it.
// A warp a chunk.
__global__ void __launch_bounds__(32) place_kernel(const Sorting s) {
  const int stage = blockIdx.y;
  volatile int32_t* starts = s.starts_of(stage, blockIdx.x);
  const int64_t first = blockIdx.x * s.chunk_rows, last = min(first + s.chunk_rows, s.p.n);
  for (int64_t from = first; from < last; from += 32) {
    const int64_t row = from + lane_id();
    int code = row < last ? s.p.codes[row * s.p.n_stages + stage] : -1;
    if (uint32_t(code) >= uint64_t(s.p.n_codes)) code = -1;
    const unsigned same = __match_any_sync(kFullWarp, code);
    const int before = __popc(same & ((1u << lane_id()) - 1));
    if (code >= 0) s.order[stage * s.p.n + starts[code] + before] = int32_t(row);
    __syncwarp();
    if (code >= 0 && before == 0) starts[code] += __popc(same);
    __syncwarp();
  }
}

// --- sums ---

// One block a piece, one warp for each kPieces * 128 columns.
template <class T, int kPieces, bool kPacked>
__global__ void __launch_bounds__(256) sum_kernel(const Sorting s) {
  constexpr int kAhead = kPieces > 1 ? 2 : 4;
  const RvqCodeSumsParams& p = s.p;
  const int stage = blockIdx.y, width = int(p.width), n_stages = int(p.n_stages);
  const int4 piece = s.pieces[stage * s.n_pieces + blockIdx.x];
  if (piece.x < 0) return;
  const int32_t* order = s.order + stage * p.n + piece.y;
  const float* codebooks = static_cast<const float*>(p.codebooks);
  const float* weights = static_cast<const float*>(p.weights);
  const int n_before = codebooks ? stage + p.after : 0;
  float* to = piece.w < 0 ? static_cast<float*>(p.sums) + (stage * p.n_codes + piece.x) * width
                          : s.partial + (stage * s.n_partial + piece.w) * width;
  for (int first = warp_id() * kPieces * kWalkColumns; first < width;
       first += blockDim.x / 32 * kPieces * kWalkColumns) {
    Columns<kPieces> sum;
    sum.clear();
    for (int i = 0; i < piece.z; i += kAhead) {
      Columns<kPieces> residual[kAhead];
      int64_t row[kAhead];
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        row[j] = __ldg(order + min(i + j, piece.z - 1));
        residual[j].template load<kPacked>(static_cast<const T*>(p.x) + row[j] * p.x_stride, first,
                                           width);
      }
      for (int q = 0; q < n_before; ++q) {
#pragma unroll
        for (int j = 0; j < kAhead; ++j) {
          const int code = __ldg(p.codes + row[j] * n_stages + q);
          if (uint32_t(code) >= uint64_t(p.n_codes)) continue;
          Columns<kPieces> e;
          e.template load<kPacked>(codebooks + (q * p.n_codes + code) * width, first, width);
          residual[j].subtract(e);
        }
      }
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        if (i + j >= piece.z) continue;
        sum.add(weights ? __ldg(weights + row[j] * n_stages + stage) : 1.0f, residual[j]);
      }
    }
    sum.template store<kPacked>(to, first, width);
  }
}

// The sums of codes with several pieces.
template <class T, int kPieces, bool kPacked>
__global__ void __launch_bounds__(256) sum_parts_kernel(const Sorting s) {
  const int stage = blockIdx.y, width = int(s.p.width);
  const int2 parts = s.parts[stage * s.p.n_codes + blockIdx.x];
  if (parts.y == 0) return;
  const float* from = s.partial + (stage * s.n_partial + parts.x) * width;
  float* to = static_cast<float*>(s.p.sums) + (stage * s.p.n_codes + blockIdx.x) * width;
  for (int first = warp_id() * kPieces * kWalkColumns; first < width;
       first += blockDim.x / 32 * kPieces * kWalkColumns) {
    Columns<kPieces> sum;
    sum.clear();
#pragma unroll 4
    for (int i = 0; i < parts.y; ++i) {
      Columns<kPieces> part;
      part.template load<kPacked>(from + int64_t(i) * width, first, width);
      sum.add(part);
    }
    sum.template store<kPacked>(to, first, width);
  }
}

template <class T, int kPieces, bool kPacked>
int sum_pieces(const Sorting& s, cudaStream_t stream) {
  const int warps = int(std::min<int64_t>(ceil_div(s.p.width, kPieces * kWalkColumns), 8));
  const unsigned n_stages = unsigned(s.p.n_stages);
  sum_kernel<T, kPieces, kPacked>
      <<<dim3(unsigned(s.n_pieces), n_stages), warps * 32, 0, stream>>>(s);
  if (s.n_partial > 0) {
    sum_parts_kernel<T, kPieces, kPacked>
        <<<dim3(unsigned(s.p.n_codes), n_stages), warps * 32, 0, stream>>>(s);
  }
  return int(cudaGetLastError());
}

}  // namespace

int rvq_code_sums_cuda(const RvqCodeSumsParams& p, void* stream_) {
  const cudaStream_t stream = cudaStream_t(stream_);
  const RvqCodeSumsSpace space(p);
  const Sorting s(p, space);
  const size_t bytes = size_t(p.n_stages * s.n_chunks * p.n_codes * 4);
  const cudaError_t error = cudaMemsetAsync(s.starts, 0, bytes, stream);
  if (error != cudaSuccess) return int(error);
  const dim3 chunks(unsigned(s.n_chunks), unsigned(p.n_stages));
  count_kernel<<<chunks, kCountThreads, 0, stream>>>(s);
  scan_kernel<<<unsigned(p.n_stages), kScanThreads, 0, stream>>>(s);
  place_kernel<<<chunks, 32, 0, stream>>>(s);
  return with_cuda_dtype(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const bool packed = packs_of_4<T>(p.x, p.width, p.x_stride) &&
                        packs_of_4<float>(p.codebooks, p.width, p.width) &&
                        packs_of_4<float>(p.sums, p.width, p.width);
    return packed ? sum_pieces<T, 1, true>(s, stream) : sum_pieces<T, 1, false>(s, stream);
  });
}

// --- moving averages ---

namespace {

constexpr int kEmaThreads = 256, kEmaCodes = 8;

__global__ void __launch_bounds__(kEmaThreads) ema_counts_kernel(const RvqEmaParams p) {
  const int64_t n = p.n_stages * p.n_codes;
  const int64_t i = blockIdx.x * int64_t(kEmaThreads) + threadIdx.x;
  const float decay = float(p.decay), rest = float(1 - p.decay);
  float* size = static_cast<float*>(p.cluster_size);
  if (i < n) size[i] = decay * size[i] + rest * static_cast<const float*>(p.counts)[i];
}

// A warp a code. Each block adds up the sizes of its stage, all in the same order.
__global__ void __launch_bounds__(kEmaThreads) ema_codes_kernel(const RvqEmaParams p) {
  __shared__ float of_warp[kEmaThreads / 32];
  const int64_t stage = blockIdx.y;
  const float* size = static_cast<const float*>(p.cluster_size) + stage * p.n_codes;
  float total = 0;
  for (int64_t i = threadIdx.x; i < p.n_codes; i += kEmaThreads) total += size[i];
  total = warp_sum(total);
  if (lane_id() == 0) of_warp[warp_id()] = total;
  __syncthreads();
  total = 0;
  for (int w = 0; w < kEmaThreads / 32; ++w) total += of_warp[w];
  const int64_t code = blockIdx.x * int64_t(kEmaCodes) + warp_id();
  if (code >= p.n_codes) return;
  const float epsilon = float(p.epsilon);
  const float smoothed = (size[code] + epsilon) / (total + float(p.n_codes) * epsilon) * total;
  const float decay = float(p.decay), rest = float(1 - p.decay);
  const int64_t at = (stage * p.n_codes + code) * p.width;
  for (int64_t d = lane_id(); d < p.width; d += 32) {
    float* sum = static_cast<float*>(p.embed_sum) + at + d;
    const float value = decay * *sum + rest * static_cast<const float*>(p.sums)[at + d];
    *sum = value;
    static_cast<float*>(p.codebooks)[at + d] = value / smoothed;
  }
}

}  // namespace

int rvq_ema_cuda(const RvqEmaParams& p, void* stream_) {
  const cudaStream_t stream = cudaStream_t(stream_);
  const int64_t n = p.n_stages * p.n_codes;
  ema_counts_kernel<<<unsigned(ceil_div(n, kEmaThreads)), kEmaThreads, 0, stream>>>(p);
  const dim3 grid(unsigned(ceil_div(p.n_codes, kEmaCodes)), unsigned(p.n_stages));
  ema_codes_kernel<<<grid, kEmaThreads, 0, stream>>>(p);
  return int(cudaGetLastError());
}

}  // namespace sparsemoe
