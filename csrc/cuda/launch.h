// Launching a kernel: the grid, the checked launch, and the element a thread stands for.
//
// PSVDD_CUDA_ON_HOST compiles the same kernels for the host against a small runtime that stands in
// for the CUDA headers (tests/cuda_on_host), so that a machine without a GPU can execute them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <string_view>

#if defined(PSVDD_CUDA_ON_HOST)
#include "cuda_on_host.h"
#else
#include <cuda_runtime.h>
#endif

namespace psvdd::cuda {

constexpr int kThreadsPerBlock = 256;

// Blocks of a one-dimensional grid never exceed this; kernels stride over what is beyond.
constexpr int64_t kMaxBlocks = int64_t{1} << 20;

inline void check(cudaError_t status, std::string_view what) {
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
  }
}

// An attribute of the current device.
inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&value, attribute, device), "cudaDeviceGetAttribute");
  return value;
}
inline int multiprocessors() { return device_attribute(cudaDevAttrMultiProcessorCount); }
// Whether the current device has the tensor-core and copy instructions of ptx.h.
inline bool has_tensor_cores() { return device_attribute(cudaDevAttrComputeCapabilityMajor) >= 8; }

// For loops over any 64-bit count of elements: a thread's first element, and the step to its next.
__device__ inline int64_t first_element() {
  return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
}
__device__ inline int64_t element_step() { return static_cast<int64_t>(gridDim.x) * blockDim.x; }

// A kernel and the name under which a failed launch reports it. `launch` takes nothing else, and
// PSVDD_KERNEL is the way to make one, so that no launch is without a name or has another's.
template <typename... Params>
struct Kernel {
  std::string_view name;
  void (*function)(Params...);

  // spelled: the kernel as the source has it; template arguments are not part of the name, since
  // they are often template parameters themselves.
  constexpr Kernel(std::string_view spelled, void (*function_)(Params...))
      : name(spelled.substr(0, spelled.find('<'))), function(function_) {}
};

// Variadic, as template arguments may have commas: PSVDD_KERNEL(sum_rows), PSVDD_KERNEL(f<1, 2>).
#define PSVDD_KERNEL(...) ::psvdd::cuda::Kernel(#__VA_ARGS__, __VA_ARGS__)

// The shape of a launch.
struct Launch {
  dim3 grid;
  unsigned threads;         // per block, of one dimension
  size_t shared_bytes = 0;  // dynamic shared memory per block
};

// Launches kernel(args...) on the stream; throws std::runtime_error if the launch is refused.
template <typename... Params>
void launch(const Kernel<Params...>& kernel, const Launch& shape, std::uintptr_t stream,
            Params... args) {
  const auto* function = reinterpret_cast<const void*>(kernel.function);
  if (shape.shared_bytes > 48 * 1024) {  // a kernel has to ask for more than 48 KiB
    check(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(shape.shared_bytes)),
          kernel.name);
  }
#if defined(PSVDD_CUDA_ON_HOST)
  static_cast<void>(stream);
  check(cuda_on_host::launch(function, shape.grid, dim3(shape.threads), shape.shared_bytes,
                             [&] { kernel.function(args...); }),
        kernel.name);
#else
  void* arguments[] = {&args...};
  check(cudaLaunchKernel(function, shape.grid, dim3(shape.threads), arguments, shape.shared_bytes,
                         reinterpret_cast<cudaStream_t>(stream)),
        kernel.name);
#endif
}

// Blocks for one thread per element; kernels stride over what is beyond.
inline dim3 blocks_for(int64_t elements) {
  const int64_t needed = (elements + kThreadsPerBlock - 1) / kThreadsPerBlock;
  return dim3(static_cast<unsigned>(std::min(needed, kMaxBlocks)));
}

// Launches kernel(params, count) with one thread per element, `count` of them.
template <typename Params>
void launch_elements(const Kernel<Params, int64_t>& kernel, Params params, int64_t count,
                     std::uintptr_t stream) {
  if (count == 0) return;
  launch(kernel, {blocks_for(count), kThreadsPerBlock}, stream, params, count);
}

}  // namespace psvdd::cuda
