// How a brute-force search is cut into chunks, and the scratch arrays that one chunk needs.
#pragma once

#include <algorithm>
#include <cstdint>

#include "bounds.h"
#include "rescore.h"
#include "screen.h"

namespace psvdd::cuda {

constexpr int64_t kMostQueriesAtOnce = int64_t{1} << 18;
// With fewer products of coordinates than kLeastProducts a search is plain, as they do not repay
// the screen's launches; and with up to kMostPlainQueries, as many as a block of the plain search
// takes: it reads the bank once for them, while encoding the bank alone reads it twice.
constexpr double kLeastProducts = 0x1p28;
constexpr int64_t kMostPlainQueries = 32;

inline int64_t round_up(int64_t count, int64_t step) { return (count + step - 1) / step * step; }

// Queries of a chunk, in whole tiles, where memory has room for `that_fit`.
inline int64_t chunk_of(int64_t queries, int64_t that_fit) {
  const int64_t most =
      std::clamp(round_up(queries, kQueryTile), int64_t{kQueryTile}, kMostQueriesAtOnce);
  return std::clamp(that_fit / kQueryTile * kQueryTile, int64_t{kQueryTile}, most);
}

// How a search is cut so that its scratch stays near a limit, in bytes: half for the maxima, a
// quarter each for the codes of the bank and of the queries. A chunk is never less than a tile.
struct Plan {
  bool is_screened;
  int64_t bank_chunk;   // rows
  int64_t query_chunk;  // queries
  int64_t segments;     // of a bank chunk

  Plan(int64_t queries, int64_t rows, int64_t dim, SearchMethod method, int64_t limit) {
    const double products = static_cast<double>(queries) * rows * dim;
    is_screened = method == SearchMethod::kScreened ||
                  (method == SearchMethod::kAuto && queries > kMostPlainQueries &&
                   products >= kLeastProducts);
    const int64_t codes_that_fit = limit / 4 / (padded_dim(dim) * 2 + 8);
    bank_chunk = std::clamp(codes_that_fit / kSegmentRows * kSegmentRows, int64_t{kSegmentRows},
                            round_up(rows, kSegmentRows));
    segments = bank_chunk / kSegmentRows;
    const int64_t maxima_that_fit = limit / 2 / (segments * 4);
    query_chunk = chunk_of(queries, std::min(codes_that_fit, maxima_that_fit));
  }
};

// Cuts a workspace into arrays; without one, only adds up their sizes.
class Workspace {
 public:
  explicit Workspace(void* start) : start_(static_cast<unsigned char*>(start)) {}

  template <typename T>
  T* take(int64_t count) {
    const int64_t at = bytes_;
    bytes_ += round_up(count * static_cast<int64_t>(sizeof(T)), 256);
    return start_ == nullptr ? nullptr : reinterpret_cast<T*>(start_ + at);
  }
  int64_t bytes() const { return bytes_; }

 private:
  unsigned char* start_;
  int64_t bytes_ = 0;
};

// Codes of so many rows, taken from a workspace.
inline Codes take_codes(Workspace* workspace, int64_t rows, int64_t padded_dim) {
  return {padded_dim, workspace->take<uint16_t>(rows * padded_dim), workspace->take<float>(rows),
          workspace->take<float>(rows)};
}

// The scratch arrays of a search; a plain one needs only the keys.
struct Arrays {
  Key* keys;  // [queries]
  Frame frame{};
  Codes bank{}, queries{};
  Segments segments{};
  SegmentGroups segment_groups{};
  float* maxima = nullptr;     // [segments, query chunk]; becomes the lists of `keep_queries`
  int32_t* counts = nullptr;   // [segments], of the queries in each list
  unsigned* limits = nullptr;  // [query chunk], upper bounds on distances, as the bits of floats

  Arrays(const Plan& plan, int64_t num_queries, int64_t dim, bool has_groups,
         Workspace* workspace) {
    const int64_t padded = padded_dim(dim);
    keys = workspace->take<Key>(num_queries);
    if (!plan.is_screened) return;
    frame = {workspace->take<float>(dim), workspace->take<float>(1)};
    bank = take_codes(workspace, plan.bank_chunk, padded);
    queries = take_codes(workspace, plan.query_chunk, padded);
    segments = {workspace->take<float>(plan.segments), workspace->take<float>(plan.segments)};
    segment_groups = {has_groups ? workspace->take<int64_t>(2 * plan.segments) : nullptr};
    maxima = workspace->take<float>(plan.segments * plan.query_chunk);
    counts = workspace->take<int32_t>(plan.segments);
    limits = workspace->take<unsigned>(plan.query_chunk);
  }
};

}  // namespace psvdd::cuda
