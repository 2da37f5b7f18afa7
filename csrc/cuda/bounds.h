// What the maxima of the screen prove: for each query a limit on how far its nearest row can be,
// and for each segment the queries whose nearest row it may hold. Shared by the searches with and
// without clusters.
//
// Why a skipped segment cannot win. Let codes q, b stand for the scaled vectors with errors e_q and
// e_b (|x - code| <= e). With v = q b - |b|^2 / 2 as computed, |q - b|^2 = |q|^2 - 2 v up to 2 E,
// where E = screen_rounding * (|q| + |b|)^2 bounds the rounding of v and of |q|^2. So the best row
// of the segment is no farther than sqrt(|q|^2 - 2 v + 2 E) + e_q + e_b, and no row of it is nearer
// than sqrt(|q|^2 - 2 v - 2 E) - e_q - e_b. The least of the former over all segments, widened by
// what canonical rounding may change, is the limit; a segment whose latter exceeds it is dropped.
//
// Where groups exclude rows, the best row of a segment may be one that the query may not match,
// which limits nothing. The range of a segment's groups tells where there is no such row; where
// that leaves a query without a limit, what it finds in the first segments limits its search in the
// others (rescore_kept).
#pragma once

#include "../params.h"
#include "rescore.h"
#include "screen.h"

namespace psvdd::cuda {

// The least and the largest group of the rows of each segment.
struct SegmentGroups {
  int64_t* ranges;  // [segments, 2]; null where there are no groups

  // Whether the segment may hold rows of the group, and whether it holds no others.
  __device__ bool may_hold(int64_t segment, int64_t group) const {
    return ranges[2 * segment] <= group && group <= ranges[2 * segment + 1];
  }
  __device__ bool holds_only(int64_t segment, int64_t group) const {
    return ranges[2 * segment] == group && ranges[2 * segment + 1] == group;
  }
};

// What limits and lists are made from, for one chunk of the bank and one of the queries.
struct Bounds {
  Codes queries;
  int64_t num_queries;
  int64_t padded_queries;
  Segments segments;
  int64_t num_segments;
  Groups groups;  // query_groups counts from the first query of the chunk
  SegmentGroups segment_groups;
  const float* largest;  // of the frame
  const Key* keys;       // [num_queries], what has been found so far
  float rounding;        // screen_rounding
  float canonical;       // canonical_rounding
  float* maxima;         // [num_segments, padded_queries], then the lists in their place
  int32_t* counts;       // [num_segments], of queries in each list
  unsigned* limits;      // [num_queries], upper bounds on distances, as the bits of floats

  // 2 E of the proof above, rounded up; square: |q|^2.
  __device__ float twice_rounding(float square, int64_t segment) const {
    const float norms = sqrtf(square) * kRoundUp + segments.norms[segment];
    return 2.0f * rounding * norms * norms * kRoundUp;
  }
  // Whether the segment may hold rows that the query may not match.
  __device__ bool some_excluded(int64_t query, int64_t segment) const {
    return groups.query_groups != nullptr &&
           segment_groups.may_hold(segment, groups.query_groups[query]);
  }
  // Whether it holds only such rows.
  __device__ bool all_excluded(int64_t query, int64_t segment) const {
    return groups.query_groups != nullptr &&
           segment_groups.holds_only(segment, groups.query_groups[query]);
  }
};

// Sets all keys to kNothingYet.
void clear_keys(Key* keys, int64_t queries, std::uintptr_t stream);
// Finds the groups of the bank's segments; does nothing where there are no groups.
void find_segment_groups(const Rescore& pairs, const SegmentGroups& found, std::uintptr_t stream);
// Rescores the pairs of a query and a segment that the maxima do not rule out.
void rescore_kept(const Bounds& bounds, Rescore pairs, std::uintptr_t stream);
// Offers what the keys say to the results of a search for one neighbour, see NearestParams.
// first_row is added to the keys' row numbers.
void offer_results(const Key* keys, int64_t queries, int64_t first_row, float* squared,
                   int64_t* indices, std::uintptr_t stream);

}  // namespace psvdd::cuda
