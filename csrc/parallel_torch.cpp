// The CPU kernels' parallel loop on torch's own thread pool.
#include <torch/csrc/stable/ops.h>

#include "common/parallel.h"

namespace sparsemoe {

void run_parallel(int64_t begin, int64_t end, int64_t grain, ParallelBody body, void* context) {
  torch::stable::parallel_for(begin, end, grain,
                              [=](int64_t from, int64_t to) { body(context, from, to); });
}

}  // namespace sparsemoe
