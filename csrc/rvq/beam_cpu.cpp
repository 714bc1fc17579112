#include "rvq/encode.h"

#define SPARSEMOE_THIS_FILE "rvq/beam_cpu.cpp"
#include "common/for_each_isa.h"

#ifndef SPARSEMOE_DISPATCH
#include "rvq/packed_codes_cpu.h"

namespace sparsemoe {
namespace SPARSEMOE_ISA {

constexpr int64_t kRows = 96;  // residuals that are multiplied together, about
constexpr int64_t kResultBytes = 1 << 22;

// A sum of codes that may be kept: `code` added to the sum of beam `source`.
struct Candidate {
  double distance;
  int32_t source, code;
};

// The nearest candidates so far, in ascending order; of equals the one that came first.
struct Shortlist {
  Candidate kept[kMaxBeam];
  int64_t size = 0, limit;

  explicit Shortlist(int64_t limit) : limit(limit) {}

  void add(Candidate candidate) {
    if (!(candidate.distance == candidate.distance)) {
      candidate.distance = std::numeric_limits<double>::infinity();
    }
    if (size == limit && !(candidate.distance < kept[size - 1].distance)) return;
    int64_t at = size < limit ? size++ : size - 1;
    for (; at > 0 && candidate.distance < kept[at - 1].distance; --at) kept[at] = kept[at - 1];
    kept[at] = candidate;
  }
};

// The lowest numbers so far, in ascending order.
struct LowestNumbers {
  float kept[kMaxBeam];
  int64_t limit;

  explicit LowestNumbers(int64_t limit) : limit(limit) {
    std::fill_n(kept, limit, std::numeric_limits<float>::infinity());
  }
  float last() const { return kept[limit - 1]; }
  void add(float value) {
    if (!(value < last())) return;
    int64_t at = limit - 1;
    for (; at > 0 && value < kept[at - 1]; --at) kept[at] = kept[at - 1];
    kept[at] = value;
  }
};

// Every vector has beams, each with the codes chosen so far and the residual they leave.
template <class Real>
struct Beams {
  std::vector<Real> residuals;  // [vectors, beams, width]
  std::vector<int32_t> codes;   // [vectors, beams, stages]

  Beams(const RvqBeamParams& p, int64_t vectors)
      : residuals(vectors * p.beam * p.width), codes(vectors * p.beam * p.n_stages) {}
};

template <class T>
class BeamEncoder {
 public:
  using Real = acc_t<T>;

  BeamEncoder(const RvqBeamParams& p, const std::vector<Stage>& stages, int64_t vectors)
      : p_(p),
        stages_(stages),
        now_(p, vectors),
        next_(p, vectors),
        residual_(p.width),
        sum_(p.width),
        stride_(p.width + 16),
        results_stride_(stages.empty() ? 0 : stages[0].n_panels() * kPanelCodes) {
    if (stages.empty()) return;
    const int64_t rows = vectors * p.beam;
    centred_ = Aligned<float>((rows + kTileRows) * stride_);
    results_ = Aligned<float>((rows + kTileRows) * results_stride_);
    squares_.resize(rows);
  }

  void encode(int64_t first, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      load_row(vector(first + i), p_.width, now_.residuals.data() + i * p_.width);
    }
    int64_t n_beams = 1;
    for (int64_t q = 0; q < p_.n_stages; ++q) {
      const int64_t kept = std::min(p_.beam, n_beams * p_.n_codes);
      if (!stages_.empty()) multiply_rows(stages_[q], count * n_beams);
      for (int64_t i = 0; i < count; ++i) {
        Shortlist best(kept);
        if (stages_.empty()) {
          list_all(q, i, n_beams, &best);
        } else {
          list_nearest(q, i, n_beams, &best);
        }
        for (int64_t b = 0; b < kept; ++b) extend(q, i * n_beams, i * kept + b, best.kept[b]);
      }
      std::swap(now_, next_);
      n_beams = kept;
    }
    for (int64_t i = 0; i < count; ++i)
      finish(first + i, now_.codes.data() + i * n_beams * p_.n_stages);
  }

 private:
  const T* vector(int64_t n) const { return static_cast<const T*>(p_.x) + n * p_.x_stride; }
  const Real* code(int64_t q, int64_t j) const {
    return static_cast<const Real*>(p_.codebooks) + (q * p_.n_codes + j) * p_.width;
  }
  double distance(int64_t row, int64_t q, int64_t j) const {
    return distance_in_double(Metric::l2, now_.residuals.data() + row * p_.width, code(q, j),
                              p_.width);
  }

  void list_all(int64_t q, int64_t i, int64_t n_beams, Shortlist* best) const {
    for (int64_t b = 0; b < n_beams; ++b) {
      for (int64_t j = 0; j < p_.n_codes; ++j) {
        best->add({distance(i * n_beams + b, q, j), int32_t(b), int32_t(j)});
      }
    }
  }

  // |r - e|^2, but for rounding and |r|^2, of all residuals and codes.
  void multiply_rows(const Stage& stage, int64_t rows) {
    for (int64_t row = 0; row < rows; ++row) {
      squares_[row] = stage.centred(as_float(now_.residuals.data() + row * p_.width),
                                    centred_.data() + row * stride_);
    }
    for (int64_t panel = 0; panel < stage.n_panels(); ++panel) {
      for (int64_t row = 0; row < rows; row += kTileRows) {
        keep_all({stage, panel, centred_.data() + row * stride_, stride_},
                 results_.data() + row * results_stride_ + panel * kPanelCodes, results_stride_);
      }
    }
  }
  static const float* as_float(const float* row) { return row; }
  static const float* as_float(const double*) { return nullptr; }  // stages are never packed

  // Compares in double those that rounding leaves in doubt.
  void list_nearest(int64_t q, int64_t i, int64_t n_beams, Shortlist* best) const {
    LowestNumbers lowest(best->limit);
    const float longest = stages_[q].longest();
    float rounding = 0;
    for (int64_t b = 0; b < n_beams; ++b) {
      const float square = squares_[i * n_beams + b], length = std::sqrt(square) + longest;
      rounding = std::max(rounding, stages_[q].rounding(std::sqrt(square), longest) +
                                        0x1.1p-24f * (float(p_.width) * square + length * length));
      for (int64_t j = 0; j < results_stride_; j += kPanelCodes) {
        const float* results = results_.data() + (i * n_beams + b) * results_stride_ + j;
        float least = std::numeric_limits<float>::infinity();
#pragma omp simd reduction(min : least)
        for (int64_t l = 0; l < kPanelCodes; ++l) least = std::min(least, results[l]);
        if (!(least + square < lowest.last())) continue;
        for (int64_t l = 0; l < kPanelCodes; ++l) lowest.add(results[l] + square);
      }
    }
    const float limit = lowest.last() + 2 * rounding;
    for (int64_t b = 0; b < n_beams; ++b) {
      const float square = squares_[i * n_beams + b];
      for (int64_t j = 0; j < p_.n_codes; j += kPanelCodes) {
        const float* results = results_.data() + (i * n_beams + b) * results_stride_ + j;
        int32_t beyond = 0;
        for (int64_t l = 0; l < kPanelCodes; ++l) beyond += results[l] + square > limit;
        if (beyond == kPanelCodes) continue;
        for (int64_t l = 0; l < std::min(kPanelCodes, p_.n_codes - j); ++l) {
          if (results[l] + square > limit) continue;
          best->add({distance(i * n_beams + b, q, j + l), int32_t(b), int32_t(j + l)});
        }
      }
    }
  }

  // Row `to` of the next beams, from those that begin at `first`.
  void extend(int64_t q, int64_t first, int64_t to, const Candidate& candidate) {
    const int64_t from = first + candidate.source;
    Real* residual = next_.residuals.data() + to * p_.width;
    std::copy_n(now_.residuals.data() + from * p_.width, p_.width, residual);
    subtract_row(code(q, candidate.code), p_.width, residual);
    int32_t* codes = next_.codes.data() + to * p_.n_stages;
    std::copy_n(now_.codes.data() + from * p_.n_stages, q, codes);
    codes[q] = candidate.code;
  }

  void finish(int64_t n, const int32_t* codes) {
    load_row(vector(n), p_.width, residual_.data());
    std::fill(sum_.begin(), sum_.end(), Real(0));
    for (int64_t q = 0; q < p_.n_stages; ++q) {
      p_.codes[n * p_.n_stages + q] = codes[q];
      static_cast<Real*>(p_.errors)[n * p_.n_stages + q] =
          take_code(code(q, codes[q]), p_.width, residual_.data(), sum_.data());
    }
    store_row(sum_.data(), p_.width, static_cast<T*>(p_.quantized) + n * p_.width);
  }

  const RvqBeamParams& p_;
  const std::vector<Stage>& stages_;
  Beams<Real> now_, next_;
  std::vector<Real> residual_, sum_;
  int64_t stride_, results_stride_;
  Aligned<float> centred_, results_;  // [rows, stride], [rows, results_stride]
  std::vector<float> squares_;
};

template <class T>
void beam_rows(const RvqBeamParams& p) {
  const std::vector<Stage> stages = packed_stages<acc_t<T>>(p, Metric::l2);
  const int64_t rows = std::min(kRows, kResultBytes / (4 * p.n_codes));
  const int64_t vectors = std::max<int64_t>(1, rows / p.beam);
  const int64_t grain = std::max(vectors, grain_for(p.beam * p.n_stages * p.n_codes * p.width));
  parallel_for(0, p.n, grain, [&](int64_t begin, int64_t end) {
    BeamEncoder<T> encoder(p, stages, std::min(vectors, end - begin));
    for (int64_t first = begin; first < end; first += vectors) {
      encoder.encode(first, std::min(vectors, end - first));
    }
  });
}

void beam_encode(const RvqBeamParams& p) {
  with_dtype(p.dtype, [&](auto* type) { beam_rows<std::remove_pointer_t<decltype(type)>>(p); });
}

}  // namespace SPARSEMOE_ISA
}  // namespace sparsemoe

#else
namespace sparsemoe {

void rvq_beam_encode_cpu(const RvqBeamParams& p) { SPARSEMOE_BEST_ISA(beam_encode, p); }

}  // namespace sparsemoe
#endif
