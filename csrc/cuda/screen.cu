// The screen's inner loops: float16 products with float32 sums on tensor cores (`mma` m16n8k16).
//
//            bank tile (columns)                    One result per query and segment of 256 bank
//          +-----------------------+                rows: the largest q b - |b|^2 / 2. The sums
//  queries | acc = -|b|^2 / 2      |  max over      start from the second term, so all that is left
//  (rows)  | acc += q b  (mma)     | ==========>    to do per pair of vectors is one maximum: of
//          +-----------------------+  a segment     values only, no index, no matrix of distances.
//
// Two kernels. `screen_narrow` (dim <= 64): a warp keeps 64 queries in registers for good and only
// the bank streams by, in tiles that the block's four warps share. Shared memory gives 512 bytes
// per 8 `mma` and warp, a third of what it could; global memory gives a bank tile per 256 queries,
// or per 64 where visits are listed. `screen_wide` (any dim): a block of 8 warps makes 256 queries
// x 128 rows, 64 x 64 a warp, while chunks of 64 coordinates of both stream by. Both fill a ring of
// tiles by asynchronous copies some stages ahead; where the tiles come from a list, it is the
// bank's segments in that order. Bound by the tensor cores: 2 dim operations per pair, against one
// maximum on the ordinary units.

#include <type_traits>

#include "kernels.h"
#include "ptx.h"
#include "screen.h"
#include "warp.h"

namespace psvdd::cuda {
namespace {

constexpr int kWarpQueries = 64;  // queries that a warp finds maxima for
constexpr int kCopyBytes = 16;    // of one asynchronous copy

struct Screen {
  Codes queries;
  Codes bank;
  int64_t segments;
  Visits visits;
  float* maxima;           // [segments, padded_queries]
  int64_t padded_queries;  // a multiple of kQueryTile
};

// The share of its queries' segments that this block takes; shares are numbered along y. In 32
// bits, to save registers: there are fewer than 2^24 segments.
struct Share {
  int begin, end;
  const int32_t* list;  // of segments, or null

  __device__ explicit Share(const Screen& params) : list(nullptr) {
    int64_t count = params.segments;
    if (params.visits.segments != nullptr) {
      list = params.visits.segments + blockIdx.x * params.segments;
      count = params.visits.counts[blockIdx.x];
    }
    begin = static_cast<int>(count * blockIdx.y / gridDim.y);
    end = static_cast<int>(count * (blockIdx.y + 1) / gridDim.y);
  }
  __device__ int segment(int i) const { return list == nullptr ? i : list[i]; }
};

// Writes the maxima of 64 queries: `best[m][h]` is of query 16 m + 8 h + lane / 4, over this lane's
// columns; four neighbouring lanes share their queries.
__device__ void write_maxima(float (&best)[4][2], float* maxima) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
#pragma unroll
  for (int m = 0; m < 4; ++m) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float value = best[m][h];
      value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, 1));
      value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, 2));
      if (lane % 4 == m) maxima[m * 16 + h * 8 + lane / 4] = value;
      best[m][h] = -INFINITY;
    }
  }
}

// Raises the maxima of this lane's two rows by its part of one 16 x 8 result.
__device__ void keep_largest(const float (&acc)[4], float (&best)[2]) {
  best[0] = fmaxf(best[0], fmaxf(acc[0], acc[1]));
  best[1] = fmaxf(best[1], fmaxf(acc[2], acc[3]));
}

// --- dim <= 64 -----------------------------------------------------------------------------------

// kSteps: padded dim / 16. kQueryWarps: 4 or 1. With 4, for brute force, each of the block's four
// warps has 64 queries of its own, so that a bank tile serves 256. With 1, where visits are listed,
// the warps share 64 queries and divide the rows of a tile, so that a list is the union of what
// only 64 queries want.
template <int kSteps, int kQueryWarps>
struct Narrow {
  static constexpr int kWarps = 4;
  static constexpr int kThreads = kWarps * kWarp;
  static constexpr int kRowWarps = kWarps / kQueryWarps;
  static constexpr int kQueries = kQueryWarps * kWarpQueries;
  static constexpr int kRows = kRowWarps == 1 ? 64 : 128;  // of a tile
  static constexpr int kRowsPerWarp = kRows / kRowWarps;
  static constexpr int kTilesPerSegment = kSegmentRows / kRows;
  static constexpr int kDim = kSteps * kDimStep;
  // As many as leave room for a second block on multiprocessors of 100 KiB (sm_86, 89, 120).
  static constexpr int kStages = kRowWarps == 1 ? 4 : kDim < 64 ? 3 : 2;
  static constexpr int kPitch = kDim * 2 + kCopyBytes;  // bytes, an odd multiple of 16
  static constexpr int kTileBytes = kRows * kPitch;
  static constexpr int kStageBytes = kTileBytes + kRows * static_cast<int>(sizeof(float));
  static constexpr int kRingBytes = kStages * kStageBytes;
  static constexpr int kSharedBytes =  // the ring, and maxima of the warps that share queries
      kRingBytes +
      (kRowWarps == 1 ? 0 : kRowWarps * kWarpQueries * static_cast<int>(sizeof(float)));
  static_assert(kSharedBytes <= 49 * 1024, "two blocks, each with 1 KiB reserved, in 100 KiB");
  static_assert(kPitch / kCopyBytes % 2 == 1, "eight rows of a matrix must lie in different banks");
};

// Starts copying bank tile `index` of the share: codes, and the squared norms beside.
template <typename Shape>
__device__ void copy_narrow_tile(const Screen& params, const Share& share, int index,
                                 unsigned char* stage) {
  constexpr int kCopiesPerRow = Shape::kDim * 2 / kCopyBytes;
  constexpr int kCopies = Shape::kRows * kCopiesPerRow;
  const int segment = share.segment(share.begin + index / Shape::kTilesPerSegment);
  const int64_t row =
      segment * int64_t{kSegmentRows} + index % Shape::kTilesPerSegment * Shape::kRows;
  const auto* codes =
      reinterpret_cast<const unsigned char*>(params.bank.halves + row * Shape::kDim);
#pragma unroll
  for (int first = 0; first < kCopies; first += Shape::kThreads) {
    const int c = first + static_cast<int>(threadIdx.x);
    copy_async_16(stage + c / kCopiesPerRow * Shape::kPitch + c % kCopiesPerRow * kCopyBytes,
                  codes + c * kCopyBytes);
  }
  static_assert(kCopies % Shape::kThreads == 0, "every thread makes as many copies");
  const auto* squares = reinterpret_cast<const unsigned char*>(params.bank.squares + row);
  const int s = static_cast<int>(threadIdx.x) * kCopyBytes;
  if (s < Shape::kRows * 4) copy_async_16(stage + Shape::kTileBytes + s, squares + s);
}

template <int kSteps, int kQueryWarps>
__global__ void __launch_bounds__(Narrow<kSteps, kQueryWarps>::kThreads, 3)
    screen_narrow(Screen params) {
  using Shape = Narrow<kSteps, kQueryWarps>;
  constexpr int kTilesPerSegment = Shape::kTilesPerSegment;
  unsigned char* ring = shared_memory();
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int quad = lane / 4, pair = lane % 4;  // four lanes share a row of a matrix
  const Share share(params);
  const int tiles = (share.end - share.begin) * kTilesPerSegment;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int64_t first_query =
      blockIdx.x * int64_t{Shape::kQueries} + warp % kQueryWarps * kWarpQueries;
  const int first_row = warp / kQueryWarps * Shape::kRowsPerWarp;  // in a tile

  // The queries, in the registers where `mma` wants them.
  uint32_t queries[kSteps][4][4];
#pragma unroll
  for (int m = 0; m < 4; ++m) {
    const auto* row = reinterpret_cast<const uint32_t*>(
        params.queries.halves + (first_query + m * 16 + quad) * Shape::kDim);
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      queries[k][m][0] = row[k * 8 + pair];
      queries[k][m][1] = row[8 * Shape::kDim / 2 + k * 8 + pair];
      queries[k][m][2] = row[k * 8 + 4 + pair];
      queries[k][m][3] = row[8 * Shape::kDim / 2 + k * 8 + 4 + pair];
    }
  }

  // Fill the ring but for one stage.
  for (int stage = 0; stage < Shape::kStages - 1; ++stage) {
    if (stage < tiles) {
      copy_narrow_tile<Shape>(params, share, stage, ring + stage * Shape::kStageBytes);
    }
    copy_async_commit();
  }

  float best[4][2];
#pragma unroll
  for (int m = 0; m < 4; ++m) best[m][0] = best[m][1] = -INFINITY;
  for (int t = 0; t < tiles; ++t) {
    // After the barrier, tile t has arrived for all threads, and all are done with tile t - 1,
    // whose stage is filled next.
    copy_async_wait<Shape::kStages - 2>();
    __syncthreads();
    const int next = t + Shape::kStages - 1;
    if (next < tiles) {
      copy_narrow_tile<Shape>(params, share, next,
                              ring + next % Shape::kStages * Shape::kStageBytes);
    }
    copy_async_commit();

    const unsigned char* tile = ring + t % Shape::kStages * Shape::kStageBytes;
    const auto* squares = reinterpret_cast<const float*>(tile + Shape::kTileBytes);
    // Sixteen rows at a time: what fits beside the queries with three blocks on a multiprocessor.
#pragma unroll 1
    for (int first = first_row; first < first_row + Shape::kRowsPerWarp; first += 16) {
      float start[2][4];  // -|b|^2 / 2 of this lane's columns, the same for all its queries
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const int column = first + n * 8 + pair * 2;
        start[n][0] = start[n][2] = -0.5f * squares[column];
        start[n][1] = start[n][3] = -0.5f * squares[column + 1];
      }
      float acc[4][2][4];
#pragma unroll
      for (int k = 0; k < kSteps; ++k) {
        // Matrices: rows 0..7 at k, at k + 8, rows 8..15 at k, at k + 8.
        const int row = first + lane / 16 * 8 + lane % 8;
        uint32_t b[4];
        load_matrices(b, tile + row * Shape::kPitch + k * 32 + lane / 8 % 2 * kCopyBytes);
#pragma unroll
        for (int m = 0; m < 4; ++m) {
#pragma unroll
          for (int n = 0; n < 2; ++n) {
            multiply_add(acc[m][n], queries[k][m], {b[n * 2], b[n * 2 + 1]},
                         k == 0 ? start[n] : acc[m][n]);
          }
        }
      }
#pragma unroll
      for (int m = 0; m < 4; ++m) {
#pragma unroll
        for (int n = 0; n < 2; ++n) keep_largest(acc[m][n], best[m]);
      }
    }
    if (t % kTilesPerSegment == kTilesPerSegment - 1) {
      const int64_t segment = share.segment(share.begin + t / kTilesPerSegment);
      float* maxima = params.maxima + segment * params.padded_queries + first_query;
      if (Shape::kRowWarps == 1) {
        write_maxima(best, maxima);
      } else {
        // No barrier after reading: that of the next tile comes before of_warps is written again.
        auto* of_warps = reinterpret_cast<float*>(ring + Shape::kRingBytes);
        write_maxima(best, of_warps + warp * kWarpQueries);
        __syncthreads();
        const int q = static_cast<int>(threadIdx.x);
        if (q < kWarpQueries) {
          float value = of_warps[q];
#pragma unroll
          for (int w = 1; w < Shape::kRowWarps; ++w) {
            value = fmaxf(value, of_warps[w * kWarpQueries + q]);
          }
          maxima[q] = value;
        }
      }
    }
  }
  copy_async_wait<0>();
}

// --- any dim -------------------------------------------------------------------------------------

struct Wide {
  static constexpr int kQueries = kQueryTile;
  static constexpr int kTileRows = 64;  // of either segment
  static constexpr int kTilesPerSegment = kSegmentRows / kTileRows;
  static constexpr int kWarps = 8;  // 4 along the queries, 2 along the bank
  static constexpr int kThreads = kWarps * kWarp;
  static constexpr int kChunk = 64;                             // coordinates per stage
  static constexpr int kRowBytes = kChunk * 2;                  // 128: all banks
  static constexpr int kQueryBytes = kQueryTile * kRowBytes;    // 32 KiB
  static constexpr int kBankBytes = 2 * kTileRows * kRowBytes;  // 16 KiB
  static constexpr int kStageBytes = kQueryBytes + kBankBytes;
  static constexpr int kStages = 2;  // 96 KiB, what every card from sm_80 on has
  static constexpr int kSharedBytes = kStages * kStageBytes;
};

// The two columns of warps take a segment each: entries 2 n and 2 n + 1 of the share. An odd last
// segment is computed by both and written once.
__device__ int wide_segment(const Share& share, int number, int column) {
  const int i = share.begin + number * 2 + column;
  return share.segment(i < share.end ? i : share.end - 1);
}

// Where a piece of 16 bytes of a row is staged: the eight pieces change places from row to row, so
// that the same piece of eight consecutive rows lies in different banks of shared memory. The rows
// that a lane or thread handles all have the same `row % 8`, so that one place serves all.
__device__ int place_of(int piece, int row) { return (piece ^ (row % 8)) * kCopyBytes; }

// Starts copying one chunk of coordinates from `column` on: of the block's queries, and of 64 rows
// of either segment of the pair.
__device__ void copy_wide_chunk(const Screen& params, const Share& share, int tile, int column,
                                unsigned char* stage) {
  constexpr int kPieces = Wide::kRowBytes / kCopyBytes;
  constexpr int kRowsAtOnce = Wide::kThreads / kPieces;  // 32
  static_assert(kRowsAtOnce % 8 == 0, "a thread's rows must be alike in place_of");
  const int64_t dim = params.bank.padded_dim;
  const int row = static_cast<int>(threadIdx.x) / kPieces;
  const int piece = static_cast<int>(threadIdx.x) % kPieces;
  unsigned char* to = stage + row * Wide::kRowBytes + place_of(piece, row);
  const uint16_t* query =
      params.queries.halves + (blockIdx.x * int64_t{kQueryTile} + row) * dim + column + piece * 8;
#pragma unroll
  for (int i = 0; i < kQueryTile / kRowsAtOnce; ++i) {
    copy_async_16(to, query);
    to += kRowsAtOnce * Wide::kRowBytes;
    query += kRowsAtOnce * dim;
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t first =
        wide_segment(share, tile / Wide::kTilesPerSegment, half) * int64_t{kSegmentRows} +
        tile % Wide::kTilesPerSegment * Wide::kTileRows;
    const uint16_t* bank = params.bank.halves + (first + row) * dim + column + piece * 8;
#pragma unroll
    for (int i = 0; i < Wide::kTileRows / kRowsAtOnce; ++i) {
      copy_async_16(to, bank);
      to += kRowsAtOnce * Wide::kRowBytes;
      bank += kRowsAtOnce * dim;
    }
  }
}

__global__ void __launch_bounds__(Wide::kThreads, 1) screen_wide(Screen params) {
  unsigned char* ring = shared_memory();
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int query_warp = warp % 4, bank_warp = warp / 4;
  const Share share(params);
  const int chunks = static_cast<int>(params.bank.padded_dim / Wide::kChunk);
  const int tiles = (share.end - share.begin + 1) / 2 * Wide::kTilesPerSegment;
  const int64_t first_query = blockIdx.x * int64_t{kQueryTile} + query_warp * 64;
  // The row whose address this lane gives to load_matrices. The four matrices are, of a: rows 0..7
  // at k, rows 8..15 at k, then both at k + 8; of b: rows 0..7 at k and at k + 8, then rows 8..15
  // at both.
  const int a_row = query_warp * 64 + lane % 16;
  const int b_row = bank_warp * Wide::kTileRows + lane / 16 * 8 + lane % 8;

  // The chunk that is copied next.
  int next_tile = 0, next_chunk = 0, next_stage = 0;
  const auto copy_next = [&] {
    if (next_tile < tiles) {
      copy_wide_chunk(params, share, next_tile, next_chunk * Wide::kChunk,
                      ring + next_stage * Wide::kStageBytes);
    }
    copy_async_commit();
    next_stage = next_stage + 1 == Wide::kStages ? 0 : next_stage + 1;
    if (++next_chunk == chunks) {
      next_chunk = 0;
      ++next_tile;
    }
  };
  for (int stage = 0; stage < Wide::kStages - 1; ++stage) copy_next();

  float best[4][2];
#pragma unroll
  for (int m = 0; m < 4; ++m) best[m][0] = best[m][1] = -INFINITY;
  int stage = 0;
  for (int tile = 0; tile < tiles; ++tile) {
    float acc[4][8][4];
    {
      const int64_t segment = wide_segment(share, tile / Wide::kTilesPerSegment, bank_warp);
      const float* squares = params.bank.squares + segment * kSegmentRows +
                             tile % Wide::kTilesPerSegment * Wide::kTileRows + lane % 4 * 2;
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        const float even = -0.5f * squares[n * 8], odd = -0.5f * squares[n * 8 + 1];
#pragma unroll
        for (int m = 0; m < 4; ++m) {
          acc[m][n][0] = acc[m][n][2] = even;
          acc[m][n][1] = acc[m][n][3] = odd;
        }
      }
    }
#pragma unroll 1
    for (int chunk = 0; chunk < chunks; ++chunk) {
      copy_async_wait<Wide::kStages - 2>();
      __syncthreads();
      copy_next();
      const unsigned char* queries = ring + stage * Wide::kStageBytes + a_row * Wide::kRowBytes;
      const unsigned char* bank =
          ring + stage * Wide::kStageBytes + Wide::kQueryBytes + b_row * Wide::kRowBytes;
      stage = stage + 1 == Wide::kStages ? 0 : stage + 1;
#pragma unroll
      for (int k = 0; k < Wide::kChunk / kDimStep; ++k) {
        const int a_place = place_of(k * 2 + lane / 16, a_row);
        const int b_place = place_of(k * 2 + lane / 8 % 2, b_row);
        uint32_t a[4][4];
#pragma unroll
        for (int m = 0; m < 4; ++m) {
          load_matrices(a[m], queries + a_place + m * 16 * Wide::kRowBytes);
        }
#pragma unroll
        for (int two = 0; two < 4; ++two) {
          uint32_t b[4];
          load_matrices(b, bank + b_place + two * 16 * Wide::kRowBytes);
#pragma unroll
          for (int m = 0; m < 4; ++m) {
            multiply_add(acc[m][two * 2], a[m], {b[0], b[1]}, acc[m][two * 2]);
            multiply_add(acc[m][two * 2 + 1], a[m], {b[2], b[3]}, acc[m][two * 2 + 1]);
          }
        }
      }
    }
#pragma unroll
    for (int m = 0; m < 4; ++m) {
#pragma unroll
      for (int n = 0; n < 8; ++n) keep_largest(acc[m][n], best[m]);
    }
    if (tile % Wide::kTilesPerSegment == Wide::kTilesPerSegment - 1) {
      const int number = tile / Wide::kTilesPerSegment;
      if (share.begin + number * 2 + bank_warp < share.end) {
        const int64_t segment = wide_segment(share, number, bank_warp);
        write_maxima(best, params.maxima + segment * params.padded_queries + first_query);
      }
    }
  }
  copy_async_wait<0>();
}

}  // namespace

void screen(const Codes& queries, int64_t query_tiles, const Codes& bank, int64_t segments,
            const Visits& visits, float* maxima, std::uintptr_t stream) {
  const Screen params{queries, bank, segments, visits, maxima, query_tiles * kQueryTile};
  const auto run = [&](auto shape, const Kernel<Screen>& kernel) {
    using Shape = decltype(shape);
    // Enough blocks to fill the card a few times, each with several segments to look at.
    const int64_t tiles = params.padded_queries / Shape::kQueries;
    const int64_t wanted = (6 * int64_t{multiprocessors()} + tiles - 1) / tiles;
    const int64_t splits =
        std::clamp<int64_t>(wanted, 1, std::min<int64_t>((segments + 3) / 4, 65535));
    const dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(splits));
    launch(kernel, {grid, Shape::kThreads, Shape::kSharedBytes}, stream, params);
  };
  const auto run_narrow = [&](auto steps) {
    constexpr int kSteps = decltype(steps)::value;
    if (visits.segments == nullptr) {
      run(Narrow<kSteps, 4>{}, PSVDD_KERNEL(screen_narrow<kSteps, 4>));
    } else {
      run(Narrow<kSteps, 1>{}, PSVDD_KERNEL(screen_narrow<kSteps, 1>));
    }
  };
  if (bank.padded_dim > kNarrowDims) return run(Wide{}, PSVDD_KERNEL(screen_wide));
  switch (bank.padded_dim / kDimStep) {
    case 1:
      return run_narrow(std::integral_constant<int, 1>{});
    case 2:
      return run_narrow(std::integral_constant<int, 2>{});
    case 3:
      return run_narrow(std::integral_constant<int, 3>{});
    default:
      return run_narrow(std::integral_constant<int, 4>{});
  }
}

}  // namespace psvdd::cuda
