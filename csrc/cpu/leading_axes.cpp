// Images of vectors along a bank's leading axes: products with few axes, and the length of what
// they leave out. docs/design/cpu-search.md says why images are never farther apart than the
// vectors, up to the errors that are bounded here. Traffic: the vectors once.

#include "clusters.h"
#include "kernels.h"
#include "parallel.h"
#include "rescore.h"

namespace psvdd::cpu {
namespace {

constexpr int64_t kRowsPerItem = 256;
constexpr double kLargest = 1e30;  // squared lengths beyond might overflow
constexpr double kTiny = 1e-37;    // more than products and squares lose to underflow

// Completes the image [A] of a row that was projected; returns a bound on the image's error.
float complete_image(const RowProjector& projector, double error, float* image) {
  const int64_t last = static_cast<int64_t>(projector.sums().size()) - 1;
  const double squared = projector.squared();
  if (!(squared < kLargest)) {
    std::fill(image, image + last + 1, 0.0f);
    return INFINITY;
  }
  double along = 0;
  for (int64_t i = 0; i < last; ++i) along += projector.sums()[i] * projector.sums()[i];
  const double rest = std::sqrt(std::max(0.0, squared - along));
  image[last] = static_cast<float>(rest);
  // As far as the axes are not orthonormal, `along` is not what they take away.
  const double of_square = 1.01 * kLeadingExcess * squared;
  const double of_rest = rest * rest > of_square ? of_square / rest : std::sqrt(of_square);
  return static_cast<float>(1.01 * (error + of_rest) + kTiny);
}

}  // namespace

void leading_images(const LeadingImagesParams& params, int num_threads) {
  const Projection& projection = params.leading_axes.projection;
  const Rows rows{params.data, projection.dim, params.is_half};
  parallel_for((params.rows + kRowsPerItem - 1) / kRowsPerItem, num_threads, [&](int64_t item) {
    RowProjector projector(projection);
    std::vector<float> row(projection.dim);
    const int64_t end = std::min(params.rows, (item + 1) * kRowsPerItem);
    for (int64_t r = item * kRowsPerItem; r < end; ++r) {
      float* image = params.images + r * projection.axes;
      read_row(rows, r, row.data());
      const double error = projector(row.data(), image);
      params.errors[r] = complete_image(projector, error, image);
    }
  });
}

}  // namespace psvdd::cpu
