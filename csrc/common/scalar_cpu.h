// Element types and vectorisable arithmetic of the CPU kernels. Included once for each instruction
// set by for_each_isa.h: no include guard.

#include "common/dtype.h"

namespace sparsemoe {
namespace SPARSEMOE_ISA {

struct BFloat16 {
  uint16_t bits;
};

struct Half {
  uint16_t bits;
};

inline float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

// Conversions are branch-free, so that loops over them become vector code.
inline float load(float value) { return value; }
inline double load(double value) { return value; }
inline float load(BFloat16 value) { return bits_to_float(uint32_t(value.bits) << 16); }
inline float load(Half value) {
  const uint32_t sign = uint32_t(value.bits & 0x8000) << 16;
  const uint32_t magnitude = value.bits & 0x7fff;
  // A float with half's exponent and mantissa in place, rescaled by 2^112, is right for normal and
  // subnormal values; infinity and NaN need the float's largest exponent.
  const float scaled = bits_to_float(magnitude << 13) * bits_to_float(0x77800000u);
  const uint32_t special = magnitude >= 0x7c00 ? 0x7f800000u : 0u;
  return bits_to_float(float_to_bits(scaled) | special | sign);
}

// The nearest bf16, in the upper half.
inline uint32_t round_to_high_half(float value) {
  const uint32_t bits = float_to_bits(value);
  return value != value ? 0x7fc00000u : bits + 0x7fff + ((bits >> 16) & 1);
}

inline void store(float* to, float value) { *to = value; }
inline void store(double* to, double value) { *to = value; }
inline void store(BFloat16* to, float value) {
  to->bits = uint16_t(round_to_high_half(value) >> 16);
}
inline void store(Half* to, float value) {
  const uint32_t bits = float_to_bits(value);
  const uint32_t sign = (bits >> 16) & 0x8000;
  const uint32_t magnitude = bits & 0x7fffffff;
  // Normal halves: rebias the exponent and round to nearest even on the 13 dropped bits.
  const uint32_t normal = (magnitude - 0x38000000u + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  // Subnormal halves: adding 0.5 leaves the value, rounded, in the low bits of the mantissa.
  const uint32_t subnormal = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u;
  uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? 0x7c00u : half;  // rounds past 65504
  half = magnitude > 0x7f800000u ? 0x7e00u : half;   // NaN
  to->bits = uint16_t(half | sign);
}

template <class T>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};
template <class T>
using acc_t = typename Accumulator<T>::type;

// A row as words, each of kParts elements. Two bf16 are taken apart and put together within their
// word, so that vector code over words needs no shuffle, which it would over elements.
template <class T>
struct Words {
  static constexpr int kParts = 1;
  static acc_t<T> load_part(const T* row, int64_t word, int) { return load(row[word]); }
  template <class F>
  static void store_parts(T* row, int64_t word, F value_of) {
    store(row + word, value_of(0));
  }
};
template <>
struct Words<BFloat16> {
  static constexpr int kParts = 2;
  static float load_part(const BFloat16* row, int64_t word, int part) {
    uint32_t bits;
    std::memcpy(&bits, row + 2 * word, 4);
    return bits_to_float(part == 0 ? bits << 16 : bits & 0xffff0000u);
  }
  template <class F>
  static void store_parts(BFloat16* row, int64_t word, F value_of) {
    const uint32_t low = round_to_high_half(value_of(0)), high = round_to_high_half(value_of(1));
    const uint32_t bits = low >> 16 | (high & 0xffff0000u);
    std::memcpy(row + 2 * word, &bits, 4);
  }
};

// exp to 1.5 ulp in code that vectorises; infinities, NaN and subnormal results as std::exp's.
inline float exp_(float x) {
  x = x < -104.0f ? -104.0f : x;
  x = x > 89.0f ? 89.0f : x;
  const float shift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const float n = (x * 1.44269504088896341f + shift) - shift;
  float r = x - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  // 2^n in two factors, each a normal number.
  const float safe = n == n ? n : 0.0f;
  const int32_t exponent = int32_t(safe);
  const int32_t half = exponent >> 1;
  return p * bits_to_float(uint32_t(half + 127) << 23) *
         bits_to_float(uint32_t(exponent - half + 127) << 23);
}
inline double exp_(double x) { return std::exp(x); }

// Integers in the order of the floats they come from, NaN below everything. `lowest_key` is below
// every key.
inline int32_t order_key(float value) {
  int32_t bits;
  std::memcpy(&bits, &value, 4);
  bits = bits == std::numeric_limits<int32_t>::min() ? 0 : bits;  // -0 equals +0
  const int32_t key = bits ^ ((bits >> 31) & 0x7fffffff);
  return value != value ? std::numeric_limits<int32_t>::min() + 1 : key;
}
inline int64_t order_key(double value) {
  int64_t bits;
  std::memcpy(&bits, &value, 8);
  bits = bits == std::numeric_limits<int64_t>::min() ? 0 : bits;
  const int64_t key = bits ^ ((bits >> 63) & 0x7fffffffffffffff);
  return value != value ? std::numeric_limits<int64_t>::min() + 1 : key;
}
// The float of a key; NaN's gives NaN.
inline float key_to_real(int32_t key) {
  const int32_t bits = key ^ ((key >> 31) & 0x7fffffff);
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline double key_to_real(int64_t key) {
  const int64_t bits = key ^ ((key >> 63) & 0x7fffffffffffffff);
  double value;
  std::memcpy(&value, &bits, 8);
  return value;
}
template <class Real>
using key_t_ = decltype(order_key(Real()));
template <class Key>
constexpr Key lowest_key() {
  return std::numeric_limits<Key>::min();
}

// Calls f with a null pointer of the element type.
template <class F>
void with_dtype(DType dtype, F f) {
  switch (dtype) {
    case DType::f32:
      return f(static_cast<float*>(nullptr));
    case DType::f64:
      return f(static_cast<double*>(nullptr));
    case DType::f16:
      return f(static_cast<Half*>(nullptr));
    case DType::bf16:
      return f(static_cast<BFloat16*>(nullptr));
  }
}

}  // namespace SPARSEMOE_ISA
}  // namespace sparsemoe
