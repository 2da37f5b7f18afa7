// Instructions that CUDA C++ has no function for, in thin wrappers: the only PTX of the project.
// tests/cuda_on_host/ptx_on_host.h carries the same functions out in software.
#pragma once

#include <cstdint>

#include "launch.h"

#if defined(PSVDD_CUDA_ON_HOST)
#include "ptx_on_host.h"
#else

namespace psvdd::cuda {

// The block's dynamic shared memory.
__device__ inline unsigned char* shared_memory() {
  extern __shared__ __align__(16) unsigned char dynamic_shared_memory[];
  return dynamic_shared_memory;
}

__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Starts copying 16 aligned bytes from global to shared memory, bypassing the first-level cache.
__device__ inline void copy_async_16(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)),
               "l"(global)
               : "memory");
}
// Closes the group of copies this thread has started.
__device__ inline void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until all but the last `kPending` groups of this thread have arrived.
template <int kPending>
__device__ inline void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Loads four 8x8 matrices of 16-bit values from shared memory. Lane i gives the address of row i %
// 8 (16 bytes) of matrix i / 8; in r[m] it gets values 2 (i % 4) and 2 (i % 4) + 1 of row i / 4 of
// matrix m.
__device__ inline void load_matrices(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// sum[16 x 8] = a[16 x 16] b[16 x 8] + addend[16 x 8], float16 with float32 sums. Lane 4 g + t
// holds, of the sums, columns 2t and 2t + 1 of rows g and g + 8; of a, the same rows at k = 2t and
// 2t + 1, then at k + 8; of b, column g at k = 2t and 2t + 1, then at k + 8.
__device__ inline void multiply_add(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                    const float (&addend)[4]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%10, %11, %12, %13};"
      : "=f"(sum[0]), "=f"(sum[1]), "=f"(sum[2]), "=f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(addend[0]),
        "f"(addend[1]), "f"(addend[2]), "f"(addend[3]));
}

// The bits of the nearest float16.
__device__ inline uint16_t half_bits(float value) {
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}

}  // namespace psvdd::cuda

#endif
