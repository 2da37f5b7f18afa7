// Exact nearest neighbour in a clustered bank.
//
// For a query: project it; take the distances to all centroids; search the cluster of the nearest
// one, the query's own, which gives a good upper bound `limit`; rule out clusters by two lower
// bounds on the distance to their rows; search the nearest few of the others. What the limit then
// leaves is searched for 256 queries together, cluster by cluster, so that a cluster's codes stay
// in the caches. Within a cluster, rows too near to or too far from the centroid are skipped in
// blocks (the triangle inequality), the others are compared as 8-bit codes, and those that pass
// rescored canonically. docs/design/cpu-search.md has the proofs of the bounds; each is widened by
// what rounding may have changed. Queries for which the bounds turn out to rule out little, far
// from all of the bank, are left to brute force.

#include <atomic>
#include <cmath>
#include <mutex>
#include <vector>

#include "clusters.h"
#include "kernels.h"
#include "parallel.h"
#include "rescore.h"
#include "watch.h"

namespace psvdd::cpu {
namespace {

constexpr int64_t kQueriesPerBatch = 256;
constexpr int64_t kBlocksAtOnce = 64;  // blocks screened under one limit
constexpr int64_t kNearFirst = 8;  // clusters searched at once, nearest first; others become visits
constexpr double kLargest = 1e15;  // squares of larger coordinates might overflow
// A query that would rescore more than this share of the bank is faster by brute force.
// More is taken for hopeless at once, when only the query's own cluster has been searched.
constexpr double kMostRescored = 1.0 / 16, kMostAtFirst = 1.0 / 4;
constexpr double kMostKept = 0.5;  // the same of a radius, of the rows in clusters that are left

// A query of the batch, and what is known of its answer.
struct Query {
  int64_t number;
  const float* vector;
  const float* projected;  // [axes]
  double error;            // of the projection
  Best best;
  // Distance between projections beyond which nothing can win, but for the bank's own rounding.
  float limit = INFINITY;
  int64_t scanned = 0, passed = 0;  // rows whose codes were looked at, and of these were rescored
};

// A cluster that a query of the batch still has to look into.
struct Visit {
  int32_t cluster;
  int32_t query;     // within the batch
  float squared;     // from the query to the centroid
  float half_plane;  // lower bound on the distance to the half-plane that holds the cluster
};

class Searcher {
 public:
  explicit Searcher(const ClusteredNearestParams& params, Matches* matches)
      : params_(params),
        bank_(params.bank),
        kernels_(active_kernels()),
        searched_{{bank_.data, bank_.projection.dim, bank_.is_half}, bank_.ids, 0, params.groups},
        axes_(bank_.projection.axes),
        padded_clusters_(round_up(bank_.clusters, kLanes)),
        rounding_(bound_rounding(axes_)),
        projected_(kQueriesPerBatch * axes_),
        projector_(bank_.projection),
        squared_(padded_clusters_),
        kept_(padded_clusters_ + kLanes),
        code_(axes_),
        best_rows_(kQueriesPerBatch * params.k),
        matches_(matches == nullptr ? nullptr : matches->new_list()),
        visit_starts_(bank_.clusters + 1) {}

  int64_t scanned() const { return scanned_; }
  // The queries that are still to be searched by brute force.
  const std::vector<int64_t>& left() const { return left_; }

  // Searches for queries [begin, end), at most kQueriesPerBatch of them.
  void search_batch(int64_t begin, int64_t end) {
    visits_.clear();
    queries_.clear();
    const int k = params_.k;
    std::fill(best_rows_.begin(), best_rows_.end(), -1);
    const int64_t* hints = nullptr;  // the rows found for the query before, often the next patch
    for (int64_t q = begin; q < end; ++q) {
      Query query{q,
                  params_.query_data + q * bank_.projection.dim,
                  projected_.data() + (q - begin) * axes_,
                  0,
                  {params_.squared + q, nullptr, nullptr, 1, matches_, q}};
      if (matches_ == nullptr) {
        query.best = {params_.squared + q * k, params_.indices + q * k,
                      best_rows_.data() + (q - begin) * k, k};
      }
      queries_.push_back(query);
      search_near(queries_.back(), hints);
      hints = query.best.rows;
    }
    search_visits();
  }

 private:
  // Searches the nearest clusters; others that may hold the answer are left as visits.
  void search_near(Query& query, const int64_t* hints) {
    float* projected = projected_.data() + (queries_.size() - 1) * axes_;
    query.error = projector_(query.vector, projected);
    if (!(query.error < kLargest * 0x1p-23)) {
      rescore_range(kernels_, searched_, query.vector, query.number, 0, bank_.rows, &query.best);
      return;
    }
    const int64_t own = kernels_.tile_distances(projected, bank_.centroid_tiles, axes_,
                                                padded_clusters_ / kLanes, squared_.data());
    take_limit(query);
    if (matches_ != nullptr) {  // the limit is fixed: whether it is hopeless shows at once
      const int64_t kept_rows = rows_in(keep_clusters(bounds_of(query, own)));
      if (static_cast<double>(kept_rows) > kMostKept * static_cast<double>(bank_.rows)) {
        left_.push_back(query.number);
        return;
      }
    }
    if (hints != nullptr) rescore_hints(query, hints);
    search_cluster(query, own, squared_[own], true);
    const ClusterBounds bounds = bounds_of(query, own);
    const int64_t kept = keep_clusters(bounds);
    const int64_t near = std::min(kNearFirst, kept);
    const size_t visits = visits_.size();
    if (passes_often(query, rows_in(kept), kMostAtFirst)) {
      left_.push_back(query.number);
      return;
    }
    int64_t rows = 0;  // of clusters that may hold the answer and have not been searched
    std::partial_sort(kept_.begin(), kept_.begin() + near, kept_.begin() + kept,
                      [this](int32_t a, int32_t b) { return squared_[a] < squared_[b]; });
    for (int64_t i = 0; i < kept; ++i) {
      const int32_t c = kept_[i];
      if (c == own) continue;
      const Visit visit = {c, static_cast<int32_t>(queries_.size() - 1), squared_[c],
                           half_plane_distance(c, bounds)};
      if (!may_win(query, visit)) continue;
      if (i < near) {
        search_cluster(query, c, visit.squared, false);
      } else {
        visits_.push_back(visit);
        rows += size_of(c);
      }
    }
    if (passes_often(query, rows, kMostRescored)) {
      visits_.resize(visits);
      left_.push_back(query.number);
    }
  }

  int64_t size_of(int64_t c) const { return bank_.starts[c + 1] - bank_.starts[c]; }

  // How many rows the first `kept` clusters in kept_ have.
  int64_t rows_in(int64_t kept) const {
    int64_t rows = 0;
    for (int64_t i = 0; i < kept; ++i) rows += size_of(kept_[i]);
    return rows;
  }

  ClusterBounds bounds_of(const Query& query, int64_t own) const {
    return {bank_.reach,   bank_.slack, bank_.gaps + own * padded_clusters_,
            squared_[own], query.limit, static_cast<float>(rounding_)};
  }

  // Puts the clusters that may hold an answer into kept_; returns how many.
  int64_t keep_clusters(const ClusterBounds& bounds) {
    return kernels_.keep_clusters(bounds, squared_.data(), bank_.clusters, kept_.data());
  }

  // Whether more than a share of the bank would be rescored if `rows` more pass as those so far
  // did.
  bool passes_often(const Query& query, int64_t rows, double share) const {
    if (matches_ != nullptr) return false;  // some rows have been taken; see kMostKept
    const double to_rescore = static_cast<double>(rows) * static_cast<double>(query.passed);
    return to_rescore >
           share * static_cast<double>(bank_.rows) * static_cast<double>(query.scanned);
  }

  // Makes the visits of all queries, cluster by cluster (a counting sort).
  void search_visits() {
    std::fill(visit_starts_.begin(), visit_starts_.end(), 0);
    for (const Visit& visit : visits_) ++visit_starts_[visit.cluster + 1];
    for (int64_t c = 0; c < bank_.clusters; ++c) visit_starts_[c + 1] += visit_starts_[c];
    sorted_visits_.resize(visits_.size());
    for (const Visit& visit : visits_) sorted_visits_[visit_starts_[visit.cluster]++] = visit;
    for (const Visit& visit : sorted_visits_) {
      Query& query = queries_[visit.query];
      if (may_win(query, visit)) search_cluster(query, visit.cluster, visit.squared, false);
    }
  }

  // The half-plane bound of `keep_clusters` as a distance, rounded down.
  float half_plane_distance(int64_t c, const ClusterBounds& bounds) const {
    const float low = 1.0f - bounds.rounding, high = 1.0f + bounds.rounding;
    const float reach = bounds.reach[c];
    const float at_most = bounds.own * high + 2 * bounds.rounding * reach * reach;
    const float at_least = squared_[c] * low;
    const float difference = at_least - at_most;
    if (!(difference > 0 && at_least > kLeastSquared)) return 0.0f;
    return difference / (2 * bounds.gaps[c] * high) * low;
  }

  // As `keep_clusters`, but under the query's current limit.
  bool may_win(const Query& query, const Visit& visit) const {
    const float radius = query.limit + bank_.reach[visit.cluster];
    const float at_least = visit.squared * (1.0f - static_cast<float>(rounding_));
    const bool beyond_radius = at_least > kLeastSquared && at_least > radius * radius;
    return !(beyond_radius || visit.half_plane > query.limit + bank_.slack[visit.cluster]);
  }

  // squared: squared distance from the query to the centroid. is_first: of all clusters.
  void search_cluster(Query& query, int64_t c, float squared, bool is_first) {
    const int64_t first_block = bank_.blocks[c];
    const BlockRange range =
        blocks_within(kernels_, bank_.block_radius + first_block, bank_.blocks[c + 1] - first_block,
                      squared, static_cast<double>(query.limit) + bank_.slack[c], rounding_);
    if (range.begin >= range.end) return;
    const float* centroid = bank_.centroids + c * axes_;
    const float scale = bank_.scales[c];
    const Encoding encoding =
        encode_query(kernels_, query.projected, centroid, axes_, scale, code_.data());
    const double error = residual_bound(encoding, axes_) + bank_.code_slack[c];
    if (is_first && matches_ == nullptr) rescore_closest(query, c);
    for (int64_t block = range.begin; block < range.end; block += kBlocksAtOnce) {
      const int64_t count = std::min(range.end - block, kBlocksAtOnce);
      const int64_t b = first_block + block;
      const int32_t threshold =
          screen_threshold(encoding.code_squares, query.limit, error, scale, kernels_.query_step);
      uint16_t masks[kBlocksAtOnce];
      scanned_ += count * kLanes;
      query.scanned += count * kLanes;
      if (kernels_.screen_blocks(code_.data(), threshold, bank_.codes + b * bank_.packs * 64,
                                 bank_.bias + b * kLanes, bank_.packs, count, masks)) {
        rescore_passed(query, bank_.starts[c] + block * kLanes, bank_.starts[c + 1], count, masks);
      }
    }
  }

  // Rescores rows that look closest by their codes, for a limit to start from: sixteen of each of
  // as many parts of the cluster as it takes for k rows, and half as many to spare.
  void rescore_closest(Query& query, int64_t c) {
    const int64_t blocks = bank_.blocks[c + 1] - bank_.blocks[c];
    const int64_t parts = std::min<int64_t>(blocks, (params_.k * 3 / 2 + kLanes - 1) / kLanes);
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t first = blocks * part / parts, end = blocks * (part + 1) / parts;
      const int64_t b = bank_.blocks[c] + first;
      int32_t block_of_lane[kLanes];
      kernels_.closest_codes(code_.data(), bank_.codes + b * bank_.packs * 64,
                             bank_.bias + b * kLanes, bank_.packs, end - first, block_of_lane);
      int64_t rows[kLanes];
      int count = 0;
      for (int r = 0; r < kLanes; ++r) {
        rows[count] = bank_.starts[c] + (first + block_of_lane[r]) * kLanes + r;
        count += rows[count] < bank_.starts[c + 1];
      }
      rescore_rows(query, rows, count);
    }
  }

  // Rescores rows from all blocks together, sixteen at a time.
  void rescore_passed(Query& query, int64_t first_row, int64_t end_row, int64_t blocks,
                      const uint16_t* masks) {
    int64_t rows[kLanes];
    int count = 0;
    for (int64_t b = 0; b < blocks; ++b) {
      for (unsigned mask = masks[b]; mask != 0; mask &= mask - 1) {
        rows[count] = first_row + b * kLanes + __builtin_ctz(mask);
        count += rows[count] < end_row;
        ++query.passed;
        if (count == kLanes) {
          rescore_rows(query, rows, count);
          count = 0;
        }
      }
    }
    rescore_rows(query, rows, count);
  }

  void rescore_rows(Query& query, const int64_t* rows, int count) {
    if (rescore(kernels_, searched_, query.vector, query.number, rows, count, &query.best)) {
      take_limit(query);
    }
  }

  // Rescores the rows that were found for another query.
  void rescore_hints(Query& query, const int64_t* hints) {
    int64_t rows[kLanes];
    int count = 0;
    for (int i = 0; i < std::min(params_.k, kLanes); ++i) {
      rows[count] = hints[i];
      count += hints[i] >= 0;
    }
    rescore_rows(query, rows, count);
  }

  // The limit that follows from the best rows so far.
  void take_limit(Query& query) const {
    const double distance = winning_distance(query.best.bound(), bank_.projection.dim);
    query.limit =
        static_cast<float>((distance * bank_.projection.stretch + query.error) * (1 + 1e-6));
  }

  const ClusteredNearestParams& params_;
  const ClusteredBank& bank_;
  const SearchKernels& kernels_;
  const Searched searched_;
  const int64_t axes_;
  const int64_t padded_clusters_;
  const double rounding_;
  std::vector<float> projected_;  // [kQueriesPerBatch, axes]
  RowProjector projector_;
  std::vector<float> squared_;  // from the query at hand to the centroids
  std::vector<int32_t> kept_;
  std::vector<uint8_t> code_;
  std::vector<int64_t> best_rows_;  // [kQueriesPerBatch, k]
  Matches::List* const matches_;    // null: the nearest are searched for
  std::vector<Query> queries_;
  std::vector<Visit> visits_, sorted_visits_;
  std::vector<int64_t> visit_starts_;
  std::vector<int64_t> left_;
  int64_t scanned_ = 0;
};

// Searches the whole bank for some of the queries, from what was found for them so far.
void search_by_brute_force(const ClusteredNearestParams& params,
                           const std::vector<int64_t>& numbers, int num_threads, Watch* watch,
                           Matches* matches) {
  const auto count = static_cast<int64_t>(numbers.size());
  const int64_t dim = params.bank.projection.dim, k = params.k;
  std::vector<float> vectors(count * dim), squared(count * k);
  std::vector<int64_t> indices(count * k), groups(count);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t q = numbers[i];
    std::copy_n(params.query_data + q * dim, dim, vectors.data() + i * dim);
    std::copy_n(params.squared + q * k, k, squared.data() + i * k);
    if (matches == nullptr) std::copy_n(params.indices + q * k, k, indices.data() + i * k);
    if (params.groups.query_groups != nullptr) groups[i] = params.groups.query_groups[q];
  }
  NearestParams rest{};
  rest.queries = count;
  rest.bank_rows = params.bank.rows;
  rest.dim = dim;
  rest.query_data = vectors.data();
  rest.bank_data = params.bank.data;
  rest.bank_is_half = params.bank.is_half;
  rest.ids = params.bank.ids;
  rest.groups = params.groups;
  if (params.groups.query_groups != nullptr) rest.groups.query_groups = groups.data();
  rest.k = params.k;
  rest.squared = squared.data();
  if (matches != nullptr) {
    matches->number_by(numbers.data());
    within(rest, matches, num_threads, watch);
    matches->number_by(nullptr);
    return;
  }
  rest.indices = indices.data();
  nearest(rest, num_threads, watch);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t q = numbers[i];
    std::copy_n(squared.data() + i * k, k, params.squared + q * k);
    std::copy_n(indices.data() + i * k, k, params.indices + q * k);
  }
}

}  // namespace

void nearest_in_clusters(const ClusteredNearestParams& params, int num_threads, Matches* matches) {
  const int64_t batches = (params.queries + kQueriesPerBatch - 1) / kQueriesPerBatch;
  const int64_t workers = std::min<int64_t>(batches, std::max(num_threads, 1));
  std::atomic<int64_t> next{0}, scanned{0};
  const auto rows = static_cast<double>(params.bank.rows);
  Watch watch(static_cast<double>(params.queries) * rows);
  std::mutex mutex;
  std::vector<int64_t> left;
  parallel_for(workers, static_cast<int>(workers), [&](int64_t) {
    Searcher searcher(params, matches);
    for (int64_t batch = next++; batch < batches; batch = next++) {
      const int64_t begin = batch * kQueriesPerBatch;
      const int64_t end = std::min(params.queries, begin + kQueriesPerBatch);
      const size_t left_before = searcher.left().size();
      searcher.search_batch(begin, end);
      const auto done = static_cast<double>(end - begin) -
                        static_cast<double>(searcher.left().size() - left_before);
      watch.advance(done * rows);
    }
    scanned += searcher.scanned();
    const std::lock_guard<std::mutex> lock(mutex);
    left.insert(left.end(), searcher.left().begin(), searcher.left().end());
  });
  *params.scanned += scanned;
  if (left.empty()) return;
  std::sort(left.begin(), left.end());
  search_by_brute_force(params, left, num_threads, &watch, matches);
  *params.scanned += static_cast<int64_t>(left.size()) * params.bank.rows;
}

}  // namespace psvdd::cpu
