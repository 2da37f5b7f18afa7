// What building and searching a clustered bank have in common.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "../params.h"
#include "search_kernels.h"

namespace psvdd::cpu {

// Projects one row, [dim] -> [axes]; returns a bound on the distance between the result and the
// exact projection. Sums are float64, whose error of at most 4096 * 2^-53 of the terms' size is far
// below the final rounding to float32.
class RowProjector {
 public:
  explicit RowProjector(const Projection& projection)
      : projection_(projection), centred_(projection.dim), sums_(projection.axes) {}

  double operator()(const float* row, float* projected);

  // Of the last row: its squared distance from the mean, and its coordinates before rounding.
  double squared() const { return squared_; }
  const std::vector<double>& sums() const { return sums_; }

 private:
  const Projection& projection_;
  std::vector<double> centred_;  // row - mean
  std::vector<double> sums_;
  double squared_ = 0;
};

// Relative error allowed for in squared distances between projected points, however summed; with
// room for the few operations of the bounds computed from them.
inline double bound_rounding(int64_t axes) { return static_cast<double>(axes + 16) * 0x1p-22; }

// Added to the distances that bounds are computed from: squares may have underflowed.
inline double underflow_allowance(int64_t axes) {
  return std::sqrt(static_cast<double>(axes + 16)) * 0x1p-70;
}

// Blocks [begin, end) of a cluster.
struct BlockRange {
  int64_t begin;
  int64_t end;
};

// The blocks that may hold rows within `reach` of a point: by the triangle inequality their
// distance to the centroid differs from the point's by no more. Rows lie in ascending order of
// that distance; `radii` are the largest of each block. squared: the squared distance from the
// point to the centroid; rounding: its relative error.
inline BlockRange blocks_within(const SearchKernels& kernels, const float* radii, int64_t blocks,
                                float squared, double reach, double rounding) {
  const double to_centroid = std::sqrt(static_cast<double>(squared));
  const auto nearest = static_cast<float>((to_centroid * (1 - rounding) - reach) * (1 - rounding));
  const auto farthest = static_cast<float>((to_centroid * (1 + rounding) + reach) * (1 + rounding));
  const int64_t begin = nearest > 0 ? kernels.count_below(radii, blocks, nearest) : 0;
  // The first block whose largest distance is beyond `farthest` may still hold rows that are not.
  const float beyond = std::nextafter(farthest, INFINITY);
  return {begin, std::min(blocks, kernels.count_below(radii, blocks, beyond) + 1)};
}

}  // namespace psvdd::cpu
