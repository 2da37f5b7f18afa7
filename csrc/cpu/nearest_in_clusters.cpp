// Exact nearest neighbour in a clustered bank.
//
// For a query: project it; take the distances to all centroids; search the cluster of the nearest
// one, the query's own, which gives a good upper bound `limit`; rule out clusters by two lower
// bounds on the distance to their rows; search the nearest few of the others. What the limit then
// leaves is searched for 256 queries together, cluster by cluster, so that a cluster's codes stay
// in the caches. Within a cluster, rows too near to or too far from the centroid are skipped in
// blocks (the triangle inequality), the others are compared as 8-bit codes, and those that pass
// rescored canonically. docs/design/cpu-search.md has the proofs of the bounds; each is widened by
// what rounding may have changed.

#include <atomic>
#include <cmath>
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

// A query of the batch, and what is known of its answer.
struct Query {
  int64_t number;
  const float* vector;
  const float* projected;  // [axes]
  double error;            // of the projection
  Best best;
  // Distance between projections beyond which nothing can win, but for the bank's own rounding.
  float limit = INFINITY;
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
        sums_(axes_),
        squared_(padded_clusters_),
        kept_(padded_clusters_ + kLanes),
        code_(axes_),
        best_rows_(kQueriesPerBatch * params.k),
        matches_(matches == nullptr ? nullptr : matches->new_list()),
        visit_starts_(bank_.clusters + 1) {}

  int64_t scanned() const { return scanned_; }

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
    query.error = project_row(bank_.projection, query.vector, sums_.data(), projected);
    if (!(query.error < kLargest * 0x1p-23)) {
      rescore_range(kernels_, searched_, query.vector, query.number, 0, bank_.rows, &query.best);
      return;
    }
    const int64_t own = kernels_.tile_distances(projected, bank_.centroid_tiles, axes_,
                                                padded_clusters_ / kLanes, squared_.data());
    take_limit(query);
    if (hints != nullptr) rescore_hints(query, hints);
    search_cluster(query, own, squared_[own], true);
    const ClusterBounds bounds = {bank_.reach,   bank_.slack, bank_.gaps + own * padded_clusters_,
                                  squared_[own], query.limit, static_cast<float>(rounding_)};
    const int64_t kept =
        kernels_.keep_clusters(bounds, squared_.data(), bank_.clusters, kept_.data());
    const int64_t near = std::min(kNearFirst, kept);
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
      }
    }
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
  std::vector<double> sums_;
  std::vector<float> squared_;  // from the query at hand to the centroids
  std::vector<int32_t> kept_;
  std::vector<uint8_t> code_;
  std::vector<int64_t> best_rows_;  // [kQueriesPerBatch, k]
  Matches::List* const matches_;    // null: the nearest are searched for
  std::vector<Query> queries_;
  std::vector<Visit> visits_, sorted_visits_;
  std::vector<int64_t> visit_starts_;
  int64_t scanned_ = 0;
};

}  // namespace

void nearest_in_clusters(const ClusteredNearestParams& params, int num_threads, Matches* matches) {
  const int64_t batches = (params.queries + kQueriesPerBatch - 1) / kQueriesPerBatch;
  const int64_t workers = std::min<int64_t>(batches, std::max(num_threads, 1));
  std::atomic<int64_t> next{0}, scanned{0};
  Watch watch(static_cast<double>(params.queries));
  parallel_for(workers, static_cast<int>(workers), [&](int64_t) {
    Searcher searcher(params, matches);
    for (int64_t batch = next++; batch < batches; batch = next++) {
      const int64_t begin = batch * kQueriesPerBatch;
      const int64_t end = std::min(params.queries, begin + kQueriesPerBatch);
      searcher.search_batch(begin, end);
      watch.advance(static_cast<double>(end - begin));
    }
    scanned += searcher.scanned();
  });
  *params.scanned += scanned;
}

}  // namespace psvdd::cpu
