// The last step of the nearest-neighbour search on CUDA: the canonical distances, which decide.
#pragma once

#include <stdexcept>

#include "../params.h"
#include "screen.h"

namespace psvdd::cuda {

// What a query has found: the squared distance, as the bits of a float, in the upper half and the
// row's number in the lower, so that the smaller key is the nearer row, and of equally near ones
// the lower. All bits set: nothing yet.
using Key = unsigned long long;
constexpr Key kNothingYet = ~Key{0};
constexpr int64_t kMostRows = 0xffffffff;  // row numbers have 32 bits in a key

inline void check_rows(int64_t rows) {
  if (rows <= kMostRows) return;
  throw std::invalid_argument("nearest: a bank on one device may have up to 4294967295 rows");
}

__device__ inline float squared_of(Key key) {
  return key == kNothingYet ? INFINITY : __uint_as_float(static_cast<uint32_t>(key >> 32));
}

// Which queries to compare with which rows.
struct Rescore {
  Vectors queries;  // float32
  Vectors bank;
  int64_t first_segment, end_segment;  // of the bank, those to look at
  int64_t first_row;                   // the number of the bank's first row
  const int64_t* ids;  // [bank rows] the rows' numbers, or null: first_row, first_row + 1, ...
  // The queries that look at segment s are, in this order of preference:
  //   - those of a list: lists[s * list_pitch + i] for i < counts[s];
  //   - those whose nearest centroid is that of the segment's cluster c: own_starts[c] up to
  //     own_starts[c + 1], which number all queries of the search, where the first of `queries` has
  //     the number first_query;
  //   - all, where both `lists` and `own_starts` are null.
  const int32_t* lists;
  const int32_t* counts;
  int64_t list_pitch;
  const int32_t* segment_clusters;  // [segments]
  const int64_t* own_starts;        // [clusters + 1]
  int64_t first_query;
  Groups groups;  // query_groups counts from the first of `queries`
  Key* keys;      // [queries], lowered

  // The number of a row of the bank.
  __device__ int64_t number_of(int64_t row) const {
    return ids != nullptr ? ids[row] : first_row + row;
  }
  // The group of the row with a number.
  __device__ int64_t group_of(int64_t number) const {
    return groups.bank_groups[number / groups.rows_per_group];
  }
};

// Lowers the keys by the canonical distances of all pairs that are listed.
void rescore(const Rescore& params, std::uintptr_t stream);

}  // namespace psvdd::cuda
