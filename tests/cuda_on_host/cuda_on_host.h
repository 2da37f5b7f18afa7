// Stands in for the CUDA headers so that the kernels in csrc/cuda compile as C++ and execute on a
// machine without a GPU. Test-only. Threads run one after another, each to its end: enough for
// kernels without barriers or shuffles, in an order that no kernel may rely on (the blocks and
// threads are visited backwards, so a kernel that needs another thread's work would show).
#pragma once

#include <cmath>
#include <cstdint>
#include <functional>

#define __global__
#define __device__
#define __host__

using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;
inline const char* cudaGetErrorString(cudaError_t) { return "success"; }

struct dim3 {
  unsigned x, y, z;
  explicit dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

inline thread_local dim3 gridDim, blockDim, blockIdx, threadIdx;

// Runs `thread` once for every thread of a one-dimensional grid.
inline void run_on_host(dim3 grid, dim3 block, const std::function<void()>& thread) {
  gridDim = grid;
  blockDim = block;
  for (unsigned b = grid.x; b-- > 0;) {
    for (unsigned t = block.x; t-- > 0;) {
      blockIdx.x = b;
      threadIdx.x = t;
      thread();
    }
  }
}
