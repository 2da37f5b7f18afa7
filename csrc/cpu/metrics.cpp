// Radii as limits on squared distances, and the cosine distance, which is the Euclidean one of
// vectors of length one: |a - b|^2 / 2 = 1 - cos for such. Traffic of normalising: each vector is
// read twice, the second time from a cache, and written once.

#include <atomic>
#include <cmath>
#include <vector>

#include "kernels.h"
#include "parallel.h"
#include "rescore.h"

namespace psvdd::cpu {
namespace {

constexpr int64_t kRowsAtOnce = 256;

// The largest squared distance whose distance is not beyond the radius. start: close to it.
template <typename Distance>
float largest_square(float radius, float start, const Distance& distance) {
  if (radius == INFINITY) return INFINITY;
  float squared = start;
  while (distance(squared) > radius) squared = std::nextafter(squared, 0.0f);
  for (;;) {
    const float next = std::nextafter(squared, INFINITY);
    if (distance(next) > radius) return squared;
    squared = next;
  }
}

float cosine_distance(float squared) { return squared * 0.5f; }

}  // namespace

void squared_limits(int64_t count, const float* radii, bool is_cosine, float* limits) {
  const IeeeArithmetic ieee;
  for (int64_t i = 0; i < count; ++i) {
    const float r = radii[i];
    limits[i] = is_cosine ? largest_square(r, 2 * r, cosine_distance)
                          : largest_square(r, r * r, [](float s) { return std::sqrt(s); });
  }
}

void finish_cosine_search(const FinishSearchParams& params, int) {
  const IeeeArithmetic ieee;
  for (int64_t i = 0; i < params.count; ++i) {
    params.distances[i] = cosine_distance(params.distances[i]);
    if (params.indices[i] == kNoRow) params.indices[i] = -1;
  }
}

int64_t normalise(const NormaliseParams& params, int num_threads) {
  const SearchKernels& kernels = active_kernels();
  const int64_t dim = params.dim;
  std::atomic<int64_t> first_zero{params.rows};
  const int64_t parts = (params.rows + kRowsAtOnce - 1) / kRowsAtOnce;
  parallel_for(parts, num_threads, [&](int64_t part) {
    const std::vector<float> origin(dim, 0.0f);
    const int64_t end = std::min(params.rows, (part + 1) * kRowsAtOnce);
    for (int64_t r = part * kRowsAtOnce; r < end; ++r) {
      const float* vector = params.data + r * dim;
      float* normalised = params.normalised + r * dim;
      float largest = 0;
      for (int64_t j = 0; j < dim; ++j) largest = std::max(largest, std::fabs(vector[j]));
      if (largest == 0) {
        int64_t first = first_zero;
        while (r < first && !first_zero.compare_exchange_weak(first, r)) {
        }
        break;  // those behind it do not matter
      }
      // A power of two brings the largest value to [1, 2), so that no square overflows and none
      // that matters underflows. It changes nothing else: a product with it is exact.
      const double factor = std::ldexp(1.0, -std::ilogb(largest));
      for (int64_t j = 0; j < dim; ++j) {
        normalised[j] = static_cast<float>(static_cast<double>(vector[j]) * factor);
      }
      const int64_t itself = 0;
      float squared;
      kernels.squared_distances({normalised, dim, false}, origin.data(), &itself, 1, &squared);
      const float norm = std::sqrt(squared);
      for (int64_t j = 0; j < dim; ++j) normalised[j] /= norm;
    }
  });
  return first_zero == params.rows ? -1 : first_zero.load();
}

}  // namespace psvdd::cpu
