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

// Of the current device.
inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&value, attribute, device), "cudaDeviceGetAttribute");
  return value;
}
inline int multiprocessors() { return device_attribute(cudaDevAttrMultiProcessorCount); }
// Whether it has the tensor-core and copy instructions of ptx.h.
inline bool has_tensor_cores() { return device_attribute(cudaDevAttrComputeCapabilityMajor) >= 8; }

// The first element of this thread and the distance to its next, for loops over any 64-bit count.
__device__ inline int64_t first_element() {
  return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
}
__device__ inline int64_t element_step() { return static_cast<int64_t>(gridDim.x) * blockDim.x; }

// The shape of a launch.
struct Launch {
  dim3 grid;
  unsigned threads;         // per block, of one dimension
  size_t shared_bytes = 0;  // dynamic shared memory per block
};

// Launches kernel(args...) on the stream and checks the launch.
template <typename... Args>
void launch(const char* name, void (*kernel)(Args...), const Launch& shape, std::uintptr_t stream,
            Args... args) {
  const auto* function = reinterpret_cast<const void*>(kernel);
  if (shape.shared_bytes > 48 * 1024) {  // more has to be asked for
    check(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(shape.shared_bytes)),
          name);
  }
#if defined(PSVDD_CUDA_ON_HOST)
  static_cast<void>(stream);
  cuda_on_host::launch(function, shape.grid, dim3(shape.threads), shape.shared_bytes,
                       [&] { kernel(args...); });
#else
  void* arguments[] = {&args...};
  check(cudaLaunchKernel(function, shape.grid, dim3(shape.threads), arguments, shape.shared_bytes,
                         reinterpret_cast<cudaStream_t>(stream)),
        name);
#endif
}

// Blocks for one thread per element; kernels stride over what is beyond.
inline dim3 blocks_for(int64_t elements) {
  const int64_t needed = (elements + kThreadsPerBlock - 1) / kThreadsPerBlock;
  return dim3(static_cast<unsigned>(std::min(needed, kMaxBlocks)));
}

// Launches kernel(params, count) with one thread per element, `count` of them.
template <typename Params>
void launch_elements(const char* name, void (*kernel)(Params, int64_t), Params params,
                     int64_t count, std::uintptr_t stream) {
  if (count == 0) return;
  launch(name, kernel, {blocks_for(count), kThreadsPerBlock}, stream, params, count);
}

}  // namespace psvdd::cuda
