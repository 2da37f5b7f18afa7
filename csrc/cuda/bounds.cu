// Limits and lists from the maxima (bounds.h). Traffic: the maxima are read twice, the lists
// written over them. Bound by memory.

#include "bounds.h"

#include <cmath>

#include "kernels.h"
#include "ptx.h"
#include "warp.h"

namespace psvdd::cuda {
namespace {

// Where groups exclude rows, segments are rescored in ranges, so that what a query finds in one
// limits its search in the next: the first ends after kFirstRange segments, every other after
// kRangeGrowth times as many as the one before. Were segments in random order, any of those after
// the first n would be the best of n + 1 with a probability of 1 / (n + 1): in ranges of 12, 48,
// 192 segments, 12 / 5, 48 / 17 and 192 / 65 are expected to improve a limit, about three in each.
constexpr int64_t kFirstRange = 4, kRangeGrowth = 4;

static_assert(kThreadsPerBlock == kQueryTile, "a block reads whole tiles of queries");

__global__ void clear_each(Key* keys, int64_t count) {
  for (int64_t q = first_element(); q < count; q += element_step()) keys[q] = kNothingYet;
}

// A warp per segment, and on to the next.
__global__ void find_groups(Rescore pairs, SegmentGroups found) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t segments = pairs.bank.segments(), warps = element_step() / kWarp;
  for (int64_t s = first_element() / kWarp; s < segments; s += warps) {
    const int64_t begin = pairs.bank.begin(s), end = pairs.bank.end(s);
    int64_t least = pairs.group_of(pairs.number_of(begin)), largest = least;
    for (int64_t row = begin + lane; row < end; row += kWarp) {
      const int64_t group = pairs.group_of(pairs.number_of(row));
      least = group < least ? group : least;
      largest = group > largest ? group : largest;
    }
    warp_range(&least, &largest);
    if (lane == 0) {
      found.ranges[2 * s] = least;
      found.ranges[2 * s + 1] = largest;
    }
  }
}

// A thread per query: lowers its limit to the distance of what it has found. start: limits are not
// set yet.
__global__ void limit_by_keys(Bounds bounds, bool start, int64_t count) {
  const float scale = frame_scale(*bounds.largest);
  for (int64_t q = first_element(); q < count; q += element_step()) {
    const float squared = squared_of(bounds.keys[q]);
    const float limit =
        scale == 0.0f || !(squared < INFINITY) ? INFINITY : sqrtf(squared) * scale * kRoundUp;
    const unsigned bits = __float_as_uint(limit);
    if (start || bits < bounds.limits[q]) bounds.limits[q] = bits;
  }
}

// A thread per query and share of the segments (shares are numbered along y): lowers the query's
// limit to the upper bounds that the maxima give.
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
    if (!(squared < INFINITY) || bounds.some_excluded(q, s)) continue;
    const float upper =
        (sqrtf(fmaxf(squared, 0.0f)) + error + bounds.segments.errors[s]) * kRoundUp;
    if (upper < least) least = upper;
  }
  if (least < INFINITY) atomicMin(bounds.limits + q, __float_as_uint(least));
}

// A block per segment, from `first_segment` on: lists the queries whose nearest row it may hold.
// lists: [num_segments, padded_queries], written over the maxima, each from its front. That
// overwrites only what has been read, as a query's position in the list is never beyond its number.
__global__ void keep_queries(Bounds bounds, int64_t first_segment) {
  // Counts of two rounds, taken in turn, so that one barrier a round is enough.
  auto* warp_counts = reinterpret_cast<int*>(shared_memory());  // [2, kWarpsPerBlock]
  const int64_t s = first_segment + blockIdx.x;
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
      keep = !(least > reach * reach * kRoundUp) && !bounds.all_excluded(q, s);
    }
    const unsigned ballot = __ballot_sync(kAllLanes, keep);
    int* counts = warp_counts + first / kQueryTile % 2 * kWarpsPerBlock;
    if (lane == 0) counts[warp] = __popc(ballot);
    __syncthreads();
    int position = kept + __popc(ballot & ((1u << lane) - 1));
    for (int w = 0; w < kWarpsPerBlock; ++w) {
      if (w < warp) position += counts[w];
      kept += counts[w];
    }
    if (keep) list[position] = static_cast<int32_t>(q);
  }
  if (threadIdx.x == 0) bounds.counts[s] = kept;
}

__global__ void offer_each(const Key* keys, int64_t first_row, float* squared, int64_t* indices,
                           int64_t count) {
  for (int64_t q = first_element(); q < count; q += element_step()) {
    const Key key = keys[q];
    if (key == kNothingYet) continue;
    const float found = squared_of(key);
    const int64_t row = first_row + static_cast<int64_t>(key & 0xffffffffu);
    if (found > squared[q] || (found == squared[q] && row >= indices[q])) continue;
    squared[q] = found;
    indices[q] = row;
  }
}

__global__ void finish_each(FinishSearchParams params) {
  for (int64_t i = first_element(); i < params.count; i += element_step()) {
    params.distances[i] = sqrtf(params.distances[i]);
    if (params.indices[i] == kNoRow) params.indices[i] = -1;
  }
}

}  // namespace

void clear_keys(Key* keys, int64_t queries, std::uintptr_t stream) {
  launch(PSVDD_KERNEL(clear_each), {blocks_for(queries), kThreadsPerBlock}, stream, keys, queries);
}

void find_segment_groups(const Rescore& pairs, const SegmentGroups& found, std::uintptr_t stream) {
  if (pairs.groups.query_groups == nullptr) return;
  launch(PSVDD_KERNEL(find_groups), {blocks_for(pairs.bank.segments() * kWarp), kThreadsPerBlock},
         stream, pairs, found);
}

void rescore_kept(const Bounds& bounds, Rescore pairs, std::uintptr_t stream) {
  const auto limit_by_what_is_found = [&](bool start) {
    launch(PSVDD_KERNEL(limit_by_keys), {blocks_for(bounds.num_queries), kThreadsPerBlock}, stream,
           bounds, start, bounds.num_queries);
  };
  limit_by_what_is_found(true);
  const int64_t tiles = bounds.padded_queries / kQueryTile;
  const int64_t shares = std::clamp<int64_t>(4 * multiprocessors() / tiles, 1,
                                             std::min<int64_t>(bounds.num_segments, 1024));
  launch(PSVDD_KERNEL(lower_limits),
         {dim3(static_cast<unsigned>(tiles), static_cast<unsigned>(shares)), kThreadsPerBlock},
         stream, bounds);

  pairs.lists = reinterpret_cast<const int32_t*>(bounds.maxima);
  pairs.counts = bounds.counts;
  pairs.list_pitch = bounds.padded_queries;
  const bool in_ranges = bounds.groups.query_groups != nullptr;
  for (int64_t begin = 0, end; begin < bounds.num_segments; begin = end) {
    end = in_ranges ? std::min(std::max(kFirstRange, begin * kRangeGrowth), bounds.num_segments)
                    : bounds.num_segments;
    if (begin > 0) limit_by_what_is_found(false);
    launch(PSVDD_KERNEL(keep_queries),
           {dim3(static_cast<unsigned>(end - begin)), kThreadsPerBlock,
            2 * kWarpsPerBlock * sizeof(int)},
           stream, bounds, begin);
    pairs.first_segment = begin;
    pairs.end_segment = end;
    rescore(pairs, stream);
  }
}

void offer_results(const Key* keys, int64_t queries, int64_t first_row, float* squared,
                   int64_t* indices, std::uintptr_t stream) {
  launch(PSVDD_KERNEL(offer_each), {blocks_for(queries), kThreadsPerBlock}, stream, keys, first_row,
         squared, indices, queries);
}

void finish_search(const FinishSearchParams& params, std::uintptr_t stream) {
  if (params.count == 0) return;
  launch(PSVDD_KERNEL(finish_each), {blocks_for(params.count), kThreadsPerBlock}, stream, params);
}

}  // namespace psvdd::cuda
