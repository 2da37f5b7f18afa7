// Strided patches of a batch of images, optionally normalised on the way: (pixel - mean) / 255.
// Bound by writing the patches, each of which is K contiguous runs per channel.

#include <cstring>
#include <stdexcept>

#include "../portable.h"
#include "kernels.h"
#include "parallel.h"

namespace psvdd::cpu {
namespace {

// Calls run(source, target) with the element offsets of every run of K pixels in the patches of
// row `i` of image `n`: source within the images, target within the patches.
template <typename Run>
void for_each_run(const PatchGrid& grid, int64_t n, int64_t i, const Run& run) {
  int64_t target = (n * grid.rows + i) * grid.columns * grid.channels * grid.size * grid.size;
  for (int64_t j = 0; j < grid.columns; ++j) {
    for (int64_t c = 0; c < grid.channels; ++c) {
      for (int64_t k = 0; k < grid.size; ++k) {
        const int64_t y = i * grid.stride + k;
        run(((n * grid.channels + c) * grid.height + y) * grid.width + j * grid.stride, target);
        target += grid.size;
      }
    }
  }
}

template <typename Pixel>
void normalize_row(const ExtractPatchesParams& params, int64_t n, int64_t i) {
  const PatchGrid& grid = params.grid;
  const auto* images = static_cast<const Pixel*>(params.images);
  auto* patches = static_cast<float*>(params.patches);
  const int64_t image_elements = grid.channels * grid.height * grid.width;
  for_each_run(grid, n, i, [&](int64_t source, int64_t target) {
    const Pixel* pixels = images + source;
    const float* mean = params.mean + (source - n * image_elements);
    float* out = patches + target;
    for (int64_t x = 0; x < grid.size; ++x) out[x] = (to_float(pixels[x]) - mean[x]) / 255.0f;
  });
}

void copy_row(const ExtractPatchesParams& params, int64_t n, int64_t i) {
  const auto* images = static_cast<const char*>(params.images);
  auto* patches = static_cast<char*>(params.patches);
  const int64_t bytes = params.element_size;
  for_each_run(params.grid, n, i, [&](int64_t source, int64_t target) {
    std::memcpy(patches + target * bytes, images + source * bytes, params.grid.size * bytes);
  });
}

// Each pixel gathers from the patches that cover it, in a fixed order: deterministic, no atomics.
template <typename Real>
void gather_gradients(const ExtractPatchesBackwardParams& params, int64_t n, int64_t y) {
  const PatchGrid& grid = params.grid;
  const auto* patches = static_cast<const Real*>(params.patch_gradients);
  auto* images = static_cast<Real*>(params.image_gradients);
  const int64_t patch_elements = grid.channels * grid.size * grid.size;
  for (int64_t c = 0; c < grid.channels; ++c) {
    Real* row = images + ((n * grid.channels + c) * grid.height + y) * grid.width;
    for (int64_t x = 0; x < grid.width; ++x) row[x] = 0;
    for (int64_t i = 0; i < grid.rows; ++i) {
      const int64_t k = y - i * grid.stride;
      if (k < 0 || k >= grid.size) continue;
      for (int64_t j = 0; j < grid.columns; ++j) {
        const int64_t patch = ((n * grid.rows + i) * grid.columns + j) * patch_elements;
        const Real* gradients = patches + patch + (c * grid.size + k) * grid.size;
        for (int64_t x = 0; x < grid.size; ++x) row[j * grid.stride + x] += gradients[x];
      }
    }
  }
}

}  // namespace

void extract_patches(const ExtractPatchesParams& params, int num_threads) {
  void (*fill_row)(const ExtractPatchesParams&, int64_t, int64_t) = copy_row;
  if (params.mean != nullptr) {
    switch (params.pixel_type) {
      case PixelType::kUint8:
        fill_row = normalize_row<uint8_t>;
        break;
      case PixelType::kFloat16:
        fill_row = normalize_row<Half>;
        break;
      case PixelType::kFloat32:
        fill_row = normalize_row<float>;
        break;
      default:
        throw std::invalid_argument("extract_patches: unknown pixel type");
    }
  }
  const int64_t rows = params.grid.rows;
  parallel_for(params.grid.images * rows, num_threads,
               [&](int64_t item) { fill_row(params, item / rows, item % rows); });
}

void extract_patches_backward(const ExtractPatchesBackwardParams& params, int num_threads) {
  const auto gather = params.is_double ? gather_gradients<double> : gather_gradients<float>;
  const int64_t height = params.grid.height;
  parallel_for(params.grid.images * height, num_threads,
               [&](int64_t item) { gather(params, item / height, item % height); });
}

}  // namespace psvdd::cpu
