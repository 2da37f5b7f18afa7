// Exact nearest neighbour in a clustered bank.
//
// For a query: project it; take the distances to all centroids; search the cluster of the nearest
// one, which gives a good upper bound `limit`; rule out clusters by two lower bounds on the
// distance to their rows; search the remaining ones, nearest centroids first, with a limit that
// shrinks on the way. Within a cluster, rows too near to or too far from the centroid are skipped
// in blocks (the triangle inequality), the others are compared as 8-bit codes, and those that pass
// rescored canonically. ARCHITECTURE.md has the proofs of the bounds; each is widened by what
// rounding may have changed.

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

constexpr int64_t kQueriesPerItem = 64;
constexpr int64_t kBlocksAtOnce = 64;  // blocks screened before the limit is taken anew
constexpr int64_t kNearFirst = 8;      // clusters searched in the order of their distance
constexpr double kLargest = 1e15;      // squares of larger coordinates might overflow

class Searcher {
 public:
  explicit Searcher(const ClusteredNearestParams& params)
      : params_(params),
        bank_(params.bank),
        kernels_(active_kernels()),
        searched_{{bank_.data, bank_.projection.dim, bank_.is_half}, bank_.ids, params.groups},
        axes_(bank_.projection.axes),
        padded_clusters_(round_up(bank_.clusters, kLanes)),
        rounding_(bound_rounding(axes_)),
        projected_(axes_),
        sums_(axes_),
        squared_(padded_clusters_),
        kept_(padded_clusters_ + kLanes),
        code_(axes_) {}

  int64_t scanned() const { return scanned_; }

  // Searches for query number `q`; `hint` is a row that may be close, or -1. Returns the row found.
  int64_t search(int64_t q, int64_t hint) {
    query_ = q;
    vector_ = params_.query_data + q * bank_.projection.dim;
    best_ = Best();
    best_row_ = -1;
    limit_ = INFINITY;
    error_ = project_row(bank_.projection, vector_, sums_.data(), projected_.data());
    if (!(error_ < kLargest * 0x1p-23)) {
      rescore_range(kernels_, searched_, vector_, q, 0, bank_.rows, &best_);
      best_.write(q, params_.distances, params_.indices);
      return -1;
    }
    const int64_t own = kernels_.tile_distances(projected_.data(), bank_.centroid_tiles, axes_,
                                                padded_clusters_ / kLanes, squared_.data());
    if (hint >= 0) rescore_rows(&hint, 1);
    search_cluster(own, true);
    const float* gaps = bank_.gaps + own * padded_clusters_;
    const ClusterBounds bounds = {bank_.reach,   bank_.slack, gaps,
                                  squared_[own], limit_,      static_cast<float>(rounding_)};
    const int64_t kept =
        kernels_.keep_clusters(bounds, squared_.data(), bank_.clusters, kept_.data());
    const int64_t near = std::min(kNearFirst, kept);
    std::partial_sort(kept_.begin(), kept_.begin() + near, kept_.begin() + kept,
                      [this](int32_t a, int32_t b) { return squared_[a] < squared_[b]; });
    for (int64_t i = 0; i < kept; ++i) {
      const int64_t c = kept_[i];
      if (c != own && may_win(c, bounds)) search_cluster(c, false);
    }
    best_.write(q, params_.distances, params_.indices);
    return best_row_;
  }

 private:
  // Distance between projections beyond which nothing can win, but for the bank's own rounding.
  void update_limit() {
    limit_ = static_cast<float>(
        (winning_distance(best_.squared, bank_.projection.dim) * bank_.projection.stretch +
         error_) *
        (1 + 1e-6));
  }

  // As `keep_clusters`, under the limit of now.
  bool may_win(int64_t c, ClusterBounds bounds) const {
    bounds.limit = limit_;
    bounds.reach += c;
    bounds.slack += c;
    bounds.gaps += c;
    const float low = 1.0f - bounds.rounding, high = 1.0f + bounds.rounding;
    const float reach = *bounds.reach, radius = bounds.limit + reach;
    const float at_least = squared_[c] * low;
    const float at_most = bounds.own * high + 2 * bounds.rounding * reach * reach;
    return !(at_least > radius * radius ||
             at_least - at_most > 2 * (bounds.limit + *bounds.slack) * *bounds.gaps * high);
  }

  void search_cluster(int64_t c, bool is_first) {
    const int64_t first_block = bank_.blocks[c];
    const BlockRange range =
        blocks_within(kernels_, bank_.block_radius + first_block, bank_.blocks[c + 1] - first_block,
                      squared_[c], static_cast<double>(limit_) + bank_.slack[c], rounding_);
    if (range.begin >= range.end) return;
    const float* centroid = bank_.centroids + c * axes_;
    const float scale = bank_.scales[c];
    const Encoding encoding =
        encode_query(kernels_, projected_.data(), centroid, axes_, scale, code_.data());
    const double error = residual_bound(encoding, axes_) + bank_.code_slack[c];
    if (is_first) rescore_closest(c);
    for (int64_t block = range.begin; block < range.end; block += kBlocksAtOnce) {
      const int64_t count = std::min(range.end - block, kBlocksAtOnce);
      const int64_t b = first_block + block;
      const int32_t threshold =
          screen_threshold(encoding.code_squares, limit_, error, scale, kernels_.query_step);
      uint16_t masks[kBlocksAtOnce];
      scanned_ += count * kLanes;
      if (!kernels_.screen_blocks(code_.data(), threshold, bank_.codes + b * bank_.groups * 64,
                                  bank_.bias + b * kLanes, bank_.groups, count, masks)) {
        continue;
      }
      rescore_passed(bank_.starts[c] + block * kLanes, count, masks);
    }
  }

  // Rescores the sixteen rows that look closest by their codes, for a limit to start from.
  void rescore_closest(int64_t c) {
    int32_t block_of_lane[kLanes];
    const int64_t b = bank_.blocks[c];
    kernels_.closest_codes(code_.data(), bank_.codes + b * bank_.groups * 64,
                           bank_.bias + b * kLanes, bank_.groups, bank_.blocks[c + 1] - b,
                           block_of_lane);
    int64_t rows[kLanes];
    int count = 0;
    for (int r = 0; r < kLanes; ++r) {
      rows[count] = bank_.starts[c] + block_of_lane[r] * kLanes + r;
      count += rows[count] < bank_.starts[c + 1];
    }
    rescore_rows(rows, count);
  }

  // Rescores rows from all blocks together, sixteen at a time.
  void rescore_passed(int64_t first_row, int64_t blocks, const uint16_t* masks) {
    int64_t rows[kLanes];
    int count = 0;
    for (int64_t b = 0; b < blocks; ++b) {
      for (unsigned mask = masks[b]; mask != 0; mask &= mask - 1) {
        rows[count++] = first_row + b * kLanes + __builtin_ctz(mask);
        if (count == kLanes) {
          rescore_rows(rows, count);
          count = 0;
        }
      }
    }
    rescore_rows(rows, count);
  }

  void rescore_rows(const int64_t* rows, int count) {
    if (!rescore(kernels_, searched_, vector_, query_, rows, count, &best_)) return;
    update_limit();
    for (int r = 0; r < count; ++r) {
      if (bank_.ids[rows[r]] == best_.id) best_row_ = rows[r];
    }
  }

  const ClusteredNearestParams& params_;
  const ClusteredBank& bank_;
  const SearchKernels& kernels_;
  const Searched searched_;
  const int64_t axes_;
  const int64_t padded_clusters_;
  const double rounding_;
  std::vector<float> projected_;
  std::vector<double> sums_;
  std::vector<float> squared_;  // distances to the centroids
  std::vector<int32_t> kept_;
  std::vector<uint8_t> code_;
  int64_t scanned_ = 0;

  // Of the query being searched for.
  int64_t query_ = 0;
  const float* vector_ = nullptr;
  double error_ = 0;  // of its projection
  float limit_ = 0;
  Best best_;
  int64_t best_row_ = -1;
};

}  // namespace

void nearest_in_clusters(const ClusteredNearestParams& params, int num_threads) {
  const int64_t items = (params.queries + kQueriesPerItem - 1) / kQueriesPerItem;
  const int64_t workers = std::min<int64_t>(items, std::max(num_threads, 1));
  std::atomic<int64_t> next{0}, scanned{0};
  Watch watch(static_cast<double>(params.queries));
  parallel_for(workers, static_cast<int>(workers), [&](int64_t) {
    Searcher searcher(params);
    for (int64_t item = next++; item < items; item = next++) {
      const int64_t end = std::min(params.queries, (item + 1) * kQueriesPerItem);
      int64_t hint = -1;
      for (int64_t q = item * kQueriesPerItem; q < end; ++q) {
        hint = searcher.search(q, hint);
        watch.advance(1);
      }
    }
    scanned += searcher.scanned();
  });
  *params.scanned += scanned;
}

}  // namespace psvdd::cpu
