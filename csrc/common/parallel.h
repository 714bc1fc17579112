// The parallel loop of the CPU kernels. The host decides how threads are run: parallel_torch.cpp
// uses torch's pool, numpy/parallel_threads.cpp plain threads.
#pragma once

#include <cstdint>

namespace sparsemoe {

using ParallelBody = void (*)(void* context, int64_t begin, int64_t end);

// Calls body on disjoint ranges that cover [begin, end), each at least `grain` long but the last.
void run_parallel(int64_t begin, int64_t end, int64_t grain, ParallelBody body, void* context);

template <class F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, F f) {
  if (end - begin <= grain) {
    if (begin < end) f(begin, end);
    return;
  }
  run_parallel(
      begin, end, grain,
      [](void* context, int64_t from, int64_t to) { (*static_cast<F*>(context))(from, to); }, &f);
}

// How many items of `bytes_each` are worth a task of their own.
inline int64_t grain_for(int64_t bytes_each) {
  const int64_t grain = 32768 / (bytes_each > 0 ? bytes_each : 1);
  return grain > 0 ? grain : 1;
}

}  // namespace sparsemoe
