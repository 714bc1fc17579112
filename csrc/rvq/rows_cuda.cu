// What follows from codes, row by row: the sum of the codes, and gradients to the vectors.
#include "rvq/codes.cuh"
#include "rvq/decode.h"
#include "rvq/encode.h"
#include "rvq/residuals.cuh"
#include "rvq/rows.h"

namespace sparsemoe {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / 32;

template <class T, int kPieces, bool kPacked>
__global__ void __launch_bounds__(kThreads) backward_kernel(const RvqEncodeBackwardParams p) {
  const int64_t row = blockIdx.x * int64_t(kWarps) + warp_id();
  if (row >= p.n) return;
  const int width = int(p.width), n_stages = int(p.n_stages);
  const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
  const float* grad_errors = static_cast<const float*>(p.grad_errors) + row * n_stages;
  for (int first = 0; first < width; first += kPieces * kWalkColumns) {
    Columns<kPieces> residual, grad;
    residual.template load<kPacked>(x, first, width);
    grad.template load<kPacked>(static_cast<const T*>(p.grad_quantized) + row * width, first,
                                width);
    Codes codes(p.codes + row * n_stages, n_stages);
#pragma unroll 2
    for (int stage = 0; stage < n_stages; ++stage) {
      const int code = codes.at(stage);
      if (uint32_t(code) < uint64_t(p.n_codes)) {
        Columns<kPieces> e;
        const int64_t at = (stage * p.n_codes + code) * width;
        e.template load<kPacked>(static_cast<const float*>(p.codebooks) + at, first, width);
        residual.subtract(e);
      }
      grad.add(2 * __ldg(grad_errors + stage), residual);
    }
    grad.template store<kPacked>(static_cast<T*>(p.grad_x) + row * width, first, width);
  }
}

template <class T, int kPieces, bool kPacked>
__global__ void __launch_bounds__(kThreads) decode_kernel(const RvqDecodeParams p) {
  const int64_t row = blockIdx.x * int64_t(kWarps) + warp_id();
  if (row >= p.n) return;
  const int width = int(p.width), n_stages = int(p.n_stages);
  for (int first = 0; first < width; first += kPieces * kWalkColumns) {
    Columns<kPieces> sum;
    sum.clear();
    Codes codes(p.codes + row * n_stages, n_stages);
#pragma unroll 4
    for (int stage = 0; stage < n_stages; ++stage) {
      const int code = codes.at(stage);
      if (uint32_t(code) >= uint64_t(p.n_codes)) continue;
      Columns<kPieces> e;
      const int64_t at = (stage * p.n_codes + code) * width;
      e.template load<kPacked>(static_cast<const T*>(p.codebooks) + at, first, width);
      sum.add(e);
    }
    sum.template store<kPacked, true>(static_cast<T*>(p.y) + row * width, first, width);
  }
}

// Launches Kernel<T, pieces, packed> with a warp a row.
#define SPARSEMOE_LAUNCH_ROWS(kernel, dtype, packed_as, p, stream)                         \
  with_cuda_dtype(dtype, [&](auto* type) {                                                 \
    using T = std::remove_pointer_t<decltype(type)>;                                       \
    const bool packed = packed_as;                                                         \
    return with_pieces(p.width, [&](auto pieces) {                                         \
      constexpr int kPieces = decltype(pieces)::value;                                     \
      const auto launched = packed ? kernel<T, kPieces, true> : kernel<T, kPieces, false>; \
      launched<<<unsigned(ceil_div(p.n, kWarps)), kThreads, 0, cudaStream_t(stream)>>>(p); \
      return int(cudaGetLastError());                                                      \
    });                                                                                    \
  })

}  // namespace

int rvq_encode_backward_cuda(const RvqEncodeBackwardParams& p, void* stream) {
  return SPARSEMOE_LAUNCH_ROWS(backward_kernel, p.dtype,
                               (packs_of_4<T>(p.x, p.width, p.x_stride) &&
                                packs_of_4<T>(p.grad_quantized, p.width, p.width) &&
                                packs_of_4<T>(p.grad_x, p.width, p.width) &&
                                packs_of_4<float>(p.codebooks, p.width, p.width)),
                               p, stream);
}

int decode_rows_cuda(const RvqDecodeParams& p, void* stream) {
  return SPARSEMOE_LAUNCH_ROWS(
      decode_kernel, p.dtype,
      (packs_of_4<T>(p.codebooks, p.width, p.width) && packs_of_4<T>(p.y, p.width, p.width)), p,
      stream);
}

}  // namespace sparsemoe
