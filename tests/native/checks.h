// What the tests in C++ share: counting and printing failures, random numbers, hard values.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <random>
#include <vector>

inline std::mt19937_64 random_bits(1);
inline int failures = 0;
inline int64_t checked = 0;

#define EXPECT(condition, ...)                              \
  do {                                                      \
    ++checked;                                              \
    if (!(condition) && ++failures <= 20) {                 \
      std::printf("line %d: %s\n  ", __LINE__, #condition); \
      std::printf(__VA_ARGS__);                             \
      std::printf("\n");                                    \
    }                                                       \
  } while (false)

inline double uniform(double low, double high) {
  return std::uniform_real_distribution<double>(low, high)(random_bits);
}
inline int64_t integer(int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(random_bits);
}

// Values that make rounding matter: a spread of any scale about an offset of any other, some of
// them a unit in the last place apart, some equal.
inline std::vector<float> hard_values(int64_t rows, int64_t dim, int64_t padded) {
  std::vector<float> values(rows * padded, 0.0f);
  const double spread = std::exp2(uniform(0, 1) < 0.3 ? uniform(-80, -50) : uniform(-30, 10));
  const double offset = uniform(0, 1) < 0.3 ? 0.0 : std::exp2(uniform(-10, 14));
  std::normal_distribution<double> normal;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t like = r > 0 && uniform(0, 1) < 0.3 ? integer(0, r - 1) : -1;
    for (int64_t j = 0; j < dim; ++j) {
      float& value = values[r * padded + j];
      if (like >= 0) {
        value = values[like * padded + j];
        if (uniform(0, 1) < 0.2) value = std::nextafter(value, 1e30f);
      } else {
        value = static_cast<float>(offset + spread * normal(random_bits));
      }
    }
  }
  return values;
}

inline long double true_distance(const float* a, const float* b, int64_t dim) {
  long double sum = 0;
  for (int64_t j = 0; j < dim; ++j) {
    const long double difference = static_cast<long double>(a[j]) - b[j];
    sum += difference * difference;
  }
  return std::sqrt(sum);
}

// Prints the counts; the exit code.
inline int report() {
  std::printf("%ld checks, %d failures\n", static_cast<long>(checked), failures);
  return failures == 0 ? 0 : 1;
}
