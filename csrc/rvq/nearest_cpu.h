// The nearest code of each of many vectors. Included once for each instruction set: no include
// guard.
//
// A product in float gives |e|^2 - 2 r.e for every vector r and code e. No result is stored but the
// lowest and the second lowest of each vector. Where rounding could have exchanged those two, the
// product is computed again, and the codes that rounding leaves in doubt are compared in double.

#include "rvq/packed_codes_cpu.h"

namespace sparsemoe {
namespace SPARSEMOE_ISA {

// Of equals the first. A distance that is not a number is never below another.
template <class Real>
int32_t nearest_in_double(Metric metric, const Real* r, const Real* codes, int64_t n_codes,
                          int64_t width) {
  int32_t nearest = 0;
  double least = std::numeric_limits<double>::infinity();
  for (int64_t j = 0; j < n_codes; ++j) {
    const double distance = distance_in_double(metric, r, codes + j * width, width);
    if (distance < least) least = distance, nearest = int32_t(j);
  }
  return nearest;
}

// What was found so far for a vector, in each lane: the lowest result and the next, and the
// register of codes that the lowest came from.
struct Lowest {
  float first[kLanes], second[kLanes];
  int32_t index[kLanes];
};

inline void keep_lowest(const Tile& tile, int32_t index, Lowest* found) {
  FloatLanes result[kTileRows][kTileLanes];
  multiply(tile, result);
#pragma GCC unroll 16
  for (int i = 0; i < kTileRows; ++i) {
    FloatLanes* first_of = reinterpret_cast<FloatLanes*>(found[i].first);
    FloatLanes* second_of = reinterpret_cast<FloatLanes*>(found[i].second);
    IntLanes* index_of = reinterpret_cast<IntLanes*>(found[i].index);
    FloatLanes first = *first_of, second = *second_of;
    IntLanes chosen = *index_of;
#pragma GCC unroll 16
    for (int l = 0; l < kTileLanes; ++l) {
      const auto below = result[i][l] < first;  // never of NaN
      const FloatLanes other = below ? first : result[i][l];
      second = other < second ? other : second;
      first = below ? result[i][l] : first;
      chosen = below ? IntLanes{} + (index + l) : chosen;
    }
    *first_of = first, *second_of = second, *index_of = chosen;
  }
}

// Space for the search of up to `rows` vectors.
class Searcher {
 public:
  Searcher(int64_t rows, int64_t width)
      : stride_(width + 16),  // not a power of two, which would crowd a few sets of the cache
        centred_((rows + kTileRows) * stride_),
        doubtful_(kTileRows * stride_),
        results_(kTileRows * kPanelCodes),
        found_(rows + kTileRows),
        squares_(rows) {}

  // codes[i * codes_stride] of the residuals [count, width].
  void search(const Stage& stage, const float* residuals, int64_t count, int32_t* codes,
              int64_t codes_stride) {
    for (int64_t i = 0; i < count; ++i) {
      squares_[i] = stage.centred(residuals + i * stage.width, centred_.data() + i * stride_);
      std::fill_n(found_.data()[i].first, kLanes, std::numeric_limits<float>::infinity());
      std::fill_n(found_.data()[i].second, kLanes, std::numeric_limits<float>::infinity());
    }
    for (int64_t panel = 0; panel < stage.n_panels(); ++panel) {
      for (int64_t i = 0; i < count; i += kTileRows) {
        keep_lowest({stage, panel, centred_.data() + i * stride_, stride_},
                    int32_t(panel * kTileLanes), found_.data() + i);
      }
    }
    const float longest = stage.longest();
    Doubt doubts[kTileRows];
    int64_t n_doubts = 0;
    for (int64_t i = 0; i < count; ++i) {
      float limit;
      const bool certain =
          settle(stage, found_.data()[i], squares_[i], longest, &codes[i * codes_stride], &limit);
      if (!certain) {
        std::copy_n(centred_.data() + i * stride_, stage.width,
                    doubtful_.data() + n_doubts * stride_);
        doubts[n_doubts++] = {residuals + i * stage.width, &codes[i * codes_stride], limit};
      }
      if (n_doubts == kTileRows || i == count - 1) {
        search_again(stage, doubts, n_doubts);
        n_doubts = 0;
      }
    }
  }

 private:
  // A vector for which the code is sought among those with results up to the limit.
  struct Doubt {
    const float* residual;
    int32_t* code;
    float limit;
  };

  // The code with the lowest result, and the highest that the result of the nearest code can be.
  // Whether they are sure to be the same.
  static bool settle(const Stage& stage, const Lowest& found, float square, float longest,
                     int32_t* code, float* limit) {
    float first = found.first[0], second = found.second[0];
    *code = found.index[0] * kLanes;
    for (int lane = 1; lane < kLanes; ++lane) {
      const float value = found.first[lane];
      const bool below = value < first;
      second = std::min(second, std::min(found.second[lane], below ? first : value));
      *code = below ? found.index[lane] * kLanes + lane : *code;
      first = below ? value : first;
    }
    const float r = std::sqrt(square);
    if (stage.metric == Metric::cosine) {
      *limit = first + 2 * stage.rounding(r, 1);
    } else {
      const float own = stage.rounding(r, std::sqrt(stage.shifts.data()[*code]));
      // A code longer than |r| and the distance to the nearest together is farther than that.
      const float distance = first + square + own + 0x1p-24f * float(stage.width) * square;
      const float reach = 1.01f * (r + std::sqrt(std::max(distance, 0.0f)));
      *limit = first + (own + stage.rounding(r, std::min(longest, reach)));
    }
    return second > *limit;
  }

  void search_again(const Stage& stage, const Doubt* doubts, int64_t count) {
    double least[kTileRows];
    for (int64_t i = 0; i < count; ++i) {
      least[i] = std::numeric_limits<double>::infinity();
      *doubts[i].code = 0;
    }
    for (int64_t panel = 0; count > 0 && panel < stage.n_panels(); ++panel) {
      keep_all({stage, panel, doubtful_.data(), stride_}, results_.data(), kPanelCodes);
      const int64_t first = panel * kPanelCodes;
      const int64_t held = std::min(kPanelCodes, stage.n_codes - first);
      for (int64_t i = 0; i < count; ++i) {
        const float* results = results_.data() + i * kPanelCodes;
        const float limit = doubts[i].limit;
        int32_t beyond = 0;
        for (int64_t j = 0; j < held; ++j) beyond += results[j] > limit;
        if (beyond == held) continue;
        for (int64_t j = 0; j < held; ++j) {
          if (results[j] > limit) continue;
          const double distance =
              distance_in_double(stage.metric, doubts[i].residual,
                                 stage.codes + (first + j) * stage.width, stage.width);
          if (distance < least[i]) least[i] = distance, *doubts[i].code = int32_t(first + j);
        }
      }
    }
  }

  int64_t stride_;
  Aligned<float> centred_;   // [rows, stride]
  Aligned<float> doubtful_;  // [kTileRows, stride]: those that are searched again
  Aligned<float> results_;
  Aligned<Lowest> found_;       // [rows]
  std::vector<float> squares_;  // [rows]: |r|^2 of the centred vectors
};

}  // namespace SPARSEMOE_ISA
}  // namespace sparsemoe
