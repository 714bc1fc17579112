// Rows that are worked on side by side, a lane each: what happens to a row becomes vector code
// whatever its length, and no step depends on comparing within a vector. Included once for each
// instruction set by kernel files: no include guard.

namespace sparsemoe {
namespace SPARSEMOE_ISA {

constexpr int32_t kLanes = 16;
#undef SPARSEMOE_LANES
#define SPARSEMOE_LANES(i) _Pragma("omp simd") for (int32_t i = 0; i < kLanes; ++i)

// Four rows of four floats become their transpose.
inline void transpose4(const float* const* rows, int64_t offset, float* out, int64_t out_stride) {
#if defined(__clang__) || __GNUC__ >= 12
  typedef float Four __attribute__((vector_size(16)));
  Four in[4];
  for (int i = 0; i < 4; ++i) std::memcpy(&in[i], rows[i] + offset, 16);
  const Four low01 = __builtin_shufflevector(in[0], in[1], 0, 4, 1, 5);
  const Four low23 = __builtin_shufflevector(in[2], in[3], 0, 4, 1, 5);
  const Four high01 = __builtin_shufflevector(in[0], in[1], 2, 6, 3, 7);
  const Four high23 = __builtin_shufflevector(in[2], in[3], 2, 6, 3, 7);
  const Four columns[4] = {__builtin_shufflevector(low01, low23, 0, 1, 4, 5),
                           __builtin_shufflevector(low01, low23, 2, 3, 6, 7),
                           __builtin_shufflevector(high01, high23, 0, 1, 4, 5),
                           __builtin_shufflevector(high01, high23, 2, 3, 6, 7)};
  for (int i = 0; i < 4; ++i) std::memcpy(out + i * out_stride, &columns[i], 16);
#else
  for (int i = 0; i < 4; ++i) {
    for (int c = 0; c < 4; ++c) out[c * out_stride + i] = rows[i][offset + c];
  }
#endif
}
inline void transpose4(const double* const* rows, int64_t offset, double* out, int64_t out_stride) {
  for (int i = 0; i < 4; ++i) {
    for (int c = 0; c < 4; ++c) out[c * out_stride + i] = rows[i][offset + c];
  }
}

// out[e][lane] = element e of row `lane`; lanes past the last of `count` rows repeat it.
template <class T, class Real>
void load_lanes(const T* rows, int64_t stride, int64_t n, int64_t count, Real* out) {
  Real values[kLanes][kLanes];
  const Real* from[kLanes];
  for (int32_t i = 0; i < kLanes; ++i) from[i] = values[i];
  for (int64_t first = 0; first < n; first += kLanes) {
    const int64_t width = std::min<int64_t>(kLanes, n - first);
    for (int32_t i = 0; i < kLanes; ++i) {
      const T* row = rows + std::min<int64_t>(i, count - 1) * stride + first;
      if constexpr (std::is_same<T, Real>::value) {
        from[i] = row;
      } else if (width == kLanes) {
        SPARSEMOE_LANES(c) values[i][c] = load(row[c]);
      } else {
        for (int64_t c = 0; c < width; ++c) values[i][c] = load(row[c]);
      }
    }
    int64_t c = 0;
    for (; c + 4 <= width; c += 4) {
      for (int32_t i = 0; i < kLanes; i += 4) {
        transpose4(from + i, c, out + (first + c) * kLanes + i, kLanes);
      }
    }
    for (; c < width; ++c) {
      for (int32_t i = 0; i < kLanes; ++i) out[(first + c) * kLanes + i] = from[i][c];
    }
  }
}

// Row `lane` of `count` rows = x[..][lane].
template <class T, class Real>
void store_lanes(const Real* x, int64_t n, int64_t count, T* rows, int64_t stride) {
  Real values[kLanes][kLanes];
  for (int64_t first = 0; first < n; first += kLanes) {
    const int64_t width = std::min<int64_t>(kLanes, n - first);
    for (int64_t e = 0; e < width; e += 4) {
      const Real* from[4];
      for (int64_t i = 0; i < 4; ++i) from[i] = x + (first + std::min(e + i, width - 1)) * kLanes;
      for (int32_t i = 0; i < kLanes; i += 4) transpose4(from, i, &values[i][e], kLanes);
    }
    for (int64_t i = 0; i < count; ++i) {
      T* row = rows + i * stride + first;
      if (width == kLanes) {
        SPARSEMOE_LANES(c) store(row + c, values[i][c]);
      } else {
        for (int64_t c = 0; c < width; ++c) store(row + c, values[i][c]);
      }
    }
  }
}

// x[e][lane] becomes the softmax over e. NaN spreads through its lane.
template <class Real>
void softmax_lanes(Real* x, int64_t n) {
  Real shift[kLanes], sum[kLanes] = {};
  std::fill(shift, shift + kLanes, -std::numeric_limits<Real>::infinity());
  for (int64_t e = 0; e < n; ++e) {
    SPARSEMOE_LANES(i) shift[i] = x[e * kLanes + i] > shift[i] ? x[e * kLanes + i] : shift[i];
  }
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

// Calls f(first, count, x) for every block of `count` rows from `first` on, x[e][lane] being the
// softmax of row first + lane. f may change x. In parallel.
template <class T, class F>
void for_each_softmax(const T* logits, int64_t stride, int64_t n_rows, int64_t n, F f) {
  const int64_t n_blocks = (n_rows + kLanes - 1) / kLanes;
  parallel_for(0, n_blocks, grain_for(kLanes * 64 * n), [&](int64_t begin, int64_t end) {
    std::vector<acc_t<T>> x(n * kLanes);
    for (int64_t first = begin * kLanes; first < std::min(end * kLanes, n_rows); first += kLanes) {
      const int64_t count = std::min<int64_t>(kLanes, n_rows - first);
      load_lanes(logits + first * stride, stride, n, count, x.data());
      softmax_lanes(x.data(), n);
      f(first, count, x.data());
    }
  });
}

}  // namespace SPARSEMOE_ISA
}  // namespace sparsemoe
