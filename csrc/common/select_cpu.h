// The `count` largest of many keys. Included once for each instruction set by kernel files: no
// include guard.

namespace sparsemoe {
namespace SPARSEMOE_ISA {

// Keys above `key` are chosen, and the first `n_equal` that equal it.
template <class Key>
struct Selection {
  Key key;
  int64_t n_equal;
};

// Radix selection, 11 bits at a time from the top, of 0 < count < n unsigned keys. `pool` is space
// that is used again from call to call.
template <class Key>
Selection<Key> select_largest(const Key* keys, int64_t n, int64_t count, std::vector<Key>* pool) {
  constexpr int kBits = 11;
  constexpr Key kMask = (Key(1) << kBits) - 1;
  Key prefix = 0;
  int64_t left = count;
  std::vector<Key> rest;
  for (int shift = int(sizeof(Key) * 8) - kBits;; shift -= kBits) {
    const int low = std::max(shift, 0);
    int32_t bins[1 << kBits] = {};
    for (int64_t i = 0; i < n; ++i) ++bins[(keys[i] >> low) & kMask];
    int64_t bin = kMask;
    while (bins[bin] < left) left -= bins[bin--];
    prefix = (prefix & ~(kMask << low)) | (Key(bin) << low);
    if (low == 0) return {prefix, left};
    rest.clear();
    for (int64_t i = 0; i < n; ++i) {
      if (Key((keys[i] >> low) & kMask) == Key(bin)) rest.push_back(keys[i]);
    }
    pool->swap(rest);
    keys = pool->data();
    n = int64_t(pool->size());
  }
}

// order_key as an unsigned integer in the same order, above 0.
inline uint32_t unsigned_key(float value) { return uint32_t(order_key(value)) ^ 0x80000000u; }
inline uint64_t unsigned_key(double value) {
  return uint64_t(order_key(value)) ^ 0x8000000000000000u;
}

}  // namespace SPARSEMOE_ISA
}  // namespace sparsemoe
