// Random numbers that CPU and CUDA draw alike, to the bit: Philox4x32-10 (Salmon et al. 2011,
// "Parallel random numbers: as easy as 1, 2, 3"), which maps a counter and a key to four words, and
// from words integers and normal numbers.
//
// Nothing has a state, so what is drawn depends on no order. The normal numbers use additions,
// multiplications, roots and integer operations alone, each of which IEEE 754 defines to the bit
// (no fused operation, no library function), and no branch, so that compilers vectorise loops.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "portable.h"

namespace psvdd {

struct RandomWords {
  uint32_t word[4];
};

struct RandomKey {
  uint32_t word[2];
};

PSVDD_HOST_DEVICE inline RandomKey random_key(uint64_t seed) {
  return {{static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)}};
}

// Philox4x32-10.
PSVDD_HOST_DEVICE inline RandomWords random_words(RandomKey key, RandomWords counter) {
  constexpr uint32_t kMultipliers[2] = {0xD2511F53u, 0xCD9E8D57u};
  constexpr uint32_t kKeySteps[2] = {0x9E3779B9u, 0xBB67AE85u};
  uint32_t a = counter.word[0], b = counter.word[1], c = counter.word[2], d = counter.word[3];
  for (uint32_t round = 0; round < 10; ++round) {
    const uint64_t left = static_cast<uint64_t>(kMultipliers[0]) * a;
    const uint64_t right = static_cast<uint64_t>(kMultipliers[1]) * c;
    a = static_cast<uint32_t>(right >> 32) ^ b ^ (key.word[0] + round * kKeySteps[0]);
    b = static_cast<uint32_t>(right);
    c = static_cast<uint32_t>(left >> 32) ^ d ^ (key.word[1] + round * kKeySteps[1]);
    d = static_cast<uint32_t>(left);
  }
  return {{a, b, c, d}};
}

// Uniform in [0, count), 1 <= count. No number is more likely than another by more than
// count / 2^32 of its share.
PSVDD_HOST_DEVICE inline int64_t uniform_below(uint32_t word, int64_t count) {
  return static_cast<int64_t>((static_cast<uint64_t>(word) * static_cast<uint64_t>(count)) >> 32);
}

PSVDD_HOST_DEVICE inline float float_of_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
PSVDD_HOST_DEVICE inline uint32_t bits_of_float(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// -2 ln((steps + 1) / 2^24) for 0 <= steps < 2^24, with a relative error of up to 3e-7.
PSVDD_HOST_DEVICE inline float minus_twice_log(uint32_t steps) {
  // steps + 1 = 2^exponent (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)), all of it exact.
  constexpr uint32_t kRootOfHalf = 0x3f3504f3u;
  const uint32_t bits = bits_of_float(static_cast<float>(static_cast<int32_t>(steps + 1)));
  const uint32_t exponent = (bits - kRootOfHalf) >> 23;
  const float f = float_of_bits(bits - (exponent << 23)) - 1.0f;
  // -2 ln(1 + f) / f, the minimax polynomial of degree 7.
  float p = 0.202137902f;
  p = p * f - 0.324451715f;
  p = p * f + 0.345016629f;
  p = p * f - 0.398003310f;
  p = p * f + 0.499398172f;
  p = p * f - 0.666701198f;
  p = p * f + 1.00000727f;
  p = p * f - 1.99999988f;
  const float halvings = static_cast<float>(24 - static_cast<int32_t>(exponent));
  return halvings * 1.38629436f + p * f;
}

struct Normals {
  float value[2];
};

// Two independent standard normal numbers (Box and Muller 1958): r cos(t) and r sin(t), where
// r = sqrt(-2 ln u), u = (the upper 24 bits of `radius` + 1) / 2^24, and t = `turn` / 2^32 of a
// full turn. The relative error is up to 1e-6; none is beyond 5.8.
PSVDD_HOST_DEVICE inline Normals normal_pair(uint32_t radius, uint32_t turn) {
  const float r = sqrtf(minus_twice_log(radius >> 8));
  // The nearest quarter turn, and x in [-1/2, 1/2] quarter turns from there.
  const uint32_t quarter = (turn + 0x20000000u) >> 30;
  const float x = static_cast<float>(static_cast<int32_t>(turn - (quarter << 30))) * 0x1p-30f;
  const float xx = x * x;
  // sin(x pi / 2) / x and cos(x pi / 2), minimax polynomials in x^2 of degree 3.
  float s = -0.00460165786f;
  s = s * xx + 0.0796800330f;
  s = s * xx - 0.645963490f;
  s = s * xx + 1.57079637f;
  s = s * x;
  float c = -0.0203985814f;
  c = c * xx + 0.253594935f;
  c = c * xx - 1.23369670f;
  c = c * xx + 0.999999940f;
  const bool odd = (quarter & 1) != 0;  // after an odd quarter, sine and cosine change places
  const uint32_t cos_sign = ((quarter + 1) & 2) << 30;
  const uint32_t sin_sign = (quarter & 2) << 30;
  const float cos_turn = float_of_bits(bits_of_float(odd ? s : c) ^ cos_sign);
  const float sin_turn = float_of_bits(bits_of_float(odd ? c : s) ^ sin_sign);
  return {{r * cos_turn, r * sin_turn}};
}

}  // namespace psvdd
