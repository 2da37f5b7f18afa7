// Anomaly maps from patch distances: a pixel's score is the mean over the patches that cover it.
//
// The sum over a window of patches is separable: first along rows of patches, then along columns.
// Along an axis every window is summed in O(1) from running sums over blocks as long as the widest
// window: a window is the tail of one block plus the head of the next. Only additions, so there is
// no cancellation, and a non-finite distance stays within the pixels it covers. Sums are float64.
// Work is linear in the pixels, whatever the patch size and stride.

#include <vector>

#include "../portable.h"
#include "kernels.h"
#include "parallel.h"

namespace psvdd::cpu {
namespace {

// Sums windows of vectors: `length` entries along the axis, each of `lanes` values.
class WindowSums {
 public:
  WindowSums(int64_t length, int64_t lanes, int64_t widest)
      : length_(length),
        lanes_(lanes),
        block_(widest),
        heads_(length * lanes),
        tails_(length * lanes) {}

  // value(entry, lane) gives the terms.
  template <typename Value>
  void prepare(const Value& value) {
    for (int64_t entry = 0; entry < length_; ++entry) {
      const bool block_starts = entry % block_ == 0;
      for (int64_t lane = 0; lane < lanes_; ++lane) {
        const double before = block_starts ? 0.0 : heads_[(entry - 1) * lanes_ + lane];
        heads_[entry * lanes_ + lane] = before + value(entry, lane);
      }
    }
    for (int64_t entry = length_ - 1; entry >= 0; --entry) {
      const bool block_ends = entry == length_ - 1 || (entry + 1) % block_ == 0;
      for (int64_t lane = 0; lane < lanes_; ++lane) {
        const double after = block_ends ? 0.0 : tails_[(entry + 1) * lanes_ + lane];
        tails_[entry * lanes_ + lane] = after + value(entry, lane);
      }
    }
  }

  // A window lies in two neighbouring blocks, or touches an end of the one it lies in (windows of
  // a grid differ in length by at most one, except where the border cuts them).
  double sum(const Cover& window, int64_t lane) const {
    const int64_t first_block = window.first / block_;
    if (window.last / block_ != first_block) {
      return tails_[window.first * lanes_ + lane] + heads_[window.last * lanes_ + lane];
    }
    const bool from_block_start = window.first == first_block * block_;
    return from_block_start ? heads_[window.last * lanes_ + lane]
                            : tails_[window.first * lanes_ + lane];
  }

 private:
  int64_t length_, lanes_, block_;
  std::vector<double> heads_, tails_;  // sums from the block's start, and to the block's end
};

}  // namespace

void score_map(const ScoreMapParams& params, int num_threads) {
  const PatchGrid& grid = params.grid;
  const int64_t widest = (grid.size + grid.stride - 1) / grid.stride;
  const auto cover = [&](int64_t pixel, int64_t patches) {
    return covering_patches(pixel, patches, grid.size, grid.stride);
  };
  parallel_for(grid.images, num_threads, [&](int64_t n) {
    double* row_sums = params.row_sums + n * grid.rows * grid.width;  // [I, W]
    WindowSums along_rows(grid.columns, 1, widest);
    for (int64_t i = 0; i < grid.rows; ++i) {
      const float* distances = params.distances + (n * grid.rows + i) * grid.columns;
      along_rows.prepare([&](int64_t j, int64_t) { return distances[j]; });
      for (int64_t x = 0; x < grid.width; ++x) {
        row_sums[i * grid.width + x] = along_rows.sum(cover(x, grid.columns), 0);
      }
    }
    WindowSums along_columns(grid.rows, grid.width, widest);
    along_columns.prepare([&](int64_t i, int64_t x) { return row_sums[i * grid.width + x]; });
    for (int64_t y = 0; y < grid.height; ++y) {
      const Cover rows = cover(y, grid.rows);
      float* map = params.maps + (n * grid.height + y) * grid.width;
      for (int64_t x = 0; x < grid.width; ++x) {
        const Cover columns = cover(x, grid.columns);
        const int64_t patches = (rows.last - rows.first + 1) * (columns.last - columns.first + 1);
        map[x] = static_cast<float>(along_columns.sum(rows, x) / static_cast<double>(patches));
      }
    }
  });
}

}  // namespace psvdd::cpu
