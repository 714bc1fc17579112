#include "rvq/encode.h"

#define SPARSEMOE_THIS_FILE "rvq/encode_cpu.cpp"
#include "common/for_each_isa.h"

#ifndef SPARSEMOE_DISPATCH
#include "rvq/nearest_cpu.h"

namespace sparsemoe {
namespace SPARSEMOE_ISA {

// Vectors that are taken through the stages together: enough that codes are not read too often, and
// residuals of at most so many bytes.
constexpr int64_t kBlockRows = 16 * kTileRows;
constexpr int64_t kBlockBytes = 1 << 20;
constexpr int64_t kAhead = 4;  // vectors for which the chosen code is fetched early

template <class T>
class Encoder {
 public:
  using Real = acc_t<T>;

  Encoder(const RvqEncodeParams& p, const std::vector<Stage>& stages, int64_t rows)
      : p_(p),
        stages_(stages),
        residuals_(rows * p.width),
        sums_(rows * p.width),
        searcher_(stages.empty() ? 0 : rows, p.width) {}

  void encode(int64_t first, int64_t count) {
    const int64_t width = p_.width;
    std::fill(sums_.begin(), sums_.end(), Real(0));
    for (int64_t i = 0; i < count; ++i) {
      load_row(static_cast<const T*>(p_.x) + (first + i) * p_.x_stride, width, residual(i));
    }
    for (int64_t q = 0; q < p_.n_stages; ++q) {
      int32_t* codes = p_.codes + first * p_.n_stages + q;
      Real* errors = static_cast<Real*>(p_.errors) + first * p_.n_stages + q;
      const Real* codebook = static_cast<const Real*>(p_.codebooks) + q * p_.n_codes * width;
      search(q, codebook, count, codes);
      const auto chosen = [&](int64_t i) { return codebook + codes[i * p_.n_stages] * width; };
      for (int64_t i = 0; i < count; ++i) {
        prefetch_row(chosen(std::min(i + kAhead, count - 1)), width);
        errors[i * p_.n_stages] =
            take_code(chosen(i), width, residual(i), sums_.data() + i * width);
      }
    }
    for (int64_t i = 0; i < count; ++i) {
      store_row(sums_.data() + i * width, width,
                static_cast<T*>(p_.quantized) + (first + i) * width);
    }
  }

 private:
  Real* residual(int64_t i) { return residuals_.data() + i * p_.width; }

  void search(int64_t q, const Real* codebook, int64_t count, int32_t* codes) {
    if constexpr (std::is_same_v<Real, float>) {
      if (!stages_.empty()) {
        return searcher_.search(stages_[q], residuals_.data(), count, codes, p_.n_stages);
      }
    }
    for (int64_t i = 0; i < count; ++i) {
      codes[i * p_.n_stages] =
          nearest_in_double(p_.metric, residual(i), codebook, p_.n_codes, p_.width);
    }
  }

  const RvqEncodeParams& p_;
  const std::vector<Stage>& stages_;
  std::vector<Real> residuals_, sums_;
  Searcher searcher_;
};

template <class T>
void encode_rows(const RvqEncodeParams& p) {
  const std::vector<Stage> stages = packed_stages<acc_t<T>>(p, p.metric);
  const int64_t tiles_at_once =
      std::max<int64_t>(1, std::min(kBlockRows, kBlockBytes / (p.width * 4)) / kTileRows);
  const int64_t n_tiles = (p.n + kTileRows - 1) / kTileRows;
  const int64_t grain = grain_for(p.n_stages * p.n_codes * p.width);
  parallel_for(0, n_tiles, grain, [&](int64_t begin, int64_t end) {
    const int64_t block = std::min(tiles_at_once, end - begin) * kTileRows;
    Encoder<T> encoder(p, stages, block);
    const int64_t stop = std::min(end * kTileRows, p.n);
    for (int64_t first = begin * kTileRows; first < stop; first += block) {
      encoder.encode(first, std::min(block, stop - first));
    }
  });
}

template <class T>
void backward_rows(const RvqEncodeBackwardParams& p) {
  using Real = acc_t<T>;
  const int64_t width = p.width;
  const Real* codebooks = static_cast<const Real*>(p.codebooks);
  const int64_t grain = grain_for((p.n_stages + 3) * width * sizeof(Real));
  parallel_for(0, p.n, grain, [&](int64_t begin, int64_t end) {
    std::vector<Real> residual(width), sum(width);
    for (int64_t n = begin; n < end; ++n) {
      load_row(static_cast<const T*>(p.x) + n * p.x_stride, width, residual.data());
      load_row(static_cast<const T*>(p.grad_quantized) + n * width, width, sum.data());
      for (int64_t q = 0; q < p.n_stages; ++q) {
        const int32_t code = p.codes[n * p.n_stages + q];
        if (is_code(code, p.n_codes)) {
          subtract_row(codebooks + (q * p.n_codes + code) * width, width, residual.data());
        }
        const Real factor = 2 * static_cast<const Real*>(p.grad_errors)[n * p.n_stages + q];
        for (int64_t c = 0; c < width; ++c) sum[c] += factor * residual[c];
      }
      store_row(sum.data(), width, static_cast<T*>(p.grad_x) + n * width);
    }
  });
}

void encode(const RvqEncodeParams& p) {
  with_dtype(p.dtype, [&](auto* type) { encode_rows<std::remove_pointer_t<decltype(type)>>(p); });
}

void encode_backward(const RvqEncodeBackwardParams& p) {
  with_dtype(p.dtype, [&](auto* type) { backward_rows<std::remove_pointer_t<decltype(type)>>(p); });
}

}  // namespace SPARSEMOE_ISA
}  // namespace sparsemoe

#else
namespace sparsemoe {

void rvq_encode_cpu(const RvqEncodeParams& p) { SPARSEMOE_BEST_ISA(encode, p); }
void rvq_encode_backward_cpu(const RvqEncodeBackwardParams& p) {
  SPARSEMOE_BEST_ISA(encode_backward, p);
}

}  // namespace sparsemoe
#endif
