// The wrappers of csrc/cuda/ptx.h in software. What touches the kernel's memory stands here and not
// in fibers.cpp, so that sanitizers see it as the kernel's own.
#pragma once

#include <cstdint>

#include "../../csrc/portable.h"
#include "cuda_on_host.h"

namespace psvdd::cuda {

inline unsigned char* shared_memory() { return cuda_on_host::shared_memory(); }

inline void copy_16_now(void* to, const void* from) {
  if (reinterpret_cast<uintptr_t>(to) % 16 != 0 || reinterpret_cast<uintptr_t>(from) % 16 != 0) {
    __builtin_trap();  // a card would stop here, too
  }
  for (int i = 0; i < 4; ++i) static_cast<uint32_t*>(to)[i] = static_cast<const uint32_t*>(from)[i];
}
inline void copy_async_16(void* shared, const void* global) {
  if (cuda_on_host::copies_are_late()) {
    cuda_on_host::defer_copy({shared, global});
  } else {
    copy_16_now(shared, global);
  }
}
inline void copy_async_commit() { cuda_on_host::commit_copies(); }
template <int kPending>
void copy_async_wait() {
  cuda_on_host::Copy copy;
  while (cuda_on_host::take_copy(kPending, &copy)) copy_16_now(copy.to, copy.from);
}

inline void load_matrices(uint32_t (&r)[4], const void* row) {
  struct Row {
    uint32_t words[4];
  };
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) __builtin_trap();
  Row all[cuda_on_host::kWarp];
  const Row mine = *static_cast<const Row*>(row);
  cuda_on_host::exchange(&mine, all, sizeof mine);
  const unsigned lane = threadIdx.x % cuda_on_host::kWarp;
  for (int m = 0; m < 4; ++m) r[m] = all[m * 8 + lane / 4].words[lane % 4];
}

// Sums of float16 products towards zero at every step, as a card that truncates would at worst.
inline float truncated_sum(float sum, float a, float b) {
  const double exact = static_cast<double>(sum) + static_cast<double>(a) * b;
  const auto rounded = static_cast<float>(exact);
  return std::fabs(static_cast<double>(rounded)) > std::fabs(exact) ? std::nextafter(rounded, 0.0f)
                                                                    : rounded;
}

inline void multiply_add(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                         const float (&addend)[4]) {
  struct Operands {
    uint32_t a[4], b[2];
  };
  const Operands mine = {{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
  Operands all[cuda_on_host::kWarp];
  cuda_on_host::exchange(&mine, all, sizeof mine);
  const auto value = [](uint32_t pair, int k) {
    return to_float(Half{static_cast<uint16_t>(k % 2 == 0 ? pair & 0xffffu : pair >> 16)});
  };
  const int lane = static_cast<int>(threadIdx.x % cuda_on_host::kWarp);
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i / 2 * 8;     // of a
    const int column = lane % 4 * 2 + i % 2;  // of b
    float value_so_far = addend[i];
    for (int k = 0; k < 16; ++k) {
      const uint32_t left = all[row % 8 * 4 + k % 8 / 2].a[row / 8 + k / 8 * 2];
      const uint32_t right = all[column * 4 + k % 8 / 2].b[k / 8];
      value_so_far = truncated_sum(value_so_far, value(left, k), value(right, k));
    }
    sum[i] = value_so_far;
  }
}

inline uint16_t half_bits(float value) {
  const uint32_t bits = bits_as<uint32_t>(value);
  const auto sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
  const float size = std::fabs(value);
  if (!(size < 65520.0f)) return sign | (std::isnan(value) ? 0x7e00u : 0x7c00u);
  // Rounded by adding what makes a unit of the sum one of float16's.
  const int exponent = size < 0x1p-14f ? -14 : std::ilogb(size);
  const float shift = std::ldexp(1.5f, exponent + 13);
  const float rounded = (size + shift) - shift;
  const int scaled = static_cast<int>(std::ldexp(rounded, 24));  // in units of 2^-24
  int top = -14;
  while (std::ldexp(1.0f, top + 1) <= rounded) ++top;
  if (rounded < 0x1p-14f) return sign | static_cast<uint16_t>(scaled);
  const auto fraction = static_cast<int>(std::ldexp(rounded, 10 - top)) - 1024;
  return sign | static_cast<uint16_t>((top + 15) << 10 | fraction);
}

}  // namespace psvdd::cuda
