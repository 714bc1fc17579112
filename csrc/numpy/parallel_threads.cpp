// The CPU kernels' parallel loop on plain threads, for hosts without a thread pool of their own.
#include <algorithm>
#include <thread>
#include <vector>

#include "common/parallel.h"

namespace sparsemoe {

void run_parallel(int64_t begin, int64_t end, int64_t grain, ParallelBody body, void* context) {
  const int64_t n_items = end - begin;
  const int64_t n_processors = std::max<int64_t>(1, std::thread::hardware_concurrency());
  const int64_t n_tasks = std::min(n_processors, n_items / std::max<int64_t>(1, grain));
  if (n_tasks <= 1) {
    if (n_items > 0) body(context, begin, end);
    return;
  }
  std::vector<std::thread> others;
  for (int64_t task = 1; task < n_tasks; ++task) {
    others.emplace_back(body, context, begin + n_items * task / n_tasks,
                        begin + n_items * (task + 1) / n_tasks);
  }
  body(context, begin, begin + n_items / n_tasks);
  for (std::thread& thread : others) thread.join();
}

}  // namespace sparsemoe
