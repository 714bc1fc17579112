// The CPU kernels of the rvq family, called as another host would call them.
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

#include "check.h"
#include "rvq/code_sums.h"
#include "rvq/decode.h"
#include "rvq/encode.h"

using namespace sparsemoe;

namespace {

struct Encoded {
  std::vector<int32_t> codes;
  std::vector<float> quantized, errors;
};

template <class Params>
Encoded encoded(Params p, int64_t n, int64_t width, int64_t n_stages, int64_t n_codes,
                const std::vector<float>& x, const std::vector<float>& codebooks,
                void (*encode)(const Params&)) {
  Encoded out{std::vector<int32_t>(n * n_stages, -7), std::vector<float>(n * width),
              std::vector<float>(n * n_stages)};
  p.n = n;
  p.width = width;
  p.n_stages = n_stages;
  p.n_codes = n_codes;
  p.x = x.data();
  p.x_stride = width;
  p.dtype = DType::f32;
  p.codebooks = codebooks.data();
  p.codes = out.codes.data();
  p.quantized = out.quantized.data();
  p.errors = out.errors.data();
  encode(p);
  return out;
}

// Distances in double along the codes given: none may be above the least but for rounding.
void check_nearest(const Encoded& out, int64_t n, int64_t width, int64_t n_stages, int64_t n_codes,
                   const std::vector<float>& x, const std::vector<float>& codebooks) {
  for (int64_t i = 0; i < n; ++i) {
    std::vector<double> residual(x.begin() + i * width, x.begin() + (i + 1) * width);
    for (int64_t q = 0; q < n_stages; ++q) {
      const int32_t code = out.codes[i * n_stages + q];
      const float* stage = codebooks.data() + q * n_codes * width;
      double least = std::numeric_limits<double>::infinity(), chosen = 0;
      for (int64_t j = 0; j < n_codes; ++j) {
        double distance = 0;
        for (int64_t c = 0; c < width; ++c) {
          distance += (residual[c] - stage[j * width + c]) * (residual[c] - stage[j * width + c]);
        }
        least = distance < least ? distance : least;
        chosen = j == code ? distance : chosen;
      }
      CHECK(code >= 0 && code < n_codes);
      CHECK(chosen <= least * (1 + 1e-5));
      CHECK_NEAR(out.errors[i * n_stages + q], chosen, 1e-5 * chosen);
      for (int64_t c = 0; c < width; ++c) residual[c] -= stage[code * width + c];
    }
  }
}

std::vector<float> gaussian(int64_t size) {
  static std::mt19937 generator(1);
  std::normal_distribution<float> normal;
  std::vector<float> values(size);
  for (float& value : values) value = normal(generator);
  return values;
}

}  // namespace

// Sizes below, at and above those of a tile and a panel, and few vectors, which take another way.
TEST(encode_finds_the_nearest_codes) {
  const int64_t sizes[][3] = {{1, 1, 1},   {3, 5, 70},    {7, 16, 33},    {12, 8, 32},
                              {13, 9, 24}, {40, 31, 100}, {200, 64, 129}, {97, 130, 257}};
  for (const auto& [n, width, n_codes] : sizes) {
    const std::vector<float> x = gaussian(n * width), codebooks = gaussian(2 * n_codes * width);
    RvqEncodeParams p{};
    p.metric = Metric::l2;
    p.exact = true;
    const Encoded greedy = encoded(p, n, width, 2, n_codes, x, codebooks, rvq_encode_cpu);
    check_nearest(greedy, n, width, 2, n_codes, x, codebooks);
    RvqBeamParams beam{};
    beam.beam = 1;
    const Encoded same = encoded(beam, n, width, 2, n_codes, x, codebooks, rvq_beam_encode_cpu);
    CHECK(same.codes == greedy.codes && same.quantized == greedy.quantized);
  }
}

TEST(equal_codes_give_the_lowest_and_nan_gives_zero) {
  const int64_t n = 20, width = 6, n_codes = 50;
  std::vector<float> x = gaussian(n * width), codebooks(n_codes * width, 0.5f);
  for (int64_t c = 0; c < width; ++c) codebooks[c] = 100;
  x[3 * width] = std::numeric_limits<float>::quiet_NaN();
  RvqEncodeParams p{};
  p.metric = Metric::l2;
  const Encoded out = encoded(p, n, width, 1, n_codes, x, codebooks, rvq_encode_cpu);
  for (int64_t i = 0; i < n; ++i) CHECK(out.codes[i] == (i == 3 ? 0 : 1));
}

TEST(decode_and_code_sums_leave_out_what_is_no_code) {
  const std::vector<float> codebooks = {1, 2, 3, 4, 10, 20, 30, 40};  // 2 stages, 2 codes, 2 wide
  const std::vector<int32_t> codes = {0, 1, -1, 0, 1, 2};
  std::vector<float> y(6), sums(8), counts(4);
  RvqDecodeParams d{};
  d.n = 3, d.width = 2, d.n_stages = 2, d.n_codes = 2;
  d.codes = codes.data();
  d.codebooks = codebooks.data();
  d.dtype = DType::f32;
  d.y = y.data();
  rvq_decode_cpu(d);
  CHECK((y == std::vector<float>{31, 42, 10, 20, 3, 4}));

  const std::vector<float> x = {5, 5, 6, 6, 7, 7};
  RvqCodeSumsParams s{};
  s.n = 3, s.width = 2, s.n_stages = 2, s.n_codes = 2;
  s.x = x.data();
  s.x_stride = 2;
  s.dtype = DType::f32;
  s.codes = codes.data();
  s.codebooks = codebooks.data();
  s.sums = sums.data();
  s.counts = counts.data();
  rvq_code_sums_cpu(s);
  CHECK((sums == std::vector<float>{5, 5, 7, 7, 6, 6, 4, 3}));
  CHECK((counts == std::vector<float>{1, 1, 1, 1}));
}
