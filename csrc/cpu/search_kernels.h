// The inner loops of the nearest-neighbour search, one set per instruction set.
//
// Only `squared_distances` decides a result, and every set computes the canonical distance to the
// bit. All others serve to prove that rows need not be looked at: their callers allow for rounding,
// so they may differ between instruction sets in the last bits.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace psvdd::cpu {

// Codes of rows lie in blocks of 16 rows [packs, 16, 4]: a pack is four consecutive codes of one
// row, the 32 bits that a lane of an 8-bit product takes.
constexpr int kLanes = 16;  // rows of a block of codes, and partial sums of the canonical distance
constexpr int kTileBlocks = 4;                        // blocks that `screen_tile` takes at once
constexpr int kTileRows = kTileBlocks * kLanes;       // 64: a bit each in a mask
constexpr int kTileQueries = 6;                       // most queries of `screen_tile`
constexpr int kBatchStep = 32;                        // a ScreenBatch is padded to such multiples
constexpr int kCodeStride = 64;                       // and its codes to such
constexpr int64_t kMostDims = 4096;                   // beyond, sums of codes might not be exact
constexpr int kCodeLimit = 127;                       // codes of rows lie in [-127, 127]
constexpr int kQueryOffset = 128;                     // what makes a query's codes unsigned
constexpr int32_t kEverything = -(int32_t{1} << 29);  // a threshold every row passes, ...
constexpr int32_t kNothing = INT32_MAX;               // ... but for padding, which has this bias

// Stored vectors, row-major: float32, or float16 that is widened when read.
struct Rows {
  const void* data;  // [M, dim]
  int64_t dim;
  bool half;
};

// Squared distances to centroids below this rule nothing out. In those above it, what is lost to
// underflow is far below the relative error that is allowed for.
constexpr float kLeastSquared = 0x1p-100f;

// What `encode` finds out about one vector t = vector - centre and its code c, t ~ scale * c.
struct Encoding {
  int32_t code_squares;  // sum of c^2
  float residual;        // sum of (t - scale * c)^2
  float squared;         // sum of t^2
};

// What decides which clusters a query has to look into, see `keep_clusters`.
struct ClusterBounds {
  const float* reach;  // [C] radius of the cluster plus slack
  const float* slack;  // [C] bound on the rounding error of a row's projection
  const float* gaps;   // [C] distance from the query's own (nearest) centroid, rounded up
  float own;           // squared distance to the query's own centroid
  float limit;         // distance beyond which nothing can win
  float rounding;      // relative error allowed for in squared distances
};

// The codes of many queries, and of many rows that each of them is compared with.
struct ScreenBatch {
  const uint8_t* queries;  // [count, padded to a multiple of kBatchStep; stride]
  int64_t stride;          // a multiple of kCodeStride; zeros from packs * 4 on
  int64_t count;
  const int32_t* thresholds;  // [count, padded], which `passed` may raise; of padding: kNothing
  const int8_t* codes;        // [rows / 16, packs, 16, 4]
  const int32_t* bias;        // [rows]
  int64_t packs;
  int64_t rows;  // a multiple of kTileRows
  // Called for up to 64 rows, bit i standing for row + i, of which some passed for a query.
  void (*passed)(void* search, int64_t query, int64_t row, uint64_t mask);
  void* search;
};

struct SearchKernels {
  const char* name;

  // A query's codes are in units of `query_step` times the rows' scale: 1, or 2 where the products
  // of 8-bit numbers would overflow. They lie within kCodeLimit / query_step and are stored plus
  // kQueryOffset / query_step.
  int query_step;

  // Canonical squared distances from a query [dim] to `count` <= 16 rows, named by `rows`.
  void (*squared_distances)(const Rows& bank, const float* query, const int64_t* rows, int count,
                            float* squared);

  // The plain search of a tile: canonical squared distances from each of `num_queries` queries
  // [num_queries, dim] to the rows [first, first + count), count <= 64; `squared` [num_queries,
  // 64]. masks: a bit per row that is at most limits[q] away. Whether all distances were finite;
  // false as well if their sum overflows. A row that holds NaN or infinity has no finite distance.
  bool (*distance_tile)(const Rows& bank, int64_t first, int count, const float* queries,
                        int num_queries, const float* limits, float* squared, uint64_t* masks);

  // Products of a vector [dims] with each column of a matrix [dims, columns], a multiple of 16.
  void (*products)(const double* vector, const float* matrix, int64_t dims, int64_t columns,
                   double* result);

  // Codes of `vector` about `centre`, both padded with zeros to a multiple of 16 `dims`: integers
  // within `limit`, each stored plus `offset`.
  Encoding (*encode)(const float* vector, const float* centre, int64_t dims, float scale, int limit,
                     int offset, uint8_t* code);

  // The largest difference of a coordinate, over padded vectors.
  float (*largest_difference)(const float* vector, const float* centre, int64_t dims);

  // Which of 64 rows of codes may be close enough to each of 1..6 queries: a bit per row. A row of
  // codes b passes for stored codes q if sum(q * b) - floor(bias / query_step) >= threshold.
  // codes: 4 blocks [packs, 16, 4]; bias: [64]; queries: a pointer to [packs * 4] codes each.
  void (*screen_tile)(const uint8_t* const* queries, const int32_t* thresholds, int num_queries,
                      const int8_t* codes, const int32_t* bias, int64_t packs, uint64_t* masks);

  // The same for all pairs of a batch.
  void (*screen_batch)(const ScreenBatch& batch);

  // As `screen_tile`, for one query and `blocks` blocks: 16 bits per block. Whether any row passed.
  bool (*screen_blocks)(const uint8_t* query, int32_t threshold, const int8_t* codes,
                        const int32_t* bias, int64_t packs, int64_t blocks, uint16_t* masks);

  // As `screen_tile`, for one query, and only for those of the tile's 4 blocks in which a bit of
  // `mask` is set. Which of the rows of `mask` pass.
  uint64_t (*screen_masked)(const uint8_t* query, int32_t threshold, const int8_t* codes,
                            const int32_t* bias, int64_t packs, uint64_t mask);

  // For each of the 16 places in a block, the block in which the row there has the largest sum: 16
  // rows that are likely to be close. Padding is only named where a place has nothing else.
  void (*closest_codes)(const uint8_t* query, const int8_t* codes, const int32_t* bias,
                        int64_t packs, int64_t blocks, int32_t* block_of_lane);

  // Squared distances from a point to all centroids, which come in tiles [C / 16, dims, 16].
  // Returns the index of a smallest one.
  int64_t (*tile_distances)(const float* point, const float* tiles, int64_t dims, int64_t num_tiles,
                            float* squared);

  // Indices of the clusters that may hold a row closer than `limit`; returns how many. `squared`:
  // squared distances to the centroids; arrays are padded to a multiple of 16.
  int64_t (*keep_clusters)(const ClusterBounds& bounds, const float* squared, int64_t clusters,
                           int32_t* kept);

  // How many of the ascending values are below `value`.
  int64_t (*count_below)(const float* ascending, int64_t count, float value);
};

// Kernel sets compiled in; the caller checks that the processor has the instructions.
const SearchKernels& portable_kernels();
#if (defined(__x86_64__) || defined(__i386__)) && defined(__GNUC__)
#define PSVDD_X86 1
const SearchKernels& avx2_kernels();
const SearchKernels& avx512_kernels();
#endif
#if PSVDD_X86 && defined(__x86_64__) && defined(__linux__) && \
    ((defined(__clang__) && __clang_major__ >= 12) || (!defined(__clang__) && __GNUC__ >= 11))
#define PSVDD_AMX 1
const SearchKernels& amx_kernels();  // where there is AVX-512, too
// Whether the processor has tiles and the system lets this process use them, for which it asks.
bool may_use_tiles();
#endif

const SearchKernels& active_kernels();
void set_active_kernels(const SearchKernels& kernels);  // which this processor must be able to run

}  // namespace psvdd::cpu
