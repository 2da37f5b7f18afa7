// Plain parameter structs handed from the host side to the kernels, on every backend.
// Pointers are raw: the caller (patchsvdd_fast/ops) validates shapes, allocates with torch and
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

// Which rows a query may not be matched with: those of its own group.
struct Groups {
  const int64_t* query_groups;  // [Q], or null: no row is excluded
  const int64_t* bank_groups;   // [ceil(M / rows_per_group)]; row r has entry r / rows_per_group
  int64_t rows_per_group;       // consecutive rows of the bank that share an entry, >= 1

  // The same for queries from number `first` on.
  Groups from_query(int64_t first) const {
    return {query_groups == nullptr ? nullptr : query_groups + first, bank_groups, rows_per_group};
  }
};

// How `nearest` searches; the answer is the same. ("Canonical" distances are those that decide,
// defined to the bit in csrc/cpu/nearest.cpp.)
enum class SearchMethod : int {
  kAuto = 0,      // whichever is likely to be faster for the size
  kPlain = 1,     // every distance is computed canonically: for comparisons
  kScreened = 2,  // the low-precision screen comes first, however small the search: for tests
};

constexpr int kMostNeighbours = 32;
constexpr int64_t kNoRow = INT64_MAX;

struct NearestParams {
  int64_t queries;          // Q
  int64_t bank_rows;        // M >= 1
  int64_t dim;              // D >= 1
  const float* query_data;  // [Q, D]
  const void* bank_data;    // [M, D], float32 or float16
  bool bank_is_half;
  SearchMethod method;
  Groups groups;
  int k;               // neighbours per query, 1 to kMostNeighbours
  const int64_t* ids;  // [M] the rows' numbers, or null: first_row, first_row + 1, ...
  int64_t first_row;   // goes without `ids`; groups count from here
  // The neighbours of a query, ascending by squared distance, then by row. A search starts from
  // what is there, such as the neighbours in another part of a bank, and keeps the k nearest.
  // Infinity and kNoRow stand for a neighbour that has not been found.
  float* squared;           // [Q, k], canonical squared distances
  int64_t* indices;         // [Q, k]
  void* workspace;          // scratch of cuda::nearest_workspace bytes, aligned to 16 (GPU only)
  int64_t workspace_limit;  // bytes: the limit that nearest_workspace was given
  bool* seems_finite;       // or null; cleared if the bank may hold NaN or infinity (CPU only)
};

// 8-bit codes of vectors [M, D] on the CPU, for the screen of brute force. Rows are cut into B
// blocks, the last of which may be shorter; each block has a centre and a scale of its own.
struct RowCodes {
  int64_t block_rows;  // a multiple of 64
  int8_t* codes;       // [M rounded up to a multiple of 64 / 16, D / 4 rounded up, 16, 4]
  int32_t* bias;       // [M rounded up to a multiple of 64]
  float* centres;      // [B, D rounded up to a multiple of 16]
  float* scales;       // [B], what one unit of a code stands for; 0: this block has no codes
  float* slack;        // [B], bound on the distance of a row to what its code stands for
};

// A linear map of the embeddings x: y = basis (x - mean), along the bank's principal axes.
struct Projection {
  int64_t dim;         // D
  int64_t axes;        // coordinates of y, padded with zeros to a multiple of 16
  const float* mean;   // [D]
  const float* basis;  // [D, axes], or null: y = x - mean, padded with zeros
  double stretch;      // bound on the factor by which the map lengthens a vector
};

// A map of vectors to shorter images, which are never farther apart: with y = x - mean, an image
// holds the products of y with A - 1 axes, and the length of the rest of y. A is a multiple of 64,
// or 0 for no map.
struct LeadingAxes {
  Projection projection;  // on the axes; the last column of its basis is zero
  float error;            // largest bound on the error of the image of a row of the bank
};

// How far the axes may be from orthonormal: of their products, as a matrix, from the unit matrix.
constexpr double kLeadingExcess = 1e-5;

struct LeadingImagesParams {
  LeadingAxes leading_axes;
  int64_t rows;      // M
  const void* data;  // [M, D]
  bool is_half;
  float* images;  // [M, A]
  float* errors;  // [M], bounds on the errors of the images
};

// A bank on the CPU with codes of all rows.
struct CodedRows {
  int64_t rows;      // M
  int64_t dim;       // D
  const void* data;  // [M, D]
  bool is_half;      // float16 instead of float32
  RowCodes codes;
  // Codes of the rows' images [M, A] under `leading_axes`, looked at first, unless A is 0. Their
  // block_rows are as in `codes`.
  LeadingAxes leading_axes;
  RowCodes leading;
};

struct CodedNearestParams {
  CodedRows bank;
  SearchMethod method;
  Groups groups;
  int64_t queries;          // Q
  const float* query_data;  // [Q, D]
  int k;                    // these three as in NearestParams
  float* squared;           // [Q, k]
  int64_t* indices;         // [Q, k]
};

// The end of a search: squared distances become distances, and kNoRow becomes -1.
struct FinishSearchParams {
  int64_t count;     // queries times neighbours
  float* distances;  // [count], squared at first
  int64_t* indices;  // [count]
};

// Dividing vectors by their norm.
struct NormaliseParams {
  int64_t rows;       // N
  int64_t dim;        // D >= 1
  const float* data;  // [N, D], finite
  float* normalised;  // [N, D]
};

struct ProjectParams {
  Projection projection;
  int64_t rows;      // M
  const void* data;  // [M, D]
  bool is_half;      // float16 instead of float32
  float* projected;  // [M, axes]
  float* errors;     // [M], bounds on the distance to the exact projection
};

// A clustered bank on the CPU. Rows lie in the order of their clusters; within one, by distance to
// its centroid. Each projected row has 8-bit codes, its differences from the centroid in units of
// the cluster's scale; the codes of a cluster are padded to whole blocks of 16 rows, B in all.
struct ClusteredBank {
  Projection projection;
  int64_t rows;            // M
  int64_t clusters;        // C
  int64_t packs;           // per row, of four codes each
  const void* data;        // [M, D]
  bool is_half;            // float16 instead of float32
  const int64_t* ids;      // [M], the user's row numbers
  const int64_t* starts;   // [C + 1], first row of each cluster
  const int64_t* blocks;   // [C + 1], first block of each cluster
  int8_t* codes;           // [B, packs, 16, 4]
  int32_t* bias;           // [B * 16]
  float* block_radius;     // [B], largest distance to the centroid in the block
  const float* centroids;  // [C, axes]
  float* scales;           // [C], of the codes
  float* slack;            // [C], bound on the rounding error of a row's projection
  float* code_slack;       // [C], bound on the distance of a row's projection to its codes' point
  float* reach;            // [C], radius plus slack
  float* centroid_tiles;   // [ceil(C / 16), axes, 16], the centroids again, 16 side by side
  float* gaps;             // [C, C rounded up to 16], distances between centroids, rounded up
};

// What pack_clusters computes a bank's codes, scales and bounds from.
struct PackClustersParams {
  ClusteredBank bank;
  const float* projected;  // [M, axes], rows in the user's order
  const float* errors;     // [M], as from `project`
  const float* radii;      // [M], canonical distance to the centroid
};

struct ClusteredNearestParams {
  ClusteredBank bank;
  Groups groups;
  int64_t queries;
  const float* query_data;  // [Q, D]
  int k;                    // these three as in NearestParams
  float* squared;           // [Q, k]
  int64_t* indices;         // [Q, k]
  int64_t* scanned;         // [1], raised by the rows whose codes were compared with a query's
};

// A clustered bank on the GPU: rows in the order of their clusters, within one by distance to its
// centroid, cut into segments of up to 256 rows. No projection: codes are the float16 codes of
// csrc/cuda/screen.h, each segment padded to 256 rows.
struct SegmentedBank {
  int64_t rows;                     // M
  int64_t dim;                      // D
  int64_t clusters;                 // C
  int64_t segments;                 // S
  const void* data;                 // [M, D]
  bool is_half;                     // float16 instead of float32
  const int64_t* ids;               // [M], the user's row numbers
  const int64_t* segment_starts;    // [S + 1], first row of each segment
  const int32_t* segment_clusters;  // [S], ascending
  const int32_t* cluster_segments;  // [C + 1], first segment of each cluster
  const float* least_radius;        // [S], least canonical distance of its rows to the centroid
  const float* largest_radius;      // [S], the largest
  const float* centroids;           // [C, D]
  const float* gaps;                // [C, C], distances between centroids, rounded up
  float* centre;                    // [D], this and all below filled in by encode_segments:
  float* largest;                   // [1], see Frame in csrc/cuda/screen.h
  uint16_t* halves;                 // [S * 256, D padded], see Codes there
  float* squares;                   // [S * 256]
  float* errors;                    // [S * 256]
  float* segment_norms;             // [S], see Segments there
  float* segment_errors;            // [S]
};

struct SegmentedNearestParams {
  SegmentedBank bank;
  Groups groups;
  int64_t queries;            // Q, sorted by their nearest centroid
  const float* query_data;    // [Q, D]
  const int64_t* own;         // [Q], the nearest centroid of each
  const int64_t* own_starts;  // [C + 1], first query of each centroid
  float* squared;             // [Q], as in NearestParams with k = 1
  int64_t* indices;           // [Q]
  void* workspace;            // scratch of nearest_in_segments_workspace bytes, aligned to 16
  int64_t workspace_limit;    // bytes: the limit that function was given
  int64_t* visits;            // [1] or null, raised by the segments that each tile visits
};

// Greedy k-centre selection on the CPU: rows are chosen one after another, each the farthest from
// its nearest one chosen before.
struct CoresetParams {
  int64_t rows;         // M, less than 2^32
  int64_t dim;          // D >= 1
  int64_t count;        // rows to choose, 1 .. M
  int64_t first;        // the first row that is chosen
  const void* data;     // [M, D]
  bool is_half;         // float16 instead of float32
  SearchMethod method;  // kPlain: every row is compared with every choice
  // The screen's view of the rows, as from `project`; null: there is no screen.
  const float* projected;  // [M, axes]
  const float* errors;     // [M]
  int64_t axes;            // a multiple of 16
  double stretch;          // bound on the factor by which the projection lengthens a vector
  float scale;             // what one unit of a code stands for
  int64_t* chosen;         // [count], rows in the order in which they were chosen
  float* distances;        // [count], to the nearest row chosen before; infinity for the first
  float* radius;           // [1], largest distance of any row to the nearest one chosen
};

// Steps of the same on CUDA. A key holds a squared distance, as the bits of a float, in its upper
// half and 2^32 - 1 - row in its lower, so that the largest names the farthest row.
struct CoresetStepsParams {
  int64_t rows;      // M, less than 2^32
  int64_t dim;       // D >= 1
  const void* data;  // [M, D]
  bool is_half;      // float16 instead of float32
  int64_t begin;     // first step: step s compares all rows with choice s and finds choice s + 1
  int64_t end;       // one more than the last step
  float* squared;    // [M], to the nearest choice: infinity before the first step; -1 once chosen
  uint64_t* keys;    // [end + 1], of the choices: keys[0] given, all others 0 before their step
};

// How the patches of a random pair lie, and what for.
enum class PairKind : int {
  kPosition = 0,   // in one of eight directions from each other, for the position task
  kNeighbour = 1,  // a few pixels apart, for SVDD'
  kView = 2,       // in the same place: two views of one crop
};

// Random pairs of patches for training, each pair within one image.
struct CropPairsParams {
  int64_t images;           // N >= 1
  int64_t channels;         // C
  int64_t height;           // H, pixels
  int64_t width;            // W, pixels
  int64_t pairs;            // B; 2 B C < 2^31
  int64_t size;             // K, side of a patch, pixels; C K K < 2^32
  PairKind kind;            // of all pairs
  int64_t first_pair;       // number of the first pair in the whole batch; plus B: below 2^32
  int64_t max_redraws;      // of a position pair that leaves the image, before it is clipped
  uint64_t seed;            // the key of the random numbers
  uint32_t step;            // number of the draw: each step has random numbers of its own
  float colour_shift;       // standard deviation of a patch's shift per channel, in patch values
  float pixel_noise;        // the same of each pixel's noise; kNeighbour gets neither
  const uint8_t* pixels;    // [N, C, H, W]
  const float* mean;        // [C, H, W]
  const int64_t* image_of;  // [B], the image of each pair; taken to the nearest in [0, N)
  float* patches;           // [2, B, C, K, K], the pairs' first patches, then their second
  int64_t* corners;         // [2, B, 2], top and left of each patch, pixels
  int64_t* labels;          // [B], the direction drawn for a position pair, 0 .. 7; else 0
};

}  // namespace psvdd
