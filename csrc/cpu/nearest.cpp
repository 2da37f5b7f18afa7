// Exact nearest neighbour by the canonical squared distance, against every row of a bank.
//
// Canonical squared distance of q and b: sixteen partial sums; for each j the difference
// t = q[j] - b[j], rounded to float32, enters acc[j % 16] = fma(t, t, acc[j % 16]); then
// acc[i] += acc[i + 8], + 4, + 2, + 1.
//
// The bank is taken block by block. A block's rows are rounded to 8-bit codes about its centre and
// every query is compared with them in integers, 64 rows by 6 queries in registers at a time; only
// rows that the codes cannot rule out are rescored canonically (rescore.h has the proof). Where the
// codes rule out nothing, rescoring all rows is the plain search: the screen costs a fraction of
// it. Traffic: the bank once, the queries once per block; codes stay in the second-level cache.

#include "rescore.h"

#include <atomic>
#include <vector>

#include "kernels.h"
#include "parallel.h"
#include "watch.h"

namespace psvdd::cpu {
namespace {

constexpr int64_t kCodeBytes = 512 * 1024;  // of a block: half of a second-level cache
constexpr int64_t kMostBlockRows = 4096;
constexpr int64_t kBatchBytes = 64 * 1024;  // of the queries' codes
constexpr int64_t kRowsForCentre = 64;
constexpr int64_t kQueriesAtOnce = int64_t{1} << 17;
constexpr int64_t kFewQueries = 8;  // fewer do not repay encoding the bank
constexpr float kLargest = 1e15f;   // squares of larger differences might overflow

// The codes of one block of the bank.
struct BlockCodes {
  std::vector<float> centre;  // [padded dim]
  std::vector<int8_t> codes;  // [rows / 16, packs, 16, 4]
  std::vector<int32_t> bias;  // [rows], see SearchKernels::screen_tile
  float scale = 0;
  double slack = 0;  // bound on the distance of a row to what its code stands for
  bool usable = false;
};

// Encodes rows [begin, end) about their centre.
void encode_block(const SearchKernels& kernels, const Rows& bank, int64_t begin, int64_t end,
                  BlockCodes* block) {
  const int64_t dims = round_up(bank.dim, kLanes);
  const int64_t packs = (bank.dim + 3) / 4;
  const int64_t padded_rows = round_up(end - begin, kTileRows);
  std::vector<float> row(dims, 0.0f);
  // Any centre will do; the mean of some rows is close to that of all.
  const int64_t step = std::max<int64_t>(1, (end - begin) / kRowsForCentre);
  block->centre.assign(dims, 0.0f);
  for (int64_t r = begin; r < end; r += step) {
    read_row(bank, r, row.data());
    const auto weight = static_cast<float>(step) / static_cast<float>(end - begin);
    for (int64_t j = 0; j < bank.dim; ++j) block->centre[j] += weight * row[j];
  }
  float largest = 0;
  for (int64_t r = begin; r < end; ++r) {
    read_row(bank, r, row.data());
    largest = std::max(largest, kernels.largest_difference(row.data(), block->centre.data(), dims));
  }
  block->usable = largest < kLargest &&  // false for NaN, from centres that overflow
                  bank.dim <= kMostDims;
  if (!block->usable) return;
  block->scale = std::max(largest / kCodeLimit, 1e-30f);
  block->codes.assign(padded_rows * packs * 4, 0);
  block->bias.assign(padded_rows, kNothing);
  block->slack = 0;
  std::vector<uint8_t> code(dims);
  for (int64_t r = begin; r < end; ++r) {
    read_row(bank, r, row.data());
    const Encoding encoding =
        encode_row(kernels, row.data(), block->centre.data(), dims, block->scale, code.data());
    block->slack = std::max(block->slack, residual_bound(encoding, dims));
    write_code(code.data(), encoding, packs, r - begin, block->codes.data(), block->bias.data());
  }
}

class Search {
 public:
  Search(const NearestParams& params, int num_threads, Watch* watch)
      : params_(params),
        kernels_(active_kernels()),
        bank_{{params.bank_data, params.dim, params.bank_is_half},
              params.ids,
              params.first_row,
              params.groups},
        padded_dim_(round_up(params.dim, kLanes)),
        packs_((params.dim + 3) / 4),
        screened_(params.method == SearchMethod::kScreened ||
                  (params.method == SearchMethod::kAuto && params.queries >= kFewQueries)),
        watch_(watch) {
    const int64_t fitting = kCodeBytes / (packs_ * 4) / kTileRows * kTileRows;
    const int64_t fair = round_up(params.bank_rows / (4 * std::max(num_threads, 1)), kTileRows);
    block_rows_ = std::max<int64_t>(kTileRows, std::min({fitting, fair, int64_t{kMostBlockRows}}));
    blocks_ = (params.bank_rows + block_rows_ - 1) / block_rows_;
    workers_ = std::min<int64_t>(blocks_, std::max(num_threads, 1));
  }

  // Each worker takes blocks and keeps its own best rows, which start from those given; the least
  // over the workers are the answer. The first worker's lie where the answer is to be.
  void run() {
    const int64_t k = params_.k, entries = params_.queries * k;
    std::vector<float> squared((workers_ - 1) * entries);
    std::vector<int64_t> ids((workers_ - 1) * entries);
    std::vector<Best> best{{params_.squared, params_.indices, nullptr, params_.k}};
    for (int64_t worker = 1; worker < workers_; ++worker) {
      best.push_back({squared.data() + (worker - 1) * entries, ids.data() + (worker - 1) * entries,
                      nullptr, params_.k});
      std::copy_n(params_.squared, entries, best[worker].squared);
      std::copy_n(params_.indices, entries, best[worker].ids);
    }
    parallel_for(workers_, static_cast<int>(workers_), [&](int64_t worker) {
      BlockCodes codes;
      for (int64_t block = next_block_++; block < blocks_; block = next_block_++) {
        search_block(block, &codes, best[worker]);
      }
    });
    for (int64_t worker = 1; worker < workers_; ++worker) {
      for (int64_t q = 0; q < params_.queries; ++q) {
        Best result = of_query(best[0], q);
        const Best other = of_query(best[worker], q);
        for (int i = 0; i < params_.k && other.squared[i] <= result.bound(); ++i) {
          result.offer(other.squared[i], other.ids[i], -1);
        }
      }
    }
  }

 private:
  const float* query(int64_t q) const { return params_.query_data + q * params_.dim; }

  // The best rows of one query, of those of all.
  Best of_query(const Best& best, int64_t q) const {
    return {best.squared + q * best.k, best.ids + q * best.k, nullptr, best.k};
  }

  void search_block(int64_t block, BlockCodes* codes, const Best& best) {
    const int64_t begin = block * block_rows_;
    const int64_t end = std::min(params_.bank_rows, begin + block_rows_);
    if (screened_) encode_block(kernels_, bank_.rows, begin, end, codes);
    const int64_t batch =
        std::clamp<int64_t>(kBatchBytes / padded_dim_ / kTileQueries, 1, 64) * kTileQueries;
    for (int64_t first = 0; first < params_.queries; first += batch) {
      const int64_t last = std::min(params_.queries, first + batch);
      if (screened_ && codes->usable) {
        screen_batch(*codes, begin, end, first, last, best);
      } else {
        for (int64_t tile = begin; tile < end; tile += kTileRows) {
          const int64_t tile_end = std::min(end, tile + kTileRows);
          for (int64_t q = first; q < last; ++q) {
            Best own = of_query(best, q);
            rescore_range(kernels_, bank_, query(q), q, tile, tile_end, &own);
          }
        }
      }
      watch_->advance(static_cast<double>(last - first) * static_cast<double>(end - begin));
    }
  }

  void screen_batch(const BlockCodes& block, int64_t begin, int64_t end, int64_t first,
                    int64_t last, const Best& best) {
    const int64_t count = last - first;
    std::vector<uint8_t> codes(count * padded_dim_);
    std::vector<int32_t> squares(count);
    std::vector<double> errors(count);
    std::vector<int32_t> thresholds(count);
    std::vector<const uint8_t*> pointers(count);
    std::vector<float> padded(padded_dim_, 0.0f);
    const auto threshold = [&](int64_t i) {
      return screen_threshold(squares[i],
                              winning_distance(of_query(best, first + i).bound(), params_.dim),
                              errors[i], block.scale, kernels_.query_step);
    };
    for (int64_t i = 0; i < count; ++i) {
      const float* vector = query(first + i);
      if (padded_dim_ != params_.dim) {
        std::copy(vector, vector + params_.dim, padded.begin());
        vector = padded.data();
      }
      uint8_t* code = codes.data() + i * padded_dim_;
      const Encoding encoding =
          encode_query(kernels_, vector, block.centre.data(), padded_dim_, block.scale, code);
      pointers[i] = code;
      squares[i] = encoding.code_squares;
      errors[i] = residual_bound(encoding, padded_dim_) + block.slack;
      thresholds[i] = threshold(i);
    }
    for (int64_t tile = begin; tile < end; tile += kTileRows) {
      const int8_t* tile_codes = block.codes.data() + (tile - begin) * packs_ * 4;
      const int32_t* bias = block.bias.data() + (tile - begin);
      for (int64_t i = 0; i < count; i += kTileQueries) {
        const int queries = static_cast<int>(std::min<int64_t>(kTileQueries, count - i));
        uint64_t masks[kTileQueries];
        kernels_.screen_tile(&pointers[i], &thresholds[i], queries, tile_codes, bias, packs_,
                             masks);
        uint64_t any = 0;
        for (int q = 0; q < queries; ++q) any |= masks[q];
        if (any == 0) continue;
        for (int q = 0; q < queries; ++q) {
          if (masks[q] == 0) continue;
          const int64_t number = first + i + q;
          Best own = of_query(best, number);
          if (rescore_mask(kernels_, bank_, query(number), number, tile, masks[q], &own)) {
            thresholds[i + q] = threshold(i + q);
          }
        }
      }
    }
  }

  const NearestParams& params_;
  const SearchKernels& kernels_;
  const Searched bank_;
  const int64_t padded_dim_;
  const int64_t packs_;  // per row, of four codes each
  const bool screened_;
  int64_t block_rows_;
  int64_t blocks_;
  int64_t workers_;
  std::atomic<int64_t> next_block_{0};
  Watch* const watch_;
};

}  // namespace

void nearest(const NearestParams& params, int num_threads) {
  if (params.queries == 0) return;
  Watch watch(static_cast<double>(params.queries) * static_cast<double>(params.bank_rows));
  // A part of the queries at a time, so that a thread's last block does not take long after the
  // others have finished.
  for (int64_t first = 0; first < params.queries; first += kQueriesAtOnce) {
    NearestParams part = params;
    part.queries = std::min(kQueriesAtOnce, params.queries - first);
    part.query_data += first * params.dim;
    part.squared += first * params.k;
    part.indices += first * params.k;
    if (part.groups.query_groups != nullptr) part.groups.query_groups += first;
    Search(part, num_threads, &watch).run();
  }
}

void finish_search(const FinishSearchParams& params, int) {
  const IeeeArithmetic ieee;
  for (int64_t i = 0; i < params.count; ++i) {
    params.distances[i] = std::sqrt(params.distances[i]);
    if (params.indices[i] == kNoRow) params.indices[i] = -1;
  }
}

}  // namespace psvdd::cpu
