// What the maxima of the screen prove: limits on how far the nearest row can be, and the queries
// that a segment may still hold the nearest row of. Shared by the searches with and without
// clusters.
//
// Why a skipped segment cannot win. Let codes q, b stand for the scaled vectors with errors e_q and
// e_b (|x - code| <= e). With v = q b - |b|^2 / 2 as computed, |q - b|^2 = |q|^2 - 2 v up to 2 E,
// where E = screen_rounding * (|q| + |b|)^2 bounds the rounding of v and of |q|^2. So the best row
// of the segment is no farther than sqrt(|q|^2 - 2 v + 2 E) + e_q + e_b, and no row of it is nearer
// than sqrt(|q|^2 - 2 v - 2 E) - e_q - e_b. The least of the former over all segments, widened by
// what canonical rounding may change, is the limit; a segment whose latter exceeds it is dropped.
//
// Where groups exclude rows, the best row of a segment may be one that the query must not have. The
// range of a segment's groups tells where it cannot be; where that leaves a query without a limit,
// the rows that it finds in some segments limit what it looks for in the rest (rescore_kept).
#pragma once

#include "../params.h"
#include "rescore.h"
#include "screen.h"

namespace psvdd::cuda {

// The least and the largest group of the rows of each segment.
struct SegmentGroups {
  int64_t* ranges;  // [segments, 2]; null where there are no groups

  __device__ bool may_hold(int64_t segment, int64_t group) const {
    return ranges[2 * segment] <= group && group <= ranges[2 * segment + 1];
  }
  __device__ bool holds_only(int64_t segment, int64_t group) const {
    return ranges[2 * segment] == group && ranges[2 * segment + 1] == group;
  }
};

// Of one chunk of the bank and one of the queries.
struct Bounds {
  Codes queries;
  int64_t num_queries;
  int64_t padded_queries;
  Segments segments;
  int64_t num_segments;
  Groups groups;  // query_groups counts from the first query of the chunk
  SegmentGroups segment_groups;
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
  __device__ bool some_excluded(int64_t query, int64_t segment) const {
    return groups.query_groups != nullptr &&
           segment_groups.may_hold(segment, groups.query_groups[query]);
  }
  // Whether it holds no others.
  __device__ bool all_excluded(int64_t query, int64_t segment) const {
    return groups.query_groups != nullptr &&
           segment_groups.holds_only(segment, groups.query_groups[query]);
  }
};

// No query has found anything.
void clear_keys(Key* keys, int64_t queries, std::uintptr_t stream);
// The groups of the bank's segments, if there are groups.
void find_segment_groups(const Rescore& pairs, const SegmentGroups& found, std::uintptr_t stream);
// Rescores the pairs that the maxima leave.
void rescore_kept(const Bounds& bounds, Rescore pairs, std::uintptr_t stream);
// Distances and rows from keys.
void write_results(const Key* keys, int64_t queries, float* distances, int64_t* indices,
                   std::uintptr_t stream);

}  // namespace psvdd::cuda
