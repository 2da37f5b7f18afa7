// Strided patches of a batch of images, optionally normalised on the way: (pixel - mean) / 255.
//
// A block fills a tile: of one channel, some rows of pixels of the patches in one or a few
// neighbouring rows of patches. It stages the tile's pixels in shared memory, as they are to be
// written, and copies them from there to every patch they belong to. So a pixel is read and
// normalised once per tile instead of once per patch, and what a patch gets from a tile is one
// contiguous piece, written 16 bytes per thread where rows and alignment allow. What is written may
// start at any byte of the staged words; one funnel shift per word aligns it. Blocks take their
// tile from the grid, arithmetic within a tile is in 32 bits, and the loop that writes does not
// divide.
//
// Traffic: the patches are written once; staging reads 6 % (uint8 copied) or 18 % (normalised) as
// many bytes, nearly all from the caches, at K = 32, stride 4, 256 pixels a row.
//
// Bound by writing the patches. At 4.3 TB/s an H200 has 27 clocks of an SM for 16 bytes of each
// thread of a warp: time for 107 instructions and for 27 lines of first-level cache. The writing
// loop takes about 40 instructions; with staging, which also divides, and the start of a block
// shared out, 60 to 70. Lines: four for the store, at most ten for five words of shared memory,
// whose rows lie an odd number of words apart so that no more than two of them conflict.

#include <algorithm>
#include <stdexcept>

#include "../portable.h"
#include "kernels.h"
#include "launch.h"
#include "ptx.h"
#include "warp.h"

namespace psvdd::cuda {
namespace {

constexpr int kLargestChunk = 16;       // bytes a thread stores at once
constexpr int kBlocksPerProcessor = 5;  // resident at least: no more than 48 registers
constexpr int kSharedWords = 5120;      // 20 KB per block
constexpr int kPieceBytes = 512;        // tiles are narrowed before a patch's piece gets shorter
constexpr int kTileBytes = 160 * 1024;  // of output, enough to repay the start of a block
constexpr int64_t kManyBlocks = 2048;   // enough to fill any card
constexpr int kBatch = 4;               // loads in flight per thread while staging
constexpr int64_t kMostBlocks = 65535;  // of a launch, in its second and third dimension

// How the patches are cut into tiles; sizes in bytes are those of the output's elements.
struct Tiling {
  uint32_t rows;     // of pixels, of every patch in a tile
  uint32_t run;      // bytes of a patch's row in a tile: all of it, unless a row is very long
  uint32_t columns;  // patches abreast in a tile
  uint32_t bands;    // rows of patches in a tile
  uint32_t pitch;    // words between staged rows, odd

  uint32_t row_tiles;     // tiles per patch's height
  uint32_t run_tiles;     // tiles per patch's row
  uint32_t column_tiles;  // tiles per row of patches
};

int64_t divide_up(int64_t whole, int64_t part) { return (whole + part - 1) / part; }
// The largest part not above `most`, when the whole is cut into as few parts as that takes.
int64_t even_part(int64_t whole, int64_t most) { return divide_up(whole, divide_up(whole, most)); }

Tiling tiling_of(const PatchGrid& grid, int64_t element_size) {
  const int64_t row_bytes = grid.size * element_size, stride_bytes = grid.stride * element_size;

  // As wide as fits beside rows enough for a piece; then as many rows as fit.
  const int64_t fewest_rows = std::min(grid.size, divide_up(kPieceBytes, row_bytes));
  const int64_t widest = (kSharedWords / fewest_rows - 2) * 4;
  const bool whole_rows = row_bytes <= widest;
  const int64_t run = whole_rows ? row_bytes : widest / kLargestChunk * kLargestChunk;
  const int64_t columns =
      whole_rows ? even_part(grid.columns, (widest - run) / stride_bytes + 1) : 1;
  const int64_t width = (columns - 1) * stride_bytes + run;
  const int64_t pitch = (divide_up(width, 4) + 1) | 1;  // one word more, for funnel shifts
  const int64_t rows = even_part(grid.size, kSharedWords / pitch);
  const int64_t row_tiles = divide_up(grid.size, rows), run_tiles = divide_up(row_bytes, run),
                column_tiles = divide_up(grid.columns, columns);

  // Further rows of patches share most of the staged rows. Not so many that blocks get few.
  int64_t bands = 1;
  if (grid.stride <= rows) {
    const int64_t fitting = (kSharedWords / pitch - rows) / grid.stride + 1;
    const int64_t useful = divide_up(kTileBytes, columns * rows * run);
    const int64_t blocks =
        grid.images * grid.rows * grid.channels * row_tiles * run_tiles * column_tiles;
    bands = std::max<int64_t>(1, std::min({fitting, useful, blocks / kManyBlocks}));
  }
  const auto u32 = [](int64_t value) { return static_cast<uint32_t>(value); };
  return {u32(rows),      u32(run),
          u32(columns),   u32(std::max<int64_t>(1, even_part(grid.rows, bands))),
          u32(pitch),     u32(row_tiles),
          u32(run_tiles), u32(column_tiles)};
}

// The image and tile of rows of patches that a launch starts with: grids are limited, so that it
// may take several.
struct Start {
  int64_t image;
  int64_t band_tile;
};

// The part of the patches that a block fills.
struct Tile {
  int64_t image;
  int64_t first_band;  // row of patches
  uint32_t bands;
  uint32_t channel;
  uint32_t first_column;  // of patches
  uint32_t columns;
  uint32_t first_row;  // of pixels, within the patches
  uint32_t rows;
  uint32_t first_byte;  // within a patch's row
  uint32_t run;
};

__device__ Tile tile_of_block(const PatchGrid& grid, const Tiling& tiling, const Start& start,
                              uint32_t row_bytes) {
  Tile tile;
  tile.image = start.image + blockIdx.z;
  tile.first_band = (start.band_tile + blockIdx.y) * tiling.bands;
  tile.bands =
      static_cast<uint32_t>(min(static_cast<int64_t>(tiling.bands), grid.rows - tile.first_band));
  uint32_t rest = blockIdx.x;
  tile.first_row = rest % tiling.row_tiles * tiling.rows;
  rest /= tiling.row_tiles;
  tile.first_byte = rest % tiling.run_tiles * tiling.run;
  rest /= tiling.run_tiles;
  tile.first_column = rest % tiling.column_tiles * tiling.columns;
  tile.channel = rest / tiling.column_tiles;
  tile.rows = min(tiling.rows, static_cast<uint32_t>(grid.size) - tile.first_row);
  tile.run = min(tiling.run, row_bytes - tile.first_byte);
  tile.columns = min(tiling.columns, static_cast<uint32_t>(grid.columns) - tile.first_column);
  return tile;
}

// --- staging -------------------------------------------------------------------------------------

// A warp sets staged[w] = finish(load(w)) for all w < words, several loads in flight per lane.
template <typename Load, typename Finish>
__device__ void stage_words(uint32_t* staged, uint32_t words, Load load, Finish finish) {
#pragma unroll 1
  for (uint32_t first = threadIdx.x % kWarp; first < words; first += kWarp * kBatch) {
    decltype(load(0)) batch[kBatch];
#pragma unroll
    for (uint32_t u = 0; u < kBatch; ++u) {
      if (first + u * kWarp < words) batch[u] = load(first + u * kWarp);
    }
#pragma unroll
    for (uint32_t u = 0; u < kBatch; ++u) {
      if (first + u * kWarp < words) staged[first + u * kWarp] = finish(batch[u]);
    }
  }
}

// A row of pixels to be staged.
struct Row {
  int64_t in_batch;  // its first pixel, counted from the first image
  int64_t in_image;  // the same, counted from its own
  uint32_t bytes;    // as they are to be written
};

// Pixels as they are, of any size: whole words of the row, put together from aligned ones.
struct Copy {
  static constexpr int kSmallestChunk = 1;

  static PSVDD_HOST_DEVICE int64_t element_size(const ExtractPatchesParams& params) {
    return params.element_size;
  }

  static __device__ void stage_row(const ExtractPatchesParams& params, const Row& row,
                                   int64_t batch_pixels, uint32_t* staged) {
    const int64_t first = row.in_batch * params.element_size;
    const int64_t end = batch_pixels * params.element_size;
    const auto* bytes = static_cast<const uint8_t*>(params.images) + first;
    const uint32_t offset = static_cast<uint32_t>(reinterpret_cast<std::uintptr_t>(bytes) % 4);
    const uint32_t words = (row.bytes + 3) / 4;
    const uint32_t last = (offset + row.bytes - 1) / 4;  // aligned word with a byte of the row
    if (first >= offset && first - offset + last * 4 + 4 <= end) {
      const auto* aligned = reinterpret_cast<const uint32_t*>(bytes - offset);
      stage_words(
          staged, words, [=](uint32_t w) { return uint2{aligned[w], aligned[min(w + 1, last)]}; },
          [=](uint2 pair) { return __funnelshift_r(pair.x, pair.y, offset * 8); });
      return;
    }
    // At either end of images that do not start or end with a whole word.
#pragma unroll 1
    for (uint32_t w = threadIdx.x % kWarp; w < words; w += kWarp) {
      uint32_t word = 0;
#pragma unroll
      for (uint32_t b = 0; b < 4; ++b) {
        if (w * 4 + b < row.bytes) word |= uint32_t{bytes[w * 4 + b]} << (b * 8);
      }
      staged[w] = word;
    }
  }
};

template <typename Pixel>
struct Normalize {
  static constexpr int kSmallestChunk = sizeof(float);

  static PSVDD_HOST_DEVICE int64_t element_size(const ExtractPatchesParams&) {
    return sizeof(float);
  }

  static __device__ void stage_row(const ExtractPatchesParams& params, const Row& row, int64_t,
                                   uint32_t* staged) {
    const auto* pixels = static_cast<const Pixel*>(params.images) + row.in_batch;
    const float* mean = params.mean + row.in_image;
    struct Terms {
      Pixel pixel;
      float mean;
    };
    stage_words(
        staged, row.bytes / sizeof(float), [=](uint32_t w) { return Terms{pixels[w], mean[w]}; },
        [](Terms at) { return __float_as_uint((to_float(at.pixel) - at.mean) / 255.0f); });
  }
};

// --- writing -------------------------------------------------------------------------------------

// Copies the kBytes at any byte offset into the words to an address aligned to kBytes.
template <int kBytes>
__device__ void copy_chunk(void* to, const uint32_t* words, uint32_t offset) {
  constexpr int kWords = kBytes < 4 ? 1 : kBytes / 4;
  const uint32_t shift = offset % 4 * 8;
  uint32_t chunk[kWords];
  uint32_t low = words[offset / 4];
#pragma unroll
  for (int w = 0; w < kWords; ++w) {
    const uint32_t high = words[offset / 4 + 1 + w];
    chunk[w] = __funnelshift_r(low, high, shift);
    low = high;
  }
  if constexpr (kBytes == 16) {
    *static_cast<uint4*>(to) = {chunk[0], chunk[1], chunk[2], chunk[3]};
  } else if constexpr (kBytes == 8) {
    *static_cast<uint2*>(to) = {chunk[0], chunk[1]};
  } else if constexpr (kBytes == 4) {
    *static_cast<uint32_t*>(to) = chunk[0];
  } else if constexpr (kBytes == 2) {
    *static_cast<uint16_t*>(to) = static_cast<uint16_t>(chunk[0]);
  } else {
    *static_cast<uint8_t*>(to) = static_cast<uint8_t>(chunk[0]);
  }
}

// A chunk's place in the output of a tile.
struct Place {
  uint32_t column;  // of patches
  uint32_t row;     // of pixels
  uint32_t chunk;   // of the row
};

template <int kChunk, typename Source>
__global__ void __launch_bounds__(kThreadsPerBlock, kBlocksPerProcessor)
    extract_tiles(ExtractPatchesParams params, Tiling tiling, Start start) {
  const PatchGrid& grid = params.grid;
  auto* staged = reinterpret_cast<uint32_t*>(shared_memory());
  const uint32_t element_size = static_cast<uint32_t>(Source::element_size(params));
  const uint32_t row_bytes = static_cast<uint32_t>(grid.size) * element_size;
  const uint32_t stride_bytes = static_cast<uint32_t>(grid.stride) * element_size;
  const uint32_t pitch_bytes = tiling.pitch * 4;
  const Tile tile = tile_of_block(grid, tiling, start, row_bytes);

  // A warp stages a row of pixels at a time.
  const int64_t image_pixels = grid.channels * grid.height * grid.width;
  const int64_t first_x = tile.first_column * grid.stride + tile.first_byte / element_size;
  const int64_t first_y = tile.first_band * grid.stride + tile.first_row;
  const uint32_t rows = (tile.bands - 1) * static_cast<uint32_t>(grid.stride) + tile.rows;
  const int64_t first_pixel = (tile.channel * grid.height + first_y) * grid.width + first_x;
#pragma unroll 1
  for (uint32_t r = threadIdx.x / kWarp; r < rows; r += kThreadsPerBlock / kWarp) {
    const int64_t pixel = first_pixel + r * grid.width;
    const Row row{tile.image * image_pixels + pixel, pixel,
                  (tile.columns - 1) * stride_bytes + tile.run};
    Source::stage_row(params, row, grid.images * image_pixels, staged + r * tiling.pitch);
  }
  __syncthreads();

  // The output of a row of patches is cut into chunks. A thread copies one, then the one
  // kThreadsPerBlock further, whose place and addresses follow by adding digit by digit.
  const uint32_t chunks = tile.run / kChunk;
  const auto place = [&](uint32_t index) -> Place {
    const uint32_t row = index / chunks, column = row / tile.rows;
    return {column, row - column * tile.rows, index - row * chunks};
  };
  const int64_t patch_bytes = grid.channels * grid.size * row_bytes;
  const auto to = [&](const Place& at) {
    return at.column * patch_bytes + at.row * row_bytes + at.chunk * kChunk;
  };
  const auto from = [&](const Place& at) {
    return at.column * stride_bytes + at.row * pitch_bytes + at.chunk * kChunk;
  };
  const Place step = place(kThreadsPerBlock);
  const int64_t step_to = to(step), row_to = row_bytes - tile.run,
                column_to = patch_bytes - tile.rows * row_bytes;
  const uint32_t step_from = from(step), row_from = pitch_bytes - tile.run,
                 column_from = stride_bytes - tile.rows * pitch_bytes;

  const Place first = place(threadIdx.x);
  const int64_t patch =
      (tile.image * grid.rows + tile.first_band) * grid.columns + tile.first_column;
  uint8_t* band_to = static_cast<uint8_t*>(params.patches) + patch * patch_bytes +
                     (tile.channel * grid.size + tile.first_row) * row_bytes + tile.first_byte +
                     to(first);
  uint32_t band_from = from(first);
  for (uint32_t band = 0; band < tile.bands; ++band) {
    Place at = first;
    uint8_t* chunk = band_to;
    uint32_t source = band_from;
#pragma unroll 1
    while (at.column < tile.columns) {
      copy_chunk<kChunk>(chunk, staged, source);
      at = {at.column + step.column, at.row + step.row, at.chunk + step.chunk};
      chunk += step_to;
      source += step_from;
      if (at.chunk >= chunks) {
        at.chunk -= chunks;
        ++at.row;
        chunk += row_to;
        source += row_from;
      }
      if (at.row >= tile.rows) {
        at.row -= tile.rows;
        ++at.column;
        chunk += column_to;
        source += column_from;
      }
    }
    band_to += grid.columns * patch_bytes;
    band_from += static_cast<uint32_t>(grid.stride) * pitch_bytes;
  }
}

// One thread per pixel gathers from the patches that cover it, in a fixed order: deterministic.
template <typename Real>
__global__ void gather_gradients(ExtractPatchesBackwardParams params, int64_t count) {
  const PatchGrid& grid = params.grid;
  const auto* patches = static_cast<const Real*>(params.patch_gradients);
  auto* images = static_cast<Real*>(params.image_gradients);
  // From a pixel's gradient in one patch to that in the next to the right, and in the next below.
  const int64_t patch_elements = grid.channels * grid.size * grid.size;
  const int64_t right = patch_elements - grid.stride;
  const int64_t below = grid.columns * patch_elements - grid.stride * grid.size;
  for (int64_t e = first_element(); e < count; e += element_step()) {
    const int64_t x = e % grid.width;
    const int64_t row = e / grid.width;
    const int64_t y = row % grid.height;
    const int64_t c = row / grid.height % grid.channels;
    const int64_t n = row / grid.height / grid.channels;
    const int64_t first_i = y < grid.size ? 0 : (y - grid.size) / grid.stride + 1;
    const int64_t first_j = x < grid.size ? 0 : (x - grid.size) / grid.stride + 1;
    const int64_t ky = y - first_i * grid.stride, kx = x - first_j * grid.stride;
    const int64_t patch = (n * grid.rows + first_i) * grid.columns + first_j;
    const Real* band = patches + ((patch * grid.channels + c) * grid.size + ky) * grid.size + kx;
    Real sum = 0;
    for (int64_t i = first_i; i < grid.rows && i * grid.stride <= y; ++i, band += below) {
      const Real* gradient = band;
      for (int64_t j = first_j; j < grid.columns && j * grid.stride <= x; ++j, gradient += right) {
        sum += *gradient;
      }
    }
    images[e] = sum;
  }
}

// The widest chunk, in bytes, that divides a patch's row and to which the patches are aligned.
int64_t chunk_of(const ExtractPatchesParams& params, int64_t element_size) {
  const auto bits = static_cast<int64_t>(reinterpret_cast<std::uintptr_t>(params.patches)) |
                    (params.grid.size * element_size) | kLargestChunk;
  return bits & -bits;
}

// The kernel that writes chunks of so many bytes.
template <typename Source>
Kernel<ExtractPatchesParams, Tiling, Start> kernel_for(int64_t chunk) {
  switch (chunk) {
    case 16:
      return PSVDD_KERNEL(extract_tiles<16, Source>);
    case 8:
      return PSVDD_KERNEL(extract_tiles<8, Source>);
    case 4:
      return PSVDD_KERNEL(extract_tiles<4, Source>);
    case 2:
      if constexpr (Source::kSmallestChunk <= 2) return PSVDD_KERNEL(extract_tiles<2, Source>);
      break;
    case 1:
      if constexpr (Source::kSmallestChunk == 1) return PSVDD_KERNEL(extract_tiles<1, Source>);
      break;
  }
  throw std::invalid_argument("extract_patches: misaligned patches");
}

template <typename Source>
void extract_from(const ExtractPatchesParams& params, std::uintptr_t stream) {
  const PatchGrid& grid = params.grid;
  const int64_t element_size = Source::element_size(params);
  const Tiling tiling = tiling_of(grid, element_size);
  const auto kernel = kernel_for<Source>(chunk_of(params, element_size));
  const int64_t tiles = grid.channels * tiling.column_tiles * tiling.run_tiles * tiling.row_tiles;
  if (tiles == 0) return;
  if (tiles > INT32_MAX) throw std::invalid_argument("extract_patches: too many channels");
  const size_t shared_bytes =
      sizeof(uint32_t) * ((tiling.bands - 1) * grid.stride + tiling.rows) * tiling.pitch;
  const int64_t band_tiles = divide_up(grid.rows, tiling.bands);
  for (Start start{0, 0}; start.image < grid.images; start.image += kMostBlocks) {
    for (start.band_tile = 0; start.band_tile < band_tiles; start.band_tile += kMostBlocks) {
      const dim3 blocks(static_cast<unsigned>(tiles),
                        static_cast<unsigned>(std::min(band_tiles - start.band_tile, kMostBlocks)),
                        static_cast<unsigned>(std::min(grid.images - start.image, kMostBlocks)));
      launch(kernel, {blocks, kThreadsPerBlock, shared_bytes}, stream, params, tiling, start);
    }
  }
}

}  // namespace

void extract_patches(const ExtractPatchesParams& params, std::uintptr_t stream) {
  if (params.mean == nullptr) return extract_from<Copy>(params, stream);
  switch (params.pixel_type) {
    case PixelType::kUint8:
      return extract_from<Normalize<uint8_t>>(params, stream);
    case PixelType::kFloat16:
      return extract_from<Normalize<Half>>(params, stream);
    case PixelType::kFloat32:
      return extract_from<Normalize<float>>(params, stream);
  }
  throw std::invalid_argument("extract_patches: unknown pixel type");
}

void extract_patches_backward(const ExtractPatchesBackwardParams& params, std::uintptr_t stream) {
  const PatchGrid& grid = params.grid;
  const int64_t count = grid.images * grid.channels * grid.height * grid.width;
  launch_elements(params.is_double ? PSVDD_KERNEL(gather_gradients<double>)
                                   : PSVDD_KERNEL(gather_gradients<float>),
                  params, count, stream);
}

}  // namespace psvdd::cuda
