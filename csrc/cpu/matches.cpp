// Putting the rows that are within a radius in order: a counting sort by query, then each query's
// by distance. Traffic: each match is read twice and written once, and its query's sorted in a
// cache where they fit.

#include "matches.h"

#include <algorithm>
#include <vector>

#include "parallel.h"

namespace psvdd::cpu {
namespace {

constexpr int64_t kQueriesAtOnce = 64;

}  // namespace

void Matches::take(int64_t queries, int64_t* starts, float* squared, int64_t* ids,
                   int num_threads) {
  std::fill(starts, starts + queries + 1, int64_t{0});
  for (const List& list : lists_) {
    for (const Match& match : list.found_) ++starts[match.query + 1];
  }
  for (int64_t q = 0; q < queries; ++q) starts[q + 1] += starts[q];
  std::vector<int64_t> next(starts, starts + queries);
  for (List& list : lists_) {
    for (const Match& match : list.found_) {
      const int64_t place = next[match.query]++;
      squared[place] = match.squared;
      ids[place] = match.id;
    }
    std::deque<Match>().swap(list.found_);  // gives its memory back
  }
  const int64_t parts = (queries + kQueriesAtOnce - 1) / kQueriesAtOnce;
  parallel_for(parts, num_threads, [&](int64_t part) {
    std::vector<std::pair<float, int64_t>> sorted;
    const int64_t end = std::min(queries, (part + 1) * kQueriesAtOnce);
    for (int64_t q = part * kQueriesAtOnce; q < end; ++q) {
      sorted.clear();
      for (int64_t i = starts[q]; i < starts[q + 1]; ++i) sorted.emplace_back(squared[i], ids[i]);
      std::sort(sorted.begin(), sorted.end());
      for (int64_t i = starts[q]; i < starts[q + 1]; ++i) {
        squared[i] = sorted[i - starts[q]].first;
        ids[i] = sorted[i - starts[q]].second;
      }
    }
  });
}

}  // namespace psvdd::cpu
