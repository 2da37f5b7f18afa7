// What every search on the CPU shares: the best row so far, the bounds that follow from it, and the
// canonical rescoring of rows that might be better.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "../params.h"
#include "../portable.h"
#include "matches.h"
#include "search_kernels.h"

namespace psvdd::cpu {

// The nearest rows of one query so far, ascending by squared distance, then by id; ids are rows as
// the user knows them. Entries that are not there yet have infinity and kNoRow.
//
// With `matches`, all rows within a limit instead: `squared` is that limit, of k = 1, and does not
// change; ids and rows are null.
struct Best {
  float* squared;  // [k]
  int64_t* ids;    // [k]
  int64_t* rows;   // [k] where the rows are stored, or null
  int k;
  Matches::List* matches = nullptr;
  int64_t query = 0;  // its number in `matches`

  // The list of one query, of lists of several that lie one after the other.
  Best of_query(int64_t q) const {
    if (matches != nullptr) return {squared + q, nullptr, nullptr, 1, matches, query + q};
    return {squared + q * k, ids + q * k, nullptr, k};
  }

  // What a squared distance may not exceed to be among them.
  float bound() const { return squared[k - 1]; }

  // Whether the row is among them now and was not before, so that the bound may have changed. With
  // `matches`, a row may be offered only once, and within the bound.
  bool offer(float other_squared, int64_t other_id, int64_t row) {
    if (matches != nullptr) {
      matches->add(query, other_id, other_squared);
      return false;
    }
    const auto before = [&](int i) {
      return squared[i] < other_squared || (squared[i] == other_squared && ids[i] < other_id);
    };
    int place = k;
    while (place > 0 && !before(place - 1)) --place;
    if (place == k || (ids[place] == other_id && other_id != kNoRow)) return false;
    for (int i = k - 1; i > place; --i) {
      squared[i] = squared[i - 1];
      ids[i] = ids[i - 1];
      if (rows != nullptr) rows[i] = rows[i - 1];
    }
    squared[place] = other_squared;
    ids[place] = other_id;
    if (rows != nullptr) rows[place] = row;
    return true;
  }
};

// A bank as a search sees it: stored rows, their ids, and which rows a query may not match.
struct Searched {
  Rows rows;
  const int64_t* ids;  // [M], or null if ids are the rows' numbers from first_id on
  int64_t first_id;
  Groups groups;

  int64_t id(int64_t row) const { return ids == nullptr ? first_id + row : ids[row]; }
  bool excluded(int64_t query, int64_t row) const {
    if (groups.query_groups == nullptr) return false;
    const int64_t number = ids == nullptr ? row : ids[row];
    return groups.query_groups[query] == groups.bank_groups[number / groups.rows_per_group];
  }
};

// Bound on the relative error of a canonical squared distance: one rounding per difference (which
// counts twice, as it is squared), one per term of a partial sum, and four for adding up the sums.
// Doubled, to be safe in every formula below.
inline double canonical_rounding(int64_t dim) {
  return 2.0 * static_cast<double>(dim / kLanes + 9) * 0x1p-24;
}

// A distance beyond which the canonical squared distance certainly exceeds `squared`. The second
// term allows for sums of subnormal numbers.
inline double winning_distance(float squared, int64_t dim) {
  return std::sqrt(squared * (1 + 2 * canonical_rounding(dim)) +
                   static_cast<double>(dim + 16) * 0x1p-148);
}

// Bound on the distance between a vector and what its code stands for. The last term allows for
// squares that underflow.
inline double residual_bound(const Encoding& encoding, int64_t dims) {
  return std::sqrt(static_cast<double>(encoding.residual)) * (1 + canonical_rounding(dims)) +
         0x1p-22 * std::sqrt(static_cast<double>(encoding.squared)) +
         std::sqrt(static_cast<double>(dims + 16)) * 0x1p-74;
}

// The screen's threshold for a query: rows whose sum is below it are farther than `limit` from the
// query. code_squares: |p|^2 of the query's code; limit: a distance; error: the bound on the
// query's residual plus that on a row's; scale: that of the codes.
//
// Codes q, b stand for points s * q, s * b. If the vectors are within `limit`, the points are
// within limit + error, so |q - b|^2 <= ((limit + error) / s)^2 =: most, an inequality of integers;
// |q - b|^2 = |q|^2 + |b|^2 - 2 q b turns it into q b - |b|^2 / 2 >= (|q|^2 - most) / 2. A query in
// steps of k, q = k p, divides all by k: p b - |b|^2 / (2 k) >= (k^2 |p|^2 - most) / (2 k).
inline int32_t screen_threshold(int32_t code_squares, double limit, double error, float scale,
                                int query_step) {
  const double reach = (limit + error) / scale;
  const double squares = static_cast<double>(code_squares) * query_step * query_step;
  const double least = std::floor((squares - reach * reach * (1 + 1e-12)) / (2 * query_step));
  if (!(least > kEverything)) return kEverything;
  return static_cast<int32_t>(std::min(least, double{kNothing} / 4));
}

// Computes the canonical distances of up to 16 rows; returns whether one of them is among the
// nearest now.
inline bool rescore(const SearchKernels& kernels, const Searched& bank, const float* query_vector,
                    int64_t query, const int64_t* rows, int count, Best* best) {
  int64_t allowed[kLanes];
  float squared[kLanes];
  if (bank.groups.query_groups != nullptr) {
    int kept = 0;
    for (int r = 0; r < count; ++r) {
      allowed[kept] = rows[r];
      kept += !bank.excluded(query, rows[r]);
    }
    rows = allowed;
    count = kept;
  }
  if (count == 0) return false;
  kernels.squared_distances(bank.rows, query_vector, rows, count, squared);
  bool improved = false;
  for (int r = 0; r < count; ++r) {
    if (squared[r] > best->bound()) continue;
    improved |= best->offer(squared[r], bank.id(rows[r]), rows[r]);
  }
  return improved;
}

// Rescores consecutive rows [begin, end).
inline bool rescore_range(const SearchKernels& kernels, const Searched& bank,
                          const float* query_vector, int64_t query, int64_t begin, int64_t end,
                          Best* best) {
  bool improved = false;
  int64_t rows[kLanes];
  for (int64_t first = begin; first < end; first += kLanes) {
    const int count = static_cast<int>(std::min<int64_t>(kLanes, end - first));
    for (int r = 0; r < count; ++r) rows[r] = first + r;
    improved |= rescore(kernels, bank, query_vector, query, rows, count, best);
  }
  return improved;
}

// Rescores the rows whose bits are set: bit i stands for row `first` + i.
inline bool rescore_mask(const SearchKernels& kernels, const Searched& bank,
                         const float* query_vector, int64_t query, int64_t first, uint64_t mask,
                         Best* best) {
  bool improved = false;
  while (mask != 0) {
    int64_t rows[kLanes];
    int count = 0;
    for (; mask != 0 && count < kLanes; mask &= mask - 1) {
      rows[count++] = first + __builtin_ctzll(mask);
    }
    improved |= rescore(kernels, bank, query_vector, query, rows, count, best);
  }
  return improved;
}

// The code of a query; see SearchKernels::query_step.
inline Encoding encode_query(const SearchKernels& kernels, const float* vector, const float* centre,
                             int64_t dims, float scale, uint8_t* code) {
  const int step = kernels.query_step;
  return kernels.encode(vector, centre, dims, scale * static_cast<float>(step), kCodeLimit / step,
                        kQueryOffset / step, code);
}

// The code of a row, for `write_code`.
inline Encoding encode_row(const SearchKernels& kernels, const float* vector, const float* centre,
                           int64_t dims, float scale, uint8_t* code) {
  return kernels.encode(vector, centre, dims, scale, kCodeLimit, 0, code);
}

// Puts the code of one row among those of its block, and its bias beside: the integer that turns
// sum((q + offset) * b) into q b - |b|^2 / 2, rounded so that the threshold stays on the safe side.
inline void write_code(const uint8_t* code, const Encoding& encoding, int64_t packs, int64_t row,
                       int8_t* codes, int32_t* bias) {
  int8_t* block = codes + row / kLanes * packs * 4 * kLanes;
  int32_t sum = 0;
  for (int64_t j = 0; j < packs * 4; ++j) sum += static_cast<int8_t>(code[j]);
  for (int64_t p = 0; p < packs; ++p) {
    std::memcpy(block + (p * kLanes + row % kLanes) * 4, code + p * 4, 4);
  }
  bias[row] = encoding.code_squares / 2 + kQueryOffset * sum;
}

// One stored row, widened to float32.
inline void read_row(const Rows& bank, int64_t row, float* values) {
  const int64_t start = row * bank.dim;
  if (!bank.half) {
    std::memcpy(values, static_cast<const float*>(bank.data) + start, bank.dim * sizeof(float));
    return;
  }
  const auto* halves = static_cast<const Half*>(bank.data) + start;
  for (int64_t j = 0; j < bank.dim; ++j) values[j] = to_float(halves[j]);
}

// `count` rounded up to a multiple of `step`.
inline int64_t round_up(int64_t count, int64_t step) { return (count + step - 1) / step * step; }

}  // namespace psvdd::cpu
