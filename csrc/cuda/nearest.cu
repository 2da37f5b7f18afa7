// Exact nearest neighbour by the canonical squared distance (csrc/cpu/nearest.cpp), brute force.
//
// The bank is taken in chunks, and for each the queries in chunks:
//   1. encode   both are rounded to float16 about the bank chunk's centre (screen_encode.cu);
//   2. screen   per query and segment of 256 rows, the largest q b - |b|^2 / 2, by tensor cores;
//   3. bound    the least upper bound that these give on each query's distance;
//   4. keep     per segment, the queries that may have their nearest row in it, a list written over
//               the maxima it was made from;
//   5. rescore  listed pairs canonically (rescore.cu); the least (distance, row) per query is kept
//               by a 64-bit atomic minimum, which does not depend on any order.
// Without tensor cores, or where the caller wants the plain search, only 5, for all pairs.
//
// Why a skipped segment cannot win. Let codes q, b stand for the scaled vectors with errors e_q,
// e_b
// (|x - code| <= e). With v = q b - |b|^2 / 2 as computed, |q - b|^2 = |q|^2 - 2 v up to 2 E, where
// E = screen_rounding * (|q| + |b|)^2 bounds the rounding of v and of |q|^2. So the best row of the
// segment is no farther than sqrt(|q|^2 - 2 v + 2 E) + e_q + e_b, and no row of it is nearer than
// sqrt(|q|^2 - 2 v - 2 E) - e_q - e_b. The least of the former over all segments, widened by what
// canonical rounding may change, is the limit; a segment whose latter exceeds it is dropped.
//
// Traffic per bank chunk and query chunk: the bank's codes once per 256 queries (from the second-
// level cache), 12 bytes per query and segment for the maxima. Bound by the tensor cores.

#include <cmath>
#include <stdexcept>

#include "kernels.h"
#include "nearest_plan.h"
#include "ptx.h"
#include "rescore.h"
#include "screen.h"

namespace psvdd::cuda {
namespace {

constexpr int kWarp = 32;
constexpr int kWarps = kThreadsPerBlock / kWarp;

static_assert(kThreadsPerBlock == kQueryTile, "a block of `keep_queries` reads whole tiles");

// --- kernels
// ---------------------------------------------------------------------------------------

__global__ void clear_keys(Key* keys, int64_t count) {
  for (int64_t q = first_element(); q < count; q += element_step()) keys[q] = kNothingYet;
}

// What the bounds of one bank chunk and one query chunk are made from.
struct Bounds {
  Codes queries;
  int64_t num_queries;
  int64_t padded_queries;
  Segments segments;
  int64_t num_segments;
  Groups groups;  // query_groups counts from the first query of the chunk
  const int64_t* segment_groups;
  const float* largest;  // of the frame
  const Key* keys;       // [num_queries], what earlier chunks have found
  float rounding;        // screen_rounding
  float canonical;       // canonical_rounding
  float* maxima;
  int32_t* counts;
  unsigned* limits;

  // 2 E of the header.
  __device__ float twice_rounding(float square, int64_t segment) const {
    const float norms = sqrtf(square) * kRoundUp + segments.norms[segment];
    return 2.0f * rounding * norms * norms * kRoundUp;
  }
  // Whether the segment may hold rows that the query must not be matched with.
  __device__ bool may_be_excluded(int64_t query, int64_t segment) const {
    if (segment_groups == nullptr) return false;
    const int64_t group = groups.query_groups[query];
    return segment_groups[2 * segment] <= group && group <= segment_groups[2 * segment + 1];
  }
};

// Element = segment: the least and the largest group in it.
__global__ void find_segment_groups(Groups groups, int64_t first_row, int64_t rows,
                                    int64_t* segment_groups, int64_t count) {
  for (int64_t s = first_element(); s < count; s += element_step()) {
    const int64_t begin = first_row + s * kSegmentRows;
    const int64_t end = first_row + (rows < (s + 1) * kSegmentRows ? rows : (s + 1) * kSegmentRows);
    int64_t least = groups.bank_groups[begin / groups.rows_per_group], largest = least;
    for (int64_t i = begin / groups.rows_per_group; i <= (end - 1) / groups.rows_per_group; ++i) {
      const int64_t group = groups.bank_groups[i];
      least = group < least ? group : least;
      largest = group > largest ? group : largest;
    }
    segment_groups[2 * s] = least;
    segment_groups[2 * s + 1] = largest;
  }
}

// Element = query: the limit that earlier chunks give.
__global__ void start_limits(Bounds bounds, int64_t count) {
  const float scale = frame_scale(*bounds.largest);
  for (int64_t q = first_element(); q < count; q += element_step()) {
    const float squared = squared_of(bounds.keys[q]);
    const float limit =
        scale == 0.0f || !(squared < INFINITY) ? INFINITY : sqrtf(squared) * scale * kRoundUp;
    bounds.limits[q] = __float_as_uint(limit);
  }
}

// A thread per query and range of segments, blocks numbered along y.
__global__ void lower_limits(Bounds bounds) {
  const int64_t q = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (q >= bounds.num_queries) return;
  const int64_t begin = bounds.num_segments * blockIdx.y / gridDim.y;
  const int64_t end = bounds.num_segments * (blockIdx.y + 1) / gridDim.y;
  const float square = bounds.queries.squares[q];
  const float error = bounds.queries.errors[q];
  float least = INFINITY;
  for (int64_t s = begin; s < end; ++s) {
    const float v = bounds.maxima[s * bounds.padded_queries + q];
    const float squared = square - 2.0f * v + bounds.twice_rounding(square, s);
    if (!(squared < INFINITY) || bounds.may_be_excluded(q, s)) continue;
    const float upper =
        (sqrtf(fmaxf(squared, 0.0f)) + error + bounds.segments.errors[s]) * kRoundUp;
    if (upper < least) least = upper;
  }
  if (least < INFINITY) atomicMin(bounds.limits + q, __float_as_uint(least));
}

// A block per segment: the numbers of the queries that it may hold the nearest row of, written over
// its maxima from the front. What is overwritten has been read: positions never run ahead.
__global__ void keep_queries(Bounds bounds) {
  auto* warp_counts = reinterpret_cast<int*>(shared_memory());  // [2, kWarps]
  const int64_t s = blockIdx.x;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  float* maxima = bounds.maxima + s * bounds.padded_queries;
  auto* list = reinterpret_cast<int32_t*>(maxima);
  const float segment_error = bounds.segments.errors[s];
  const float scale = frame_scale(*bounds.largest);
  // Allows for canonical sums that underflow.
  const float tiny = scale * 0x1p-69f * sqrtf(static_cast<float>(bounds.queries.padded_dim + 16));
  int kept = 0;
  for (int64_t first = 0; first < bounds.num_queries; first += kQueryTile) {
    const int64_t q = first + threadIdx.x;
    bool keep = false;
    if (q < bounds.num_queries) {
      const float square = bounds.queries.squares[q];
      const float limit = __uint_as_float(bounds.limits[q]) * (kRoundUp + 4.0f * bounds.canonical);
      const float reach = (limit + tiny + bounds.queries.errors[q] + segment_error) * kRoundUp;
      const float least = square - 2.0f * maxima[q] - bounds.twice_rounding(square, s);
      keep = !(least > reach * reach * kRoundUp);
    }
    const unsigned ballot = __ballot_sync(0xffffffffu, keep);
    int* counts = warp_counts + first / kQueryTile % 2 * kWarps;
    if (lane == 0) counts[warp] = __popc(ballot);
    __syncthreads();
    int position = kept + __popc(ballot & ((1u << lane) - 1));
    for (int w = 0; w < kWarps; ++w) {
      if (w < warp) position += counts[w];
      kept += counts[w];
    }
    if (keep) list[position] = static_cast<int32_t>(q);
  }
  if (threadIdx.x == 0) bounds.counts[s] = kept;
}

__global__ void write_results(NearestParams params, const Key* keys, int64_t count) {
  for (int64_t q = first_element(); q < count; q += element_step()) {
    const Key key = keys[q];
    params.distances[q] = sqrtf(squared_of(key));
    params.indices[q] = key == kNothingYet ? -1 : static_cast<int64_t>(key & 0xffffffffu);
  }
}

// --- host
// ------------------------------------------------------------------------------------------

dim3 blocks_for(int64_t elements) {
  const int64_t needed = (elements + kThreadsPerBlock - 1) / kThreadsPerBlock;
  return dim3(static_cast<unsigned>(std::min(needed, kMaxBlocks)));
}

Groups groups_from(const Groups& groups, int64_t query) {
  Groups moved = groups;
  if (moved.query_groups != nullptr) moved.query_groups += query;
  return moved;
}

const void* row_of(const void* data, bool is_half, int64_t row, int64_t dim) {
  return static_cast<const unsigned char*>(data) + row * dim * (is_half ? 2 : 4);
}

}  // namespace

int64_t nearest_workspace(int64_t queries, int64_t rows, int64_t dim, SearchMethod method,
                          bool has_groups, int64_t limit) {
  Workspace workspace(nullptr);
  Arrays(Plan(queries, rows, dim, method, limit), queries, dim, has_groups, &workspace);
  return workspace.bytes();
}

void nearest(const NearestParams& params, std::uintptr_t stream) {
  if (params.queries == 0) return;
  if (params.bank_rows > kMostRows) {
    throw std::invalid_argument("nearest: a bank on one device may have up to 4294967295 rows");
  }
  const bool has_groups = params.groups.query_groups != nullptr;
  Plan plan(params.queries, params.bank_rows, params.dim, params.method, params.workspace_limit);
  Workspace workspace(params.workspace);
  const Arrays arrays(plan, params.queries, params.dim, has_groups, &workspace);
  plan.is_screened = plan.is_screened && has_tensor_cores();

  const Launch all_queries{blocks_for(params.queries), kThreadsPerBlock};
  launch("nearest", clear_keys, all_queries, stream, arrays.keys, params.queries);
  for (int64_t row = 0; row < params.bank_rows; row += plan.bank_chunk) {
    const Vectors bank{row_of(params.bank_data, params.bank_is_half, row, params.dim),
                       params.bank_is_half, std::min(plan.bank_chunk, params.bank_rows - row),
                       params.dim};
    const int64_t segments = (bank.rows + kSegmentRows - 1) / kSegmentRows;
    if (plan.is_screened) {
      find_frame(bank, arrays.frame, stream);
      encode(bank, arrays.frame, arrays.bank, arrays.segments, stream);
      if (has_groups) {
        launch("nearest", find_segment_groups, {blocks_for(segments), kThreadsPerBlock}, stream,
               params.groups, row, bank.rows, arrays.segment_groups, segments);
      }
    }
    for (int64_t q = 0; q < params.queries; q += plan.query_chunk) {
      const Vectors queries{params.query_data + q * params.dim, false,
                            std::min(plan.query_chunk, params.queries - q), params.dim};
      const Groups groups = groups_from(params.groups, q);
      Key* keys = arrays.keys + q;
      Rescore todo{queries, bank, row, nullptr, nullptr, nullptr, 0, groups, keys};
      if (plan.is_screened) {
        const int64_t tiles = (queries.rows + kQueryTile - 1) / kQueryTile;
        const Bounds bounds{arrays.queries,
                            queries.rows,
                            tiles * kQueryTile,
                            arrays.segments,
                            segments,
                            groups,
                            arrays.segment_groups,
                            arrays.frame.largest,
                            keys,
                            screen_rounding(arrays.bank.padded_dim),
                            canonical_rounding(params.dim),
                            arrays.maxima,
                            arrays.counts,
                            arrays.limits};
        encode(queries, arrays.frame, arrays.queries, {nullptr, nullptr}, stream);
        screen(arrays.queries, tiles, arrays.bank, segments, {nullptr, nullptr}, arrays.maxima,
               stream);
        launch("nearest", start_limits, {blocks_for(queries.rows), kThreadsPerBlock}, stream,
               bounds, queries.rows);
        const int64_t ranges = std::clamp<int64_t>(4 * multiprocessors() / tiles, 1,
                                                   std::min<int64_t>(segments, 1024));
        launch(
            "nearest", lower_limits,
            {dim3(static_cast<unsigned>(tiles), static_cast<unsigned>(ranges)), kThreadsPerBlock},
            stream, bounds);
        launch("nearest", keep_queries,
               {dim3(static_cast<unsigned>(segments)), kThreadsPerBlock, 2 * kWarps * sizeof(int)},
               stream, bounds);
        todo.lists = reinterpret_cast<const int32_t*>(arrays.maxima);
        todo.counts = arrays.counts;
        todo.list_pitch = tiles * kQueryTile;
      }
      rescore(todo, stream);
    }
  }
  launch("nearest", write_results, all_queries, stream, params,
         static_cast<const Key*>(arrays.keys), params.queries);
}

}  // namespace psvdd::cuda
