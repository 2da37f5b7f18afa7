// Plain parameter structs handed from the host side to the kernels, on every backend.
// Pointers are raw: the caller (patchsvdd_fast/ops.py) validates shapes, allocates with torch and
// keeps every buffer alive. All arrays are contiguous, row-major; all sizes are 64-bit.
#pragma once

#include <cstdint>

namespace psvdd {

// Element types of the images that extract_patches can normalise; plain copies need only a size.
enum class PixelType : int { kUint8 = 0, kFloat16 = 1, kFloat32 = 2 };

// The regular grid of square patches over a batch of images.
struct PatchGrid {
  int64_t images;    // N
  int64_t channels;  // C (1 where the kernel works on single-channel maps)
  int64_t height;    // H, pixels
  int64_t width;     // W, pixels
  int64_t rows;      // I, patches per column of the image
  int64_t columns;   // J, patches per row of the image
  int64_t size;      // K, side of a patch, pixels
  int64_t stride;    // pixels between neighbouring patches, 1 <= stride
};

struct ExtractPatchesParams {
  PatchGrid grid;
  const void* images;    // [N, C, H, W]
  const float* mean;     // [C, H, W], or null for a plain copy
  void* patches;         // [N, I, J, C, K, K]; float32 where a mean is given, else as the images
  int64_t element_size;  // bytes per pixel of a plain copy: 1, 2, 4 or 8
  PixelType pixel_type;  // type of the images where a mean is given
};

struct ExtractPatchesBackwardParams {
  PatchGrid grid;
  const void* patch_gradients;  // [N, I, J, C, K, K], float32 or float64
  void* image_gradients;        // [N, C, H, W], the same type
  bool is_double;
};

struct ScoreMapParams {
  PatchGrid grid;
  const float* distances;  // [N, I, J]
  double* row_sums;        // [N, I, W], scratch: sums over the patches of a row that cover a column
  float* maps;             // [N, H, W]
};

struct NearestParams {
  int64_t queries;          // Q
  int64_t bank_rows;        // M >= 1
  int64_t dim;              // D >= 1
  const float* query_data;  // [Q, D] on the CPU; transposed, [D, Q], on the GPU (coalesced loads)
  const float* bank_data;   // [M, D]
  float* distances;         // [Q], L2 distance to the nearest bank row
  int64_t* indices;         // [Q], row of the bank, the lowest on ties
  int64_t bank_splits;      // S: the bank is searched in S ranges (GPU only, fills the card)
  float* split_distances;   // [S, Q], scratch: squared distances (GPU only)
  int64_t* split_indices;   // [S, Q], scratch (GPU only)
};

}  // namespace psvdd
