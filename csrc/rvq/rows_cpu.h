// What the CPU kernels of rvq share. Included once for each instruction set: no include guard.

namespace sparsemoe {
namespace SPARSEMOE_ISA {

inline bool is_code(int32_t code, int64_t n_codes) { return code >= 0 && code < n_codes; }

template <class T, class Real>
void load_row(const T* from, int64_t width, Real* to) {
  for (int64_t c = 0; c < width; ++c) to[c] = load(from[c]);
}

template <class T, class Real>
void store_row(const Real* from, int64_t width, T* to) {
  for (int64_t c = 0; c < width; ++c) store(to + c, from[c]);
}

template <class Real>
void add_row(const Real* row, int64_t width, Real* sum) {
  for (int64_t c = 0; c < width; ++c) sum[c] += row[c];
}

template <class Real>
void subtract_row(const Real* row, int64_t width, Real* from) {
  for (int64_t c = 0; c < width; ++c) from[c] -= row[c];
}

template <class Real>
Real squared_norm(const Real* row, int64_t width) {
  Real sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t c = 0; c < width; ++c) sum += row[c] * row[c];
  return sum;
}

template <class Real>
void prefetch_row(const Real* row, int64_t width) {
  for (int64_t c = 0; c < width; c += 64 / sizeof(Real)) __builtin_prefetch(row + c);
}

// Moves a code from the residual to the sum, and gives the squared norm of what is left.
template <class Real>
Real take_code(const Real* code, int64_t width, Real* residual, Real* sum) {
  Real left = 0;
#pragma omp simd reduction(+ : left)
  for (int64_t c = 0; c < width; ++c) {
    const Real value = residual[c] - code[c];
    sum[c] += code[c];
    residual[c] = value;
    left += value * value;
  }
  return left;
}

template <class Real>
Real squared_distance(const Real* a, const Real* b, int64_t width) {
  Real sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t c = 0; c < width; ++c) {
    const Real difference = a[c] - b[c];
    sum += difference * difference;
  }
  return sum;
}

}  // namespace SPARSEMOE_ISA
}  // namespace sparsemoe
