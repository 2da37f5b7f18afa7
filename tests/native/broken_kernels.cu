// Kernels that are wrong on purpose: the harness must notice each (tests/native/cuda_test.cpp).

#include <map>

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

// Only its launches are wrong: in the shared memory that they ask for.
__global__ void launch_is_broken(float* out) { out[threadIdx.x] = 1.0f; }

}  // namespace

void run_broken_kernel(const std::string& name, float* out, unsigned threads) {
  if (name == "too-much-shared") {
    return launch(PSVDD_KERNEL(launch_is_broken), {dim3(1), threads, 100 * 1024}, 0, out);
  }
  if (name == "shared-not-asked-for") {
    return check(cuda_on_host::launch(reinterpret_cast<const void*>(launch_is_broken), dim3(1),
                                      dim3(threads), 49 * 1024, [out] { launch_is_broken(out); }),
                 "launch_is_broken");
  }
  const std::map<std::string, Kernel<float*>> kernels = {
      {"race", PSVDD_KERNEL(read_without_barrier)},
      {"no-race", PSVDD_KERNEL(read_after_barrier)},
      {"beyond-shared", PSVDD_KERNEL(write_beyond_shared)},
      {"beyond-global", PSVDD_KERNEL(write_beyond_global)},
      {"race-in-global", PSVDD_KERNEL(race_between_blocks)},
      {"no-such-barrier", PSVDD_KERNEL(wait_for_nobody)},
      {"early-read", PSVDD_KERNEL(read_before_copy)},
  };
  const auto found = kernels.find(name);
  if (found == kernels.end()) throw std::invalid_argument("no such kernel: " + name);
  launch(found->second, {dim3(1), threads, threads * sizeof(float)}, 0, out);
}

}  // namespace psvdd::cuda
