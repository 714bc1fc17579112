// Kernels of clusters whose blocks all run at the same time, so that they may wait for each other
// (cooperative launch).
#pragma once

#include <cooperative_groups.h>

#include <algorithm>
#include <atomic>
#include <utility>

#include "common/cuda.cuh"

namespace sparsemoe {

// Of all blocks of a kernel launched as below. What they have written is seen by all.
__device__ inline void grid_sync() { cooperative_groups::this_grid().sync(); }

constexpr int kMostSharedBytes = 227 * 1024;  // of a block, on Hopper
// Of a block, on the current device.
inline int most_shared_bytes() {
  int device = 0, bytes = 48 * 1024;
  if (cudaGetDevice(&device) == cudaSuccess) {
    cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  }
  return bytes;
}

// Launches at most as many clusters of kClusterSize blocks as the current device can run at once.
// `shared_bytes` may be less in one call than in another, if not so many more clusters fit.
template <auto kKernel, int kClusterSize, class... Arguments>
int launch_together(int64_t clusters, int threads, int shared_bytes, void* stream,
                    Arguments&&... arguments) {
  static std::atomic<int> most[64];  // by device
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return int(error);
  cudaLaunchAttribute attribute{};
  cudaLaunchConfig_t config{};
  config.gridDim = kClusterSize, config.blockDim = threads;
  config.dynamicSmemBytes = shared_bytes, config.stream = cudaStream_t(stream);
  config.attrs = &attribute, config.numAttrs = 1;
  int at_once = device < 64 ? most[device].load() : 0;
  if (at_once == 0) {
    if (shared_bytes > 0) {
      error = cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   most_shared_bytes());
      if (error != cudaSuccess) return int(error);
    }
    if (kClusterSize > 1) {
      attribute.id = cudaLaunchAttributeClusterDimension;
      attribute.val.clusterDim.x = kClusterSize;
      attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
      error = cudaOccupancyMaxActiveClusters(&at_once, kKernel, &config);
    } else {
      error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&at_once, kKernel, threads,
                                                            size_t(shared_bytes));
      at_once *= multiprocessors();
    }
    if (error != cudaSuccess) return int(error);
    if (device < 64) most[device] = at_once;
  }
  config.gridDim = unsigned(std::min<int64_t>(clusters, at_once) * kClusterSize);
  attribute = {};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;
  return int(cudaLaunchKernelEx(&config, kKernel, std::forward<Arguments>(arguments)...));
}

}  // namespace sparsemoe
