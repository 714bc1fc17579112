// Rows that are worked on side by side, a lane each: what happens to a row becomes vector code
// whatever its length, and no step depends on comparing within a vector. Included once for each
// instruction set by kernel files: no include guard.

namespace sparsemoe {
namespace SPARSEMOE_ISA {

constexpr int32_t kLanes = 16;
#undef SPARSEMOE_LANES
#define SPARSEMOE_LANES(i) _Pragma("omp simd") for (int32_t i = 0; i < kLanes; ++i)

// out[e][lane] = element e of row `lane`; lanes past the last of `count` rows repeat it.
template <class T, class Real>
void load_lanes(const T* rows, int64_t stride, int64_t n, int64_t count, Real* out) {
  for (int64_t i = 0; i < kLanes; ++i) {
    const T* row = rows + std::min(i, count - 1) * stride;
    for (int64_t e = 0; e < n; ++e) out[e * kLanes + i] = load(row[e]);
  }
}

// x[e][lane] becomes the softmax over e. NaN spreads through its lane.
template <class Real>
void softmax_lanes(Real* x, int64_t n) {
  using Key = key_t_<Real>;
  Key top[kLanes];
  Real shift[kLanes], sum[kLanes] = {};
  std::fill(top, top + kLanes, lowest_key<Key>());
  for (int64_t e = 0; e < n; ++e) {
    SPARSEMOE_LANES(i) top[i] = std::max(top[i], order_key(x[e * kLanes + i]));
  }
  SPARSEMOE_LANES(i) shift[i] = key_to_real(top[i]);
  for (int64_t e = 0; e < n; ++e) {
    SPARSEMOE_LANES(i) {
      x[e * kLanes + i] = exp_(x[e * kLanes + i] - shift[i]);
      sum[i] += x[e * kLanes + i];
    }
  }
  SPARSEMOE_LANES(i) sum[i] = 1 / sum[i];
  for (int64_t e = 0; e < n; ++e) {
    SPARSEMOE_LANES(i) x[e * kLanes + i] *= sum[i];
  }
}

}  // namespace SPARSEMOE_ISA
}  // namespace sparsemoe
