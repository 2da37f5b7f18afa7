// What CPU and CUDA sources share: the host/device marker and arithmetic that must not differ.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define PSVDD_HOST_DEVICE __host__ __device__
#else
#define PSVDD_HOST_DEVICE
#endif

namespace psvdd {

// IEEE binary16, carried as its bits so that no compiler or CUDA header needs to know the type.
struct Half {
  uint16_t bits;
};

PSVDD_HOST_DEVICE inline float to_float(float value) { return value; }
PSVDD_HOST_DEVICE inline float to_float(uint8_t value) { return static_cast<float>(value); }

PSVDD_HOST_DEVICE inline float to_float(Half value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t exponent = (value.bits >> 10) & 0x1fu;
  const uint32_t fraction = value.bits & 0x3ffu;
  float magnitude;
  if (exponent == 0) {  // zero or subnormal: fraction * 2^-24, exact in float32
    magnitude = static_cast<float>(fraction) * 5.9604644775390625e-8f;
  } else {
    const uint32_t wide = exponent == 31 ? 0x7f800000u : (exponent + 112) << 23;
    const uint32_t bits = wide | (fraction << 13);
    std::memcpy(&magnitude, &bits, sizeof magnitude);
  }
  return sign != 0 ? -magnitude : magnitude;
}

// The patches first..last along one axis that cover a pixel. A pixel that no patch covers (in a
// margin at the far edge, narrower than a stride) gets those of the last covered pixel.
struct Cover {
  int64_t first;
  int64_t last;
};

PSVDD_HOST_DEVICE inline Cover covering_patches(int64_t pixel, int64_t patches, int64_t size,
                                                int64_t stride) {
  const int64_t covered = (patches - 1) * stride + size;
  const int64_t inside = pixel < covered ? pixel : covered - 1;
  const int64_t beyond = inside - size;  // the last patch start that no longer reaches `inside`
  const int64_t last = inside / stride;
  return {beyond < 0 ? 0 : beyond / stride + 1, last < patches ? last : patches - 1};
}

}  // namespace psvdd
