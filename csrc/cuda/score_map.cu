// Anomaly maps from patch distances: a pixel's score is the mean over the patches that cover it.
//
// Separable, in two launches: sums along the rows of patches into a float64 scratch [N, I, W], then
// along the columns. A thread adds the size/stride terms of its window from cached memory, in the
// order in which the CPU kernel forms the same sum, so the two agree to the bit. Traffic is linear
// in the pixels. Sizes have 64 bits, but a division costs no more than one of 32 bits where the
// numbers fit: nvcc puts that test in front of each.

#include "../portable.h"
#include "kernels.h"
#include "launch.h"

namespace psvdd::cuda {
namespace {

// Entries first..last, `step` elements apart, summed as the CPU's running block sums are: the part
// in the first block backwards, the part in the next block forwards. A window within one block is
// summed forwards if it starts the block, else backwards.
template <typename Term>
__device__ double window_sum(const Term* terms, int64_t step, const Cover& window, int64_t block) {
  const int64_t block_start = window.first / block * block;
  const int64_t next_start = block_start + block;
  const bool two_blocks = window.last >= next_start;
  const bool forwards_only = !two_blocks && window.first == block_start;
  const int64_t split = forwards_only ? window.first : two_blocks ? next_start : window.last + 1;
  double backwards = 0.0;
  for (int64_t entry = split - 1; entry >= window.first; --entry) {
    backwards += static_cast<double>(terms[entry * step]);
  }
  double forwards = 0.0;
  for (int64_t entry = split; entry <= window.last; ++entry) {
    forwards += static_cast<double>(terms[entry * step]);
  }
  return backwards + forwards;
}

__device__ int64_t widest_window(const PatchGrid& grid) {
  return (grid.size + grid.stride - 1) / grid.stride;
}

__global__ void sum_rows(ScoreMapParams params, int64_t count) {
  const PatchGrid& grid = params.grid;
  for (int64_t e = first_element(); e < count; e += element_step()) {
    const int64_t row = e / grid.width;  // of all N * I rows of patches
    const Cover columns = covering_patches(e % grid.width, grid.columns, grid.size, grid.stride);
    params.row_sums[e] =
        window_sum(params.distances + row * grid.columns, 1, columns, widest_window(grid));
  }
}

__global__ void average_columns(ScoreMapParams params, int64_t count) {
  const PatchGrid& grid = params.grid;
  for (int64_t e = first_element(); e < count; e += element_step()) {
    const int64_t x = e % grid.width;
    const int64_t y = e / grid.width % grid.height;
    const int64_t n = e / (grid.width * grid.height);
    const Cover rows = covering_patches(y, grid.rows, grid.size, grid.stride);
    const Cover columns = covering_patches(x, grid.columns, grid.size, grid.stride);
    const int64_t patches = (rows.last - rows.first + 1) * (columns.last - columns.first + 1);
    const double sum = window_sum(params.row_sums + n * grid.rows * grid.width + x, grid.width,
                                  rows, widest_window(grid));
    params.maps[e] = static_cast<float>(sum / static_cast<double>(patches));
  }
}

}  // namespace

void score_map(const ScoreMapParams& params, std::uintptr_t stream) {
  const PatchGrid& grid = params.grid;
  launch_elements(PSVDD_KERNEL(sum_rows), params, grid.images * grid.rows * grid.width, stream);
  launch_elements(PSVDD_KERNEL(average_columns), params, grid.images * grid.height * grid.width,
                  stream);
}

}  // namespace psvdd::cuda
