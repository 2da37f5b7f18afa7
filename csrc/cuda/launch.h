// Launching a kernel: the grid, the checked launch, and the element a thread stands for.
//
// PSVDD_CUDA_ON_HOST compiles the same kernels for the host against a small runtime that stands in
// for the CUDA headers (tests/cuda_on_host), so that a machine without a GPU can execute them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

#if defined(PSVDD_CUDA_ON_HOST)
#include "cuda_on_host.h"
#else
#include <cuda_runtime.h>
#endif

namespace psvdd::cuda {

constexpr int kThreadsPerBlock = 256;

// Blocks of a one-dimensional grid never exceed this; kernels stride over what is beyond.
constexpr int64_t kMaxBlocks = int64_t{1} << 20;

inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
  }
}

// The first element of this thread and the distance to its next, for loops over any 64-bit count.
__device__ inline int64_t first_element() {
  return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
}
__device__ inline int64_t element_step() { return static_cast<int64_t>(gridDim.x) * blockDim.x; }

// Launches kernel(params, count) with one thread per element, `count` of them, and checks it.
template <typename Params>
void launch_elements(const char* name, void (*kernel)(Params, int64_t), Params params,
                     int64_t count, std::uintptr_t stream) {
  if (count == 0) return;
  const int64_t needed = (count + kThreadsPerBlock - 1) / kThreadsPerBlock;
  const dim3 grid(static_cast<unsigned>(std::min(needed, kMaxBlocks)));
  const dim3 block(kThreadsPerBlock);
#if defined(PSVDD_CUDA_ON_HOST)
  static_cast<void>(stream);
  run_on_host(grid, block, [&] { kernel(params, count); });
  check(cudaSuccess, name);
#else
  void* arguments[] = {&params, &count};
  check(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, block, arguments, 0,
                         reinterpret_cast<cudaStream_t>(stream)),
        name);
#endif
}

}  // namespace psvdd::cuda
