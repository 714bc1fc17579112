// Codes as they are multiplied with vectors, and the product. Included once for each instruction
// set: no include guard.

#include "rvq/rows_cpu.h"

namespace sparsemoe {
namespace SPARSEMOE_ISA {

typedef float FloatLanes __attribute__((vector_size(SPARSEMOE_VECTOR_BYTES), may_alias));
typedef int32_t IntLanes __attribute__((vector_size(SPARSEMOE_VECTOR_BYTES), may_alias));
constexpr int kLanes = SPARSEMOE_VECTOR_BYTES / 4;
// A tile of the product: so many vectors by so many registers of codes, as registers can hold.
constexpr int kTileRows = SPARSEMOE_VECTOR_BYTES == 64 ? 12 : 4;
constexpr int kTileLanes = SPARSEMOE_VECTOR_BYTES == 64 ? 2 : 3;
constexpr int64_t kPanelCodes = kTileLanes * kLanes;
constexpr int64_t kWidest = 65536;  // the bounds on rounding hold up to here
constexpr int64_t kFewRows = 8;     // for so few, packing the codes is not worth it

// Zeros that begin at a whole vector. Templates of the standard library are compiled for the
// baseline, and so cannot hold vectors themselves.
template <class T>
class Aligned {
 public:
  explicit Aligned(int64_t size = 0) : space_(size * sizeof(T) + SPARSEMOE_VECTOR_BYTES) {}
  T* data() { return reinterpret_cast<T*>(space_.data() + offset()); }
  const T* data() const { return reinterpret_cast<const T*>(space_.data() + offset()); }

 private:
  size_t offset() const {
    return -reinterpret_cast<uintptr_t>(space_.data()) % SPARSEMOE_VECTOR_BYTES;
  }
  std::vector<char> space_;
};

// By cosine: minus the inner product with the code divided by its norm.
template <class Real>
double distance_in_double(Metric metric, const Real* r, const Real* e, int64_t width) {
  double sum = 0, norm = 0;
  if (metric == Metric::l2) {
#pragma omp simd reduction(+ : sum)
    for (int64_t c = 0; c < width; ++c) {
      const double difference = double(r[c]) - double(e[c]);
      sum += difference * difference;
    }
    return sum;
  }
#pragma omp simd reduction(+ : sum, norm)
  for (int64_t c = 0; c < width; ++c) {
    sum += double(r[c]) * double(e[c]);
    norm += double(e[c]) * double(e[c]);
  }
  return -sum / std::max(std::sqrt(norm), 1e-12);
}

// The codes of one stage as the product reads them.
struct Stage {
  Metric metric;
  int64_t n_codes, width;
  const float* codes;          // [n_codes, width]
  std::vector<float> centre;   // [width]: taken off vectors and codes, so that no offset cancels
  Aligned<float> panels;       // [panel][width][kPanelCodes]: the codes, centred and times -2
  Aligned<float> shifts;       // [panel][kPanelCodes]: their |e|^2; infinite where there is no code
  std::vector<float> lengths;  // [panel]: the largest |e|

  int64_t n_panels() const { return (n_codes + kPanelCodes - 1) / kPanelCodes; }
  float longest() const { return *std::max_element(lengths.begin(), lengths.end()); }

  Stage(Metric metric, const float* codes, int64_t n_codes, int64_t width)
      : metric(metric),
        n_codes(n_codes),
        width(width),
        codes(codes),
        centre(width),
        panels(n_panels() * width * kPanelCodes),
        shifts(n_panels() * kPanelCodes),
        lengths(n_panels()) {}

  // The mean, unless codes are shorter without.
  void find_centre() {
    if (metric == Metric::cosine) return;
    std::vector<double> sum(width);
    int64_t count = 0;
    for (int64_t j = 0; j < n_codes; ++j) {
      const float* e = codes + j * width;
      if (!std::isfinite(squared_norm(e, width))) continue;
      for (int64_t c = 0; c < width; ++c) sum[c] += e[c];
      ++count;
    }
    std::vector<float> mean(width);
    for (int64_t c = 0; c < width; ++c) mean[c] = float(sum[c] / std::max<int64_t>(count, 1));
    double from_zero = 0, from_mean = 0;
    for (int64_t j = 0; j < n_codes; ++j) {
      const float* e = codes + j * width;
      const float norm = squared_norm(e, width);
      if (!std::isfinite(norm)) continue;
      from_zero += std::sqrt(norm);
      from_mean += std::sqrt(squared_distance(e, mean.data(), width));
    }
    if (from_mean < from_zero) centre = mean;
  }

  void pack(int64_t panel) {
    const int64_t first = panel * kPanelCodes;
    float* to = panels.data() + first * width;
    float* shift = shifts.data() + first;
    std::vector<float> e(width);
    for (int64_t i = 0; i < kPanelCodes; ++i) {
      shift[i] = std::numeric_limits<float>::infinity();
      if (first + i >= n_codes) continue;
      const float* code = codes + (first + i) * width;
      const double given = norm_in_double(code);
      if (!std::isfinite(given)) continue;  // a code that is never chosen
      double scale = -2, length = 1;
      if (metric == Metric::cosine) {
        scale = -1 / std::max(given, 1e-12);
        shift[i] = 0;
      } else {
        for (int64_t c = 0; c < width; ++c) e[c] = code[c] - centre[c];
        code = e.data();
        length = norm_in_double(code);
        shift[i] = float(length * length);
      }
      for (int64_t c = 0; c < width; ++c) to[c * kPanelCodes + i] = float(scale * code[c]);
      lengths[panel] = std::max(lengths[panel], float(length));
    }
  }

  // A vector as the product reads it; returns its |r|^2.
  float centred(const float* r, float* row) const {
    for (int64_t c = 0; c < width; ++c) row[c] = r[c] - centre[c];
    return squared_norm(row, width);
  }

  // By how much rounding can have changed the result of a vector and a code of these lengths. In
  // units of 2^-24: 2 width |r||e| from the product; 2 |e| (|r| + |e|) from |e|^2 and from adding
  // it; 2 (|r| + |e|)^2 from the centring. Or (width + 2) |r| for the cosine.
  float rounding(float r, float e) const {
    constexpr float unit = 1.01f * 0x1p-24f;
    const float underflow = float(width) * std::numeric_limits<float>::min();
    if (metric == Metric::cosine) return unit * float(width + 3) * r + underflow;
    return unit * (float(2 * width) * r * e + 5 * (r + e) * (r + e)) + underflow;
  }

 private:
  double norm_in_double(const float* e) const {
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t c = 0; c < width; ++c) sum += double(e[c]) * double(e[c]);
    return std::sqrt(sum);
  }
};

// The codes of all stages, packed; none where they are not used.
template <class Real, class Params>
std::vector<Stage> packed_stages(const Params& p, Metric metric) {
  std::vector<Stage> stages;
  if constexpr (std::is_same_v<Real, float>) {
    if (p.n < kFewRows || p.width > kWidest) return stages;
    const float* codebooks = static_cast<const float*>(p.codebooks);
    for (int64_t q = 0; q < p.n_stages; ++q) {
      stages.emplace_back(metric, codebooks + q * p.n_codes * p.width, p.n_codes, p.width);
    }
    parallel_for(0, p.n_stages, 1, [&](int64_t begin, int64_t end) {
      for (int64_t q = begin; q < end; ++q) stages[q].find_centre();
    });
    const int64_t n_panels = (p.n_codes + kPanelCodes - 1) / kPanelCodes;
    const int64_t grain = grain_for(kPanelCodes * p.width * 4);
    parallel_for(0, p.n_stages * n_panels, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) stages[i / n_panels].pack(i % n_panels);
    });
  }
  return stages;
}

// kTileRows centred vectors, `stride` apart, and a panel of codes.
struct Tile {
  const float *rows, *codes, *shifts;
  int64_t stride, width;

  Tile(const Stage& stage, int64_t panel, const float* rows, int64_t stride)
      : rows(rows),
        codes(stage.panels.data() + panel * kPanelCodes * stage.width),
        shifts(stage.shifts.data() + panel * kPanelCodes),
        stride(stride),
        width(stage.width) {}
};

// |e|^2 - 2 r.e
__attribute__((always_inline)) inline void multiply(const Tile& tile,
                                                    FloatLanes (&result)[kTileRows][kTileLanes]) {
  const FloatLanes* codes = reinterpret_cast<const FloatLanes*>(tile.codes);
  const FloatLanes* shifts = reinterpret_cast<const FloatLanes*>(tile.shifts);
  FloatLanes sum[kTileRows][kTileLanes] = {};
  for (int64_t c = 0; c < tile.width; ++c, codes += kTileLanes) {
    FloatLanes e[kTileLanes];
#pragma GCC unroll 16
    for (int l = 0; l < kTileLanes; ++l) e[l] = codes[l];
#pragma GCC unroll 16
    for (int i = 0; i < kTileRows; ++i) {
      const float r = tile.rows[i * tile.stride + c];
#pragma GCC unroll 16
      for (int l = 0; l < kTileLanes; ++l) sum[i][l] += r * e[l];
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kTileRows; ++i) {
#pragma GCC unroll 16
    for (int l = 0; l < kTileLanes; ++l) result[i][l] = sum[i][l] + shifts[l];
  }
}

// results [kTileRows], `results_stride` apart, of kPanelCodes each
inline void keep_all(const Tile& tile, float* results, int64_t results_stride) {
  FloatLanes result[kTileRows][kTileLanes];
  multiply(tile, result);
  for (int i = 0; i < kTileRows; ++i) {
    std::memcpy(results + i * results_stride, result[i], sizeof(result[i]));
  }
}

}  // namespace SPARSEMOE_ISA
}  // namespace sparsemoe
