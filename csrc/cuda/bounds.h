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
#pragma once

#include "../params.h"
#include "rescore.h"
#include "screen.h"

namespace psvdd::cuda {

// Of one chunk of the bank and one of the queries.
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

// No query has found anything.
void clear_keys(Key* keys, int64_t queries, std::uintptr_t stream);
// Rescores the pairs that the maxima leave. `maxima_count`: whether they may lower the limits.
void rescore_kept(const Bounds& bounds, bool maxima_count, Rescore pairs, std::uintptr_t stream);
// Distances and rows from keys.
void write_results(const Key* keys, int64_t queries, float* distances, int64_t* indices,
                   std::uintptr_t stream);

}  // namespace psvdd::cuda
