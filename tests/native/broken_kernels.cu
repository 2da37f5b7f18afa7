// Kernels that are wrong on purpose: the harness must notice each (tests/native/cuda_test.cpp).

#include "../../csrc/cuda/ptx.h"
#include "broken_kernels.h"

namespace psvdd::cuda {
namespace {

// Reads what another thread writes, with nothing in between.
__global__ void read_without_barrier(float* out) {
  auto* values = reinterpret_cast<float*>(shared_memory());
  values[threadIdx.x] = static_cast<float>(threadIdx.x);
  out[threadIdx.x] = values[(threadIdx.x + 1) % blockDim.x];
}

// The same with the barrier: what the harness must not complain about.
__global__ void read_after_barrier(float* out) {
  auto* values = reinterpret_cast<float*>(shared_memory());
  values[threadIdx.x] = static_cast<float>(threadIdx.x);
  __syncthreads();
  out[threadIdx.x] = values[(threadIdx.x + 1) % blockDim.x];
}

__global__ void write_beyond_shared(float* out) {
  auto* values = reinterpret_cast<float*>(shared_memory());
  values[threadIdx.x + 1] = 1.0f;
  __syncthreads();
  out[threadIdx.x] = values[threadIdx.x];
}

__global__ void write_beyond_global(float* out) { out[threadIdx.x + 1] = 1.0f; }

// Blocks write to one place.
__global__ void race_between_blocks(float* out) { out[threadIdx.x / 2] = threadIdx.x; }

__global__ void wait_for_nobody(float* out) {
  if (threadIdx.x > 0) __syncthreads();
  out[threadIdx.x] = 1.0f;
}

// Reads a copy that may still be under way.
__global__ void read_before_copy(float* out) {
  auto* values = reinterpret_cast<float*>(shared_memory());
  if (threadIdx.x % 4 == 0) copy_async_16(values + threadIdx.x, out + threadIdx.x);
  copy_async_commit();
  __syncthreads();
  out[threadIdx.x] = values[threadIdx.x] + 1.0f;
  copy_async_wait<0>();
}

}  // namespace

void run_broken_kernel(const std::string& name, float* out, unsigned threads) {
  // These are wrong in what they ask for.
  if (name == "too-much-shared") {
    return launch("broken", read_after_barrier, {dim3(1), threads, 100 * 1024}, 0, out);
  }
  if (name == "shared-not-asked-for") {
    return cuda_on_host::launch(reinterpret_cast<const void*>(read_after_barrier), dim3(1),
                                dim3(threads), 49 * 1024, [out] { read_after_barrier(out); });
  }
  void (*kernel)(float*) = name == "race"              ? read_without_barrier
                           : name == "no-race"         ? read_after_barrier
                           : name == "beyond-shared"   ? write_beyond_shared
                           : name == "beyond-global"   ? write_beyond_global
                           : name == "race-in-global"  ? race_between_blocks
                           : name == "no-such-barrier" ? wait_for_nobody
                           : name == "early-read"      ? read_before_copy
                                                       : nullptr;
  if (kernel == nullptr) throw std::invalid_argument("no such kernel: " + name);
  launch("broken", kernel, {dim3(1), threads, threads * sizeof(float)}, 0, out);
}

}  // namespace psvdd::cuda
