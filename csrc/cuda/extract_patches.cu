// Strided patches of a batch of images, optionally normalised on the way: (pixel - mean) / 255.
// One thread per output element: writes are coalesced, reads hit the caches since neighbouring
// patches overlap. Bound by writing the patches.

#include <stdexcept>

#include "../portable.h"
#include "kernels.h"
#include "launch.h"

namespace psvdd::cuda {
namespace {

// Where a pixel of a patch comes from: an offset into the images [N, C, H, W].
struct Source {
  int64_t image;  // n
  int64_t pixel;  // offset within the image
};

__device__ Source source_of(const PatchGrid& grid, int64_t element) {
  const int64_t kx = element % grid.size;
  element /= grid.size;
  const int64_t ky = element % grid.size;
  element /= grid.size;
  const int64_t c = element % grid.channels;
  element /= grid.channels;
  const int64_t j = element % grid.columns;
  element /= grid.columns;
  const int64_t i = element % grid.rows;
  const int64_t y = i * grid.stride + ky;
  return {element / grid.rows, (c * grid.height + y) * grid.width + j * grid.stride + kx};
}

template <typename Pixel>
__global__ void copy_elements(ExtractPatchesParams params, int64_t count) {
  const auto* images = static_cast<const Pixel*>(params.images);
  auto* patches = static_cast<Pixel*>(params.patches);
  const int64_t image_elements = params.grid.channels * params.grid.height * params.grid.width;
  for (int64_t e = first_element(); e < count; e += element_step()) {
    const Source source = source_of(params.grid, e);
    patches[e] = images[source.image * image_elements + source.pixel];
  }
}

template <typename Pixel>
__global__ void normalize_elements(ExtractPatchesParams params, int64_t count) {
  const auto* images = static_cast<const Pixel*>(params.images);
  auto* patches = static_cast<float*>(params.patches);
  const int64_t image_elements = params.grid.channels * params.grid.height * params.grid.width;
  for (int64_t e = first_element(); e < count; e += element_step()) {
    const Source source = source_of(params.grid, e);
    const float pixel = to_float(images[source.image * image_elements + source.pixel]);
    patches[e] = (pixel - params.mean[source.pixel]) / 255.0f;
  }
}

// One thread per pixel gathers from the patches that cover it, in a fixed order: deterministic.
template <typename Real>
__global__ void gather_gradients(ExtractPatchesBackwardParams params, int64_t count) {
  const PatchGrid& grid = params.grid;
  const auto* patches = static_cast<const Real*>(params.patch_gradients);
  auto* images = static_cast<Real*>(params.image_gradients);
  for (int64_t e = first_element(); e < count; e += element_step()) {
    const int64_t x = e % grid.width;
    const int64_t y = e / grid.width % grid.height;
    const int64_t c = e / (grid.width * grid.height) % grid.channels;
    const int64_t n = e / (grid.width * grid.height * grid.channels);
    const int64_t first_i = y < grid.size ? 0 : (y - grid.size) / grid.stride + 1;
    const int64_t first_j = x < grid.size ? 0 : (x - grid.size) / grid.stride + 1;
    Real sum = 0;
    for (int64_t i = first_i; i < grid.rows && i * grid.stride <= y; ++i) {
      for (int64_t j = first_j; j < grid.columns && j * grid.stride <= x; ++j) {
        const int64_t patch = (n * grid.rows + i) * grid.columns + j;
        const int64_t ky = y - i * grid.stride;
        const int64_t kx = x - j * grid.stride;
        sum += patches[((patch * grid.channels + c) * grid.size + ky) * grid.size + kx];
      }
    }
    images[e] = sum;
  }
}

}  // namespace

void extract_patches(const ExtractPatchesParams& params, std::uintptr_t stream) {
  const PatchGrid& grid = params.grid;
  const int64_t count =
      grid.images * grid.rows * grid.columns * grid.channels * grid.size * grid.size;
  void (*kernel)(ExtractPatchesParams, int64_t) = nullptr;
  if (params.mean != nullptr) {
    switch (params.pixel_type) {
      case PixelType::kUint8:
        kernel = normalize_elements<uint8_t>;
        break;
      case PixelType::kFloat16:
        kernel = normalize_elements<Half>;
        break;
      case PixelType::kFloat32:
        kernel = normalize_elements<float>;
        break;
    }
  } else {
    switch (params.element_size) {
      case 1:
        kernel = copy_elements<uint8_t>;
        break;
      case 2:
        kernel = copy_elements<uint16_t>;
        break;
      case 4:
        kernel = copy_elements<uint32_t>;
        break;
      case 8:
        kernel = copy_elements<uint64_t>;
        break;
    }
  }
  if (kernel == nullptr) throw std::invalid_argument("extract_patches: unknown pixel type");
  launch_elements("extract_patches", kernel, params, count, stream);
}

void extract_patches_backward(const ExtractPatchesBackwardParams& params, std::uintptr_t stream) {
  const PatchGrid& grid = params.grid;
  const int64_t count = grid.images * grid.channels * grid.height * grid.width;
  launch_elements("extract_patches_backward",
                  params.is_double ? gather_gradients<double> : gather_gradients<float>, params,
                  count, stream);
}

}  // namespace psvdd::cuda
