// Exact nearest neighbour by the canonical squared distance, against every row of a bank.
//
// Canonical squared distance of q and b: sixteen partial sums; for each j the difference
// t = q[j] - b[j], rounded to float32, enters acc[j % 16] = fma(t, t, acc[j % 16]); then
// acc[i] += acc[i + 8], + 4, + 2, + 1.
//
// The bank is taken block by block. A block's rows have 8-bit codes about its centre, kept or made
// on the way; every query is compared with them in integers, 64 rows by 6 queries in registers at a
// time (or 32 by 32, with tiles); only rows that the codes cannot rule out are rescored canonically
// (rescore.h has the proof). Kept codes may have shorter ones beside, along a bank's leading axes:
// then these are compared first, and the others only for the blocks of 16 rows that pass. Where the
// codes rule out nothing, rescoring all rows is the plain search: the screen costs a fraction of
// it. Few queries do not repay encoding the bank and are searched plainly, as very short vectors
// are. Traffic: the bank once, or its codes, the queries once per block; codes stay in the
// second-level cache.

#include <atomic>
#include <vector>

#include "codes.h"
#include "kernels.h"
#include "parallel.h"
#include "watch.h"

namespace psvdd::cpu {
namespace {

constexpr int64_t kBatchBytes = 64 * 1024;  // of the queries' codes
constexpr int64_t kMostBatchSteps = 12;
constexpr int64_t kQueriesAtOnce = int64_t{1} << 17;
constexpr int64_t kImagesAtOnce = int64_t{1} << 13;  // less, as nobody is told while they are made
// A batch of queries of which more than this share of the blocks pass by their leading codes, in
// the second half of a block of rows, is compared by whole codes in the next one; if that happens
// again, in the next two, four and so on.
constexpr double kMostPassed = 0.15;
constexpr int kPlainQueries = 32;                // that share what is made of a tile of rows
constexpr double kStretch = 1 + kLeadingExcess;  // how much farther apart images may be
constexpr int64_t kSeedBlocks = 128;    // of rows, in which a search looks for its first bounds
constexpr int64_t kItemsPerWorker = 4;  // so that no thread waits long for the last
// So many queries of one worker repay that it reads all of the bank's codes.
constexpr int64_t kQueriesOfRange = 128;

// Whether to look at codes first, by the times of AVX2 on 20,000 and 200,000 rows. Up to 16
// dimensions the plain search keeps all lanes busy, and encoding pays later.
bool screen_pays(const NearestParams& params, bool has_codes) {
  if (params.method != SearchMethod::kAuto) return params.method == SearchMethod::kScreened;
  if (has_codes) return params.dim >= 4;
  if (params.dim <= kLanes) return params.dim > 4 && params.queries * params.dim >= 1024;
  return params.queries >= 16;
}

// The queries' images along a bank's leading axes.
struct LeadingImages {
  const float* images;  // [Q, axes]
  const float* errors;  // [Q], with those of the rows
};

class Search {
 public:
  // kept: the bank's codes, or null; leading: the queries' images, if there are leading axes.
  // matches: null, or takes all rows within the limits that `squared` holds, under the numbers of
  // the queries from first_query on.
  Search(const NearestParams& params, const CodedRows* kept, const LeadingImages& leading,
         int num_threads, Watch* watch, Matches* matches, int64_t first_query)
      : params_(params),
        matches_(matches),
        first_query_(first_query),
        kept_(kept),
        leading_(leading),
        kernels_(active_kernels()),
        bank_{{params.bank_data, params.dim, params.bank_is_half},
              params.ids,
              params.first_row,
              params.groups},
        padded_dim_(round_up(params.dim, kLanes)),
        packs_((params.dim + 3) / 4),
        leads_(kept != nullptr && kept->leading_axes.projection.axes > 0),
        screened_(screen_pays(params, kept != nullptr)),
        watch_(watch) {
    const int64_t threads = std::max(num_threads, 1);
    block_rows_ = kept_ == nullptr ? most_block_rows(params.dim) : kept_->codes.block_rows;
    const int64_t wanted = kItemsPerWorker * threads;
    if (!screened_ || kept_ == nullptr) {  // blocks may be smaller
      const int64_t fair = round_up((params.bank_rows + wanted - 1) / wanted, kTileRows);
      block_rows_ = std::min(block_rows_, fair);
    }
    blocks_ = (params.bank_rows + block_rows_ - 1) / block_rows_;
    const int64_t steps = (params.queries + kBatchStep - 1) / kBatchStep;
    ranges_ = 1;
    apart_ = false;
    if (screened_ && kept_ != nullptr && threads > 1) {
      apart_ = params.queries >= kQueriesOfRange * threads;
      if (apart_) {
        ranges_ = std::min(wanted, params.queries / kQueriesOfRange);
      } else if (blocks_ < wanted) {
        ranges_ = std::min((wanted + blocks_ - 1) / blocks_, steps);
      }
    }
    range_queries_ = round_up((params.queries + ranges_ - 1) / ranges_, kBatchStep);
    workers_ = std::min<int64_t>(apart_ ? ranges_ : blocks_ * ranges_, threads);
  }

  // Each worker takes parts of the queries and compares them with all blocks. Or, where the queries
  // are few or codes of a block are made on the way, it takes blocks, or parts of the queries for a
  // block, and keeps its own best rows, which start from those given; the least over the workers
  // are the answer. The first worker's lie where the answer is to be. Whether the bank is certainly
  // finite, as far as was seen.
  bool run() {
    if (matches_ != nullptr) {
      std::vector<Best> lists;
      for (int64_t worker = 0; worker < workers_; ++worker) {
        lists.push_back({params_.squared, nullptr, nullptr, 1, matches_->new_list(), first_query_});
      }
      search_blocks(lists);
      return finite_;
    }
    if (apart_) {
      search_blocks(
          std::vector<Best>(workers_, Best{params_.squared, params_.indices, nullptr, params_.k}));
      return finite_;
    }
    const int64_t entries = params_.queries * params_.k;
    std::vector<float> squared((workers_ - 1) * entries);
    std::vector<int64_t> ids((workers_ - 1) * entries);
    std::vector<Best> best{{params_.squared, params_.indices, nullptr, params_.k}};
    for (int64_t worker = 1; worker < workers_; ++worker) {
      best.push_back({squared.data() + (worker - 1) * entries, ids.data() + (worker - 1) * entries,
                      nullptr, params_.k});
      std::copy_n(params_.squared, entries, best[worker].squared);
      std::copy_n(params_.indices, entries, best[worker].ids);
    }
    search_blocks(best);
    for (int64_t worker = 1; worker < workers_; ++worker) {
      for (int64_t q = 0; q < params_.queries; ++q) {
        Best result = best[0].of_query(q);
        const Best other = best[worker].of_query(q);
        for (int i = 0; i < params_.k && other.squared[i] <= result.bound(); ++i) {
          result.offer(other.squared[i], other.ids[i], -1);
        }
      }
    }
    return finite_;
  }

 private:
  // The codes of a batch of queries about one block of rows, and what thresholds follow from.
  struct QueryCodes {
    BlockCodes block;
    int64_t dim;
    int64_t stride;
    std::vector<uint8_t> codes;
    std::vector<int32_t> thresholds, squares;
    std::vector<double> errors;
    std::vector<float> padded;

    const uint8_t* code(int64_t i) const { return codes.data() + i * stride; }

    // Makes the codes of vectors [count, dim]; `vector_errors` [count] or null: their own errors.
    void encode(const SearchKernels& kernels, const BlockCodes& about, const float* vectors,
                const float* vector_errors, int64_t dims, int64_t count) {
      const int64_t padded_dim = round_up(dims, kLanes), padded_count = round_up(count, kBatchStep);
      block = about;
      dim = dims;
      stride = round_up(dims, kCodeStride);
      codes.assign(padded_count * stride, 0);
      thresholds.assign(padded_count, kNothing);
      squares.resize(count);
      errors.resize(count);
      padded.resize(padded_dim, 0.0f);
      for (int64_t i = 0; i < count; ++i) {
        const float* vector = vectors + i * dims;
        if (padded_dim != dims) {
          std::copy(vector, vector + dims, padded.begin());
          vector = padded.data();
        }
        uint8_t* code = codes.data() + i * stride;
        const Encoding encoding =
            encode_query(kernels, vector, about.centre, padded_dim, about.scale, code);
        std::fill(code + (dims + 3) / 4 * 4, code + padded_dim, uint8_t{0});
        squares[i] = encoding.code_squares;
        errors[i] = residual_bound(encoding, padded_dim) + static_cast<double>(about.slack) +
                    (vector_errors == nullptr ? 0.0 : vector_errors[i]);
      }
    }

    // Nothing farther than `limit` can win any more.
    void take_limit(int64_t i, double limit, int query_step) {
      thresholds[i] = screen_threshold(squares[i], limit, errors[i], block.scale, query_step);
    }

    ScreenBatch batch(int64_t count, int64_t rows, decltype(ScreenBatch::passed) passed,
                      void* search) const {
      return {codes.data(), stride,     count,         thresholds.data(),
              block.codes,  block.bias, (dim + 3) / 4, rows,
              passed,       search};
    }
  };

  // For how many blocks of rows a batch of queries is not compared by leading codes.
  struct Pause {
    int left = 0, last = 0;

    bool over() {
      if (left == 0) return true;
      --left;
      return false;
    }
    void judge(bool passed_often) {
      last = passed_often ? std::max(1, 2 * last) : 0;
      left = last;
    }
  };

  // What a worker needs to encode a block and a batch of queries.
  struct Scratch {
    std::vector<float> centre;
    std::vector<int8_t> codes;
    std::vector<int32_t> bias;
    QueryCodes whole, leading;
    std::vector<Pause> pauses;  // [Q], of the batch that begins with a query
  };

  // A batch of queries that is being screened, for `passed`.
  struct Screening {
    const Search* search;
    Scratch* scratch;
    bool leads;      // by leading codes first
    int64_t half;    // of the rows, after which is counted
    int64_t passed;  // blocks of 16 rows, over all queries, that passed by them
    int64_t first_query, first_row;
    const Best* best;

    void take_limit(int64_t i) const {
      const double limit =
          winning_distance(best->of_query(first_query + i).bound(), search->params_.dim);
      const int step = search->kernels_.query_step;
      scratch->whole.take_limit(i, limit, step);
      if (leads) scratch->leading.take_limit(i, limit * kStretch, step);
    }
  };

  // All of the search, each worker with its own list of best rows.
  void search_blocks(const std::vector<Best>& best) {
    parallel_for(workers_, static_cast<int>(workers_), [&](int64_t worker) {
      Scratch scratch;
      const int64_t at_once = apart_ ? blocks_ : 1;  // blocks that a worker takes
      for (int64_t item = next_item_++; item < blocks_ / at_once * ranges_; item = next_item_++) {
        const int64_t first = item % ranges_ * range_queries_;
        const int64_t end = std::min(params_.queries, first + range_queries_);
        for (int64_t block = 0; block < at_once; ++block) {
          search_block(item / ranges_ + block, first, end, &scratch, best[worker]);
        }
      }
    });
  }

  const float* query(int64_t q) const { return params_.query_data + q * params_.dim; }

  void search_block(int64_t block, int64_t first_query, int64_t end_query, Scratch* scratch,
                    const Best& best) {
    const int64_t begin = block * block_rows_;
    const int64_t end = std::min(params_.bank_rows, begin + block_rows_);
    BlockCodes codes{};
    if (screened_) codes = codes_of(block, begin, end, scratch);
    const int64_t stride =
        round_up(leads_ ? kept_->leading_axes.projection.axes : params_.dim, kCodeStride);
    const int64_t batch =
        std::clamp<int64_t>(kBatchBytes / stride / kBatchStep, 1, kMostBatchSteps) * kBatchStep;
    for (int64_t first = first_query; first < end_query; first += batch) {
      const int64_t last = std::min(end_query, first + batch);
      if (codes.scale > 0) {
        screen_batch(codes, block, begin, end, first, last, scratch, best);
      } else {
        compare_all(begin, end, first, last, best);
      }
      watch_->advance(static_cast<double>(last - first) * static_cast<double>(end - begin));
    }
  }

  BlockCodes codes_of(int64_t block, int64_t begin, int64_t end, Scratch* scratch) {
    if (kept_ != nullptr) return block_of(kept_->codes, params_.dim, block);
    const int64_t padded_rows = round_up(end - begin, kTileRows);
    scratch->centre.resize(padded_dim_);
    scratch->codes.resize(padded_rows * packs_ * 4);
    scratch->bias.resize(padded_rows);
    BlockCodes codes = {scratch->centre.data(), scratch->codes.data(), scratch->bias.data(), 0, 0};
    if (!encode_block(kernels_, bank_.rows, begin, end, &codes)) finite_ = false;
    return codes;
  }

  // The plain search: the canonical distances of all pairs.
  void compare_all(int64_t begin, int64_t end, int64_t first, int64_t last, const Best& best) {
    float squared[kPlainQueries * kTileRows], limits[kPlainQueries];
    uint64_t masks[kPlainQueries];
    bool finite = true;
    for (int64_t row = begin; row < end; row += kTileRows) {
      const int rows = static_cast<int>(std::min<int64_t>(kTileRows, end - row));
      for (int64_t start = first; start < last; start += kPlainQueries) {
        const int queries = static_cast<int>(std::min<int64_t>(kPlainQueries, last - start));
        for (int q = 0; q < queries; ++q) limits[q] = best.of_query(start + q).bound();
        finite &= kernels_.distance_tile(bank_.rows, row, rows, query(start), queries, limits,
                                         squared, masks);
        for (int q = 0; q < queries; ++q) {
          Best own = best.of_query(start + q);
          for (uint64_t mask = masks[q]; mask != 0; mask &= mask - 1) {
            const int r = __builtin_ctzll(mask);
            if (bank_.excluded(start + q, row + r)) continue;
            own.offer(squared[q * kTileRows + r], bank_.id(row + r), row + r);
          }
        }
      }
    }
    if (!finite) finite_ = false;
  }

  void screen_batch(const BlockCodes& codes, int64_t block, int64_t begin, int64_t end,
                    int64_t first, int64_t last, Scratch* scratch, const Best& best) {
    const int64_t count = last - first, rows = round_up(end - begin, kTileRows);
    BlockCodes leading{};
    if (leads_) leading = block_of(kept_->leading, kept_->leading_axes.projection.axes, block);
    scratch->pauses.resize(params_.queries);
    const bool leads = leading.scale > 0 && scratch->pauses[first].over();
    Screening screening = {this, scratch, leads, rows / 2, 0, first, begin, &best};
    scratch->whole.encode(kernels_, codes, query(first), nullptr, params_.dim, count);
    if (screening.leads) {
      const int64_t axes = kept_->leading_axes.projection.axes;
      scratch->leading.encode(kernels_, leading, leading_.images + first * axes,
                              leading_.errors + first, axes, count);
    }
    for (int64_t i = 0; i < count; ++i) {
      const Best own = best.of_query(first + i);
      if (matches_ == nullptr && own.bound() == INFINITY) {
        rescore_closest(screening.leads ? scratch->leading : scratch->whole, i, first + i, begin,
                        end, own);
      }
      screening.take_limit(i);
    }
    kernels_.screen_batch(screening.leads
                              ? scratch->leading.batch(count, rows, screen_passed, &screening)
                              : scratch->whole.batch(count, rows, rescore_passed, &screening));
    if (screening.leads) {
      const double compared = static_cast<double>(count) * static_cast<double>(rows / 2 / kLanes);
      scratch->pauses[first].judge(static_cast<double>(screening.passed) > kMostPassed * compared);
    }
  }

  // Rescores sixteen rows that look closest by their codes among the first of a block [begin, end),
  // for a bound to start from.
  void rescore_closest(const QueryCodes& codes, int64_t i, int64_t number, int64_t begin,
                       int64_t end, Best best) const {
    const int64_t blocks = std::min<int64_t>((end - begin + kLanes - 1) / kLanes, kSeedBlocks);
    int32_t block_of_lane[kLanes];
    kernels_.closest_codes(codes.code(i), codes.block.codes, codes.block.bias, (codes.dim + 3) / 4,
                           blocks, block_of_lane);
    int64_t rows[kLanes];
    int count = 0;
    for (int r = 0; r < kLanes; ++r) {
      rows[count] = begin + block_of_lane[r] * kLanes + r;
      count += rows[count] < end;
    }
    rescore(kernels_, bank_, query(number), number, rows, count, &best);
  }

  // Compares the whole codes of the rows that passed by their leading ones, for one query.
  static void screen_passed(void* context, int64_t i, int64_t row, uint64_t mask) {
    auto& screening = *static_cast<Screening*>(context);
    if (row >= screening.half) {
      for (int b = 0; b < kTileBlocks; ++b) {
        screening.passed += (mask >> (b * kLanes) & 0xffff) != 0;
      }
    }
    const QueryCodes& whole = screening.scratch->whole;
    const int64_t packs = screening.search->packs_;
    mask = screening.search->kernels_.screen_masked(whole.code(i), whole.thresholds[i],
                                                    whole.block.codes + row * packs * 4,
                                                    whole.block.bias + row, packs, mask);
    if (mask != 0) rescore_passed(context, i, row, mask);
  }

  // Rescores the rows of a block that passed for one query.
  static void rescore_passed(void* context, int64_t i, int64_t row, uint64_t mask) {
    const auto& screening = *static_cast<Screening*>(context);
    const Search& search = *screening.search;
    const int64_t number = screening.first_query + i;
    Best own = screening.best->of_query(number);
    if (rescore_mask(search.kernels_, search.bank_, search.query(number), number,
                     screening.first_row + row, mask, &own)) {
      screening.take_limit(i);
    }
  }

  const NearestParams& params_;
  Matches* const matches_;
  const int64_t first_query_;
  const CodedRows* const kept_;
  const LeadingImages leading_;
  const SearchKernels& kernels_;
  const Searched bank_;
  const int64_t padded_dim_;
  const int64_t packs_;  // per row, of four codes each
  const bool leads_;     // whether there are leading axes
  const bool screened_;
  int64_t block_rows_;
  int64_t blocks_;
  int64_t ranges_;  // parts of the queries that are searched apart
  bool apart_;      // each by one worker
  int64_t range_queries_;
  int64_t workers_;
  std::atomic<int64_t> next_item_{0};
  std::atomic<bool> finite_{true};
  Watch* const watch_;
};

bool search_all(const NearestParams& params, const CodedRows* kept, int num_threads, Watch* watch,
                Matches* matches = nullptr) {
  bool finite = true;
  std::vector<float> images, errors;
  // A part of the queries at a time, so that a thread's last block does not take long after the
  // others have finished.
  const bool leads = kept != nullptr && kept->leading_axes.projection.axes > 0;
  const int64_t at_once = leads ? kImagesAtOnce : kQueriesAtOnce;
  for (int64_t first = 0; first < params.queries; first += at_once) {
    NearestParams part = params;
    part.queries = std::min(at_once, params.queries - first);
    part.query_data += first * params.dim;
    part.squared += first * params.k;
    if (part.indices != nullptr) part.indices += first * params.k;
    if (part.groups.query_groups != nullptr) part.groups.query_groups += first;
    if (leads) {
      images.resize(part.queries * kept->leading_axes.projection.axes);
      errors.resize(part.queries);
      leading_images(
          {kept->leading_axes, part.queries, part.query_data, false, images.data(), errors.data()},
          num_threads);
      for (float& error : errors) error = (error + kept->leading_axes.error) * (1 + 0x1p-20f);
    }
    finite &= Search(part, kept, {images.data(), errors.data()}, num_threads, watch, matches, first)
                  .run();
  }
  return finite;
}

}  // namespace

void nearest(const NearestParams& params, int num_threads, Watch* watch) {
  const bool finite = search_all(params, nullptr, num_threads, watch);
  if (params.seems_finite != nullptr) *params.seems_finite = finite;
}

void nearest(const NearestParams& params, int num_threads) {
  Watch watch(static_cast<double>(params.queries) * static_cast<double>(params.bank_rows));
  nearest(params, num_threads, &watch);
}

bool within(const NearestParams& params, Matches* matches, int num_threads, Watch* watch) {
  return search_all(params, nullptr, num_threads, watch, matches);
}

bool within(const NearestParams& params, Matches* matches, int num_threads) {
  Watch watch(static_cast<double>(params.queries) * static_cast<double>(params.bank_rows));
  return within(params, matches, num_threads, &watch);
}

void nearest_in_codes(const CodedNearestParams& params, int num_threads, Matches* matches) {
  const CodedRows& bank = params.bank;
  NearestParams plain{};
  plain.queries = params.queries;
  plain.bank_rows = bank.rows;
  plain.dim = bank.dim;
  plain.query_data = params.query_data;
  plain.bank_data = bank.data;
  plain.bank_is_half = bank.is_half;
  plain.method = params.method;
  plain.groups = params.groups;
  plain.k = params.k;
  plain.squared = params.squared;
  plain.indices = params.indices;
  Watch watch(static_cast<double>(params.queries) * static_cast<double>(bank.rows));
  search_all(plain, &bank, num_threads, &watch, matches);
}

void finish_search(const FinishSearchParams& params, int) {
  const IeeeArithmetic ieee;
  for (int64_t i = 0; i < params.count; ++i) {
    params.distances[i] = std::sqrt(params.distances[i]);
    if (params.indices[i] == kNoRow) params.indices[i] = -1;
  }
}

}  // namespace psvdd::cpu
