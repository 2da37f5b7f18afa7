// Stands in for the CUDA headers so that the kernels in csrc/cuda compile as C++ and execute on a
// machine without a GPU. Test-only, slow, and strict.
//
// Every CUDA thread of a block is a fiber; blocks run one after another. A fiber runs until it has
// to wait for others (a barrier, a shuffle), in an order that the schedule decides, so that a
// kernel which relies on an order fails under one of them. Asynchronous copies happen as late as
// allowed or at once, as the schedule has it. Shared memory is a heap block of the exact size,
// filled with NaN: AddressSanitizer sees what lies outside it. Under ThreadSanitizer, fibers are
// threads of their own that only barriers and atomics order: a missing barrier is a data race that
// it reports.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__ __restrict
#define __launch_bounds__(...)

using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9;
inline const char* cudaGetErrorString(cudaError_t status) {
  return status == cudaSuccess             ? "no error"
         : status == cudaErrorInvalidValue ? "invalid argument"
                                           : "invalid configuration argument";
}

// A card with few multiprocessors, so that grids are small.
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrComputeCapabilityMajor };
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? 2 : 8;
  return cudaSuccess;
}

struct dim3 {
  unsigned x, y, z;
  explicit dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};

// Of the fiber that runs.
inline thread_local dim3 gridDim, blockDim, blockIdx, threadIdx;

namespace cuda_on_host {

constexpr int kWarp = 32;

// Seed 0: threads backwards, copies late. 1: forwards, at once. Others: shuffled anew after every
// wait, copies late where the seed is even.
void set_schedule(unsigned seed);

// Of shared memory, what a launch may use unasked, and what it may ask for: that of sm_86, 89 and
// 120, which have least.
constexpr size_t kUnaskedShared = 48 * 1024, kMostShared = 99 * 1024;
cudaError_t allow_shared(const void* kernel, size_t bytes);

// Runs `thread` of a kernel once for every thread of the grid. Returns an error, as a card would,
// if grid or block have a size that no card takes. Throws std::runtime_error if more shared memory
// is used than was asked for, and if threads wait for others that never come.
cudaError_t launch(const void* kernel, dim3 grid, dim3 block, size_t shared_bytes,
                   const std::function<void()>& thread);

// The launch after `launches` more is refused as invalid, once; -1: none is. For tests of what the
// caller makes of it.
void refuse_launch(int launches);

unsigned char* shared_memory();                            // of the block
void sync_block();                                         // orders all memory
int count_in_block(bool value);                            // the same, and how many were true
void sync_warp();                                          // orders all memory
void exchange(const void* mine, void* all, size_t bytes);  // <= 32 bytes of each lane; no ordering

// The fiber's asynchronous copies; `copies_are_late` says when they are to be made.
struct Copy {
  void* to;
  const void* from;
};
bool copies_are_late();
void defer_copy(Copy copy);
void commit_copies();
bool take_copy(int pending_groups, Copy* copy);  // one that must be made now; false: no more

}  // namespace cuda_on_host

// --- what launches call --------------------------------------------------------------------------

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int bytes) {
  return cuda_on_host::allow_shared(kernel, static_cast<size_t>(bytes));
}

// --- what kernels call ---------------------------------------------------------------------------

inline void __syncthreads() { cuda_on_host::sync_block(); }
inline int __syncthreads_count(int value) { return cuda_on_host::count_in_block(value != 0); }
inline void __syncwarp() { cuda_on_host::sync_warp(); }

template <typename T>
T __shfl_sync(unsigned, T value, int lane) {
  T all[cuda_on_host::kWarp];
  cuda_on_host::exchange(&value, all, sizeof(T));
  return all[lane % cuda_on_host::kWarp];
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  return __shfl_sync(mask, value, static_cast<int>(threadIdx.x) ^ lanes);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned by) {
  const int lane = static_cast<int>(threadIdx.x % cuda_on_host::kWarp);
  return __shfl_sync(mask, value, lane < static_cast<int>(by) ? lane : lane - static_cast<int>(by));
}
inline unsigned __ballot_sync(unsigned, int value) {
  int all[cuda_on_host::kWarp];
  cuda_on_host::exchange(&value, all, sizeof value);
  unsigned bits = 0;
  for (int lane = 0; lane < cuda_on_host::kWarp; ++lane) bits |= (all[lane] != 0 ? 1u : 0u) << lane;
  return bits;
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }  // the lowest bit set, from 1; 0: none

// The 32 bits from bit `shift` % 32 of the pair.
inline uint32_t __funnelshift_r(uint32_t low, uint32_t high, uint32_t shift) {
  return static_cast<uint32_t>(((uint64_t{high} << 32) | low) >> (shift % 32));
}
template <typename T>
T min(T a, T b) {
  return b < a ? b : a;
}

template <typename T>
T atomicAdd(T* address, T value) {
  return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}
template <typename T>
T atomicMin(T* address, T value) {
  T seen = __atomic_load_n(address, __ATOMIC_RELAXED);
  while (value < seen && !__atomic_compare_exchange_n(address, &seen, value, false,
                                                      __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return seen;
}
template <typename T>
T atomicMax(T* address, T value) {
  T seen = __atomic_load_n(address, __ATOMIC_RELAXED);
  while (value > seen && !__atomic_compare_exchange_n(address, &seen, value, false,
                                                      __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return seen;
}

template <typename To, typename From>
To bits_as(From value) {
  static_assert(sizeof(To) == sizeof(From), "reinterpreting needs equal sizes");
  To result;
  std::memcpy(&result, &value, sizeof result);
  return result;
}
inline int __float_as_int(float value) { return bits_as<int>(value); }
inline unsigned __float_as_uint(float value) { return bits_as<unsigned>(value); }
inline float __int_as_float(int bits) { return bits_as<float>(bits); }
inline float __uint_as_float(unsigned bits) { return bits_as<float>(bits); }
