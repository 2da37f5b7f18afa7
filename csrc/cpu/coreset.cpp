// Greedy k-centre selection: the next row chosen is the one farthest from those chosen before, its
// nearest of them being meant, by the canonical squared distance (nearest.cpp); the lowest on ties.
//
// Distances to the chosen rows, the centres, only fall. So a row's distance to the centres that it
// has been compared with bounds what it is from above, and a heap of all rows by these bounds has
// the next choice on top as soon as the row there is up to date. Until then the row on top is
// compared with the centres it has not seen, and sinks. A row that never comes to the top again is
// never compared again.
//
// A row that has many centres to see is compared in 8-bit codes of its projection on few axes
// first, as a query is with a bank; only what these cannot rule out gets canonical distances. With
// it, the next rows in the heap are brought up to date, by all threads: early, and so in vain for
// some, but their turn is near. docs/design/coreset.md has the proofs. Traffic: a row once for each
// time it is compared, the centres' codes, which stay in a cache.

#include <algorithm>
#include <cmath>
#include <vector>

#include "clusters.h"
#include "kernels.h"
#include "parallel.h"
#include "rescore.h"
#include "watch.h"

namespace psvdd::cpu {
namespace {

constexpr int64_t kRowsPerItem = 1024;             // of a pass over all rows
constexpr int64_t kGroupBlocks = 16;               // blocks of codes screened under one limit
constexpr int64_t kGroup = kGroupBlocks * kLanes;  // the centres of a group share a slack
constexpr int64_t kChunk = 8 * kGroup;  // centres whose codes several rows are compared with
constexpr int64_t kFewCentres = 64;     // fewer are compared without the screen
constexpr int64_t kManyCentres = 512;   // a row with as many to see is worth a batch
constexpr int64_t kBatch = 256;         // rows
constexpr int64_t kRowsAtOnce = 16;     // rows of a batch that a thread takes

// A row and its squared distance: the larger key is the farther row, of equally far ones the lower.
using Key = uint64_t;

Key key_of(float squared, int64_t row) {
  uint32_t bits;  // of a float that is not negative, in the order of the floats
  std::memcpy(&bits, &squared, sizeof bits);
  return Key{bits} << 32 | (0xffffffffu - static_cast<uint32_t>(row));
}
int64_t row_of(Key key) { return 0xffffffffu - static_cast<uint32_t>(key); }
float squared_of(Key key) {
  const auto bits = static_cast<uint32_t>(key >> 32);
  float squared;
  std::memcpy(&squared, &bits, sizeof squared);
  return squared;
}

class Selection {
 public:
  Selection(const CoresetParams& params, int num_threads)
      : params_(params),
        kernels_(active_kernels()),
        num_threads_(num_threads),
        row_bytes_(params.dim * (params.is_half ? 2 : 4)),
        centres_(params.count * row_bytes_),
        squared_(params.rows, INFINITY),
        watch_(static_cast<double>(params.count)) {
    if (!screened()) return;
    zeros_.assign(params.axes, 0.0f);
    codes_.assign(round_up(params.count, kLanes) * params.axes, 0);
    bias_.assign(round_up(params.count, kLanes), kNothing);
    slack_.assign(params.count / kGroup + 1, 0.0);
  }

  // Compares all rows with each choice.
  void run_plain() {
    const int64_t items = (params_.rows + kRowsPerItem - 1) / kRowsPerItem;
    std::vector<Key> farthest(items);
    Key next = key_of(INFINITY, params_.first);
    while (chosen_ < params_.count) {
      choose(next);
      compare_all(farthest.data());
      next = *std::max_element(farthest.begin(), farthest.end());
    }
    *params_.radius = std::sqrt(squared_of(next));
  }

  void run() {
    choose(key_of(INFINITY, params_.first));
    compare_all(nullptr);
    seen_.assign(params_.rows, 1);
    for (int64_t r = 0; r < params_.rows; ++r) {
      if (r != params_.first) heap_.push_back(key_of(squared_[r], r));
    }
    std::make_heap(heap_.begin(), heap_.end());
    while (chosen_ < params_.count) choose(take_farthest());
    *params_.radius = heap_.empty() ? 0.0f : std::sqrt(squared_of(take_farthest()));
  }

 private:
  bool screened() const { return params_.projected != nullptr; }

  // The row as float32; scratch: [dim], used where it is stored otherwise.
  const float* vector(int64_t row, std::vector<float>* scratch) const {
    if (!params_.is_half) return static_cast<const float*>(params_.data) + row * params_.dim;
    scratch->resize(params_.dim);
    read_row({params_.data, params_.dim, true}, row, scratch->data());
    return scratch->data();
  }

  Rows centres() const { return {centres_.data(), params_.dim, params_.is_half}; }

  // Makes a row the next centre.
  void choose(Key key) {
    const int64_t row = row_of(key), c = chosen_++;
    params_.chosen[c] = row;
    params_.distances[c] = std::sqrt(squared_of(key));
    std::memcpy(centres_.data() + c * row_bytes_,
                static_cast<const unsigned char*>(params_.data) + row * row_bytes_, row_bytes_);
    if (screened()) {
      std::vector<uint8_t> code(params_.axes);
      const Encoding encoding = encode_row(kernels_, params_.projected + row * params_.axes,
                                           zeros_.data(), params_.axes, params_.scale, code.data());
      write_code(code.data(), encoding, params_.axes / 4, c, codes_.data(), bias_.data());
      double& slack = slack_[c / kGroup];
      slack = std::max(slack, residual_bound(encoding, params_.axes) + params_.errors[row]);
    }
    watch_.advance(1);
  }

  // Compares all rows with the latest choice. farthest: the farthest row of each item that has not
  // been chosen; null: not wanted.
  void compare_all(Key* farthest) {
    const int64_t items = (params_.rows + kRowsPerItem - 1) / kRowsPerItem;
    const int64_t centre = params_.chosen[chosen_ - 1];
    std::vector<float> scratch;
    const float* query = vector(centre, &scratch);
    if (farthest != nullptr) squared_[centre] = -1.0f;
    const Rows all = {params_.data, params_.dim, params_.is_half};
    parallel_for(items, num_threads_, [&](int64_t item) {
      const int64_t end = std::min(params_.rows, (item + 1) * kRowsPerItem);
      Key best = 0;
      for (int64_t first = item * kRowsPerItem; first < end; first += kLanes) {
        const int count = static_cast<int>(std::min<int64_t>(kLanes, end - first));
        int64_t rows[kLanes];
        float found[kLanes];
        for (int i = 0; i < count; ++i) rows[i] = first + i;
        kernels_.squared_distances(all, query, rows, count, found);
        for (int i = 0; i < count; ++i) {
          float& squared = squared_[first + i];
          squared = std::min(squared, found[i]);
          if (farthest != nullptr && squared >= 0)
            best = std::max(best, key_of(squared, first + i));
        }
      }
      if (farthest != nullptr) farthest[item] = best;
    });
  }

  // Takes the row that is truly farthest off the heap.
  Key take_farthest() {
    for (;;) {
      const Key top = heap_.front();
      const int64_t row = row_of(top);
      // Nothing is nearer than 0.
      if (seen_[row] == chosen_ || squared_of(top) == 0) {
        std::pop_heap(heap_.begin(), heap_.end());
        heap_.pop_back();
        return top;
      }
      const bool many = chosen_ - seen_[row] >= kManyCentres;
      const int64_t count = many ? std::min<int64_t>(kBatch, heap_.size()) : 1;
      const auto end = heap_.end();
      for (int64_t i = 0; i < count; ++i) std::pop_heap(heap_.begin(), end - i);
      update(&*(end - count), count);
      for (int64_t i = count; i > 0; --i) std::push_heap(heap_.begin(), end - i + 1);
    }
  }

  // Brings rows up to date, and their keys.
  void update(Key* keys, int64_t count) {
    const int64_t items = (count + kRowsAtOnce - 1) / kRowsAtOnce;
    parallel_for(items, num_threads_, [&](int64_t item) {
      const int64_t first = item * kRowsAtOnce;
      update_some(keys + first, static_cast<int>(std::min(kRowsAtOnce, count - first)));
    });
  }

  // A row that is being compared, as a query.
  struct Compared {
    std::vector<float> scratch;
    const float* vector;
    std::vector<uint8_t> code;
    int32_t code_squares;
    double error;
    float squared;
  };

  void update_some(Key* keys, int count) {
    std::vector<Compared> rows(count);
    int64_t first = chosen_;
    for (int i = 0; i < count; ++i) {
      const int64_t row = row_of(keys[i]);
      Compared& compared = rows[i];
      compared.vector = vector(row, &compared.scratch);
      compared.squared = squared_of(keys[i]);
      first = std::min(first, seen_[row]);
      if (!screened() || chosen_ - seen_[row] < kFewCentres) continue;
      compared.code.resize(params_.axes);
      const Encoding encoding =
          encode_query(kernels_, params_.projected + row * params_.axes, zeros_.data(),
                       params_.axes, params_.scale, compared.code.data());
      compared.code_squares = encoding.code_squares;
      compared.error = residual_bound(encoding, params_.axes) + params_.errors[row];
    }
    for (int64_t begin = first / kChunk * kChunk; begin < chosen_; begin += kChunk) {
      const int64_t end = std::min(chosen_, begin + kChunk);
      for (int i = 0; i < count; ++i) {
        const int64_t seen = seen_[row_of(keys[i])];
        if (seen < end) compare(&rows[i], std::max(seen, begin), end);
      }
      watch_.advance(0);
    }
    for (int i = 0; i < count; ++i) {
      const int64_t row = row_of(keys[i]);
      seen_[row] = chosen_;
      keys[i] = key_of(rows[i].squared, row);
    }
  }

  // Compares a row with centres [begin, end).
  void compare(Compared* row, int64_t begin, int64_t end) const {
    if (row->code.empty()) {
      int64_t numbers[kLanes];
      for (int64_t c = begin; c < end; c += kLanes) {
        const int count = static_cast<int>(std::min<int64_t>(kLanes, end - c));
        for (int i = 0; i < count; ++i) numbers[i] = c + i;
        rescore(numbers, count, row);
      }
      return;
    }
    const int64_t packs = params_.axes / 4;
    while (begin < end) {
      // From the block that holds the first centre to the end of its group: it does no harm to
      // compare with some centres again.
      const int64_t group = begin / kGroup;
      const int64_t block = begin / kLanes;
      const int64_t last = std::min(end, (group + 1) * kGroup);
      const int64_t blocks = (last + kLanes - 1) / kLanes - block;
      const double limit = winning_distance(row->squared, params_.dim) * params_.stretch;
      const int32_t threshold = screen_threshold(
          row->code_squares, limit, row->error + slack_[group], params_.scale, kernels_.query_step);
      uint16_t masks[kGroupBlocks];
      if (kernels_.screen_blocks(row->code.data(), threshold, codes_.data() + block * packs * 64,
                                 bias_.data() + block * kLanes, packs, blocks, masks)) {
        int64_t numbers[kLanes];
        int count = 0;
        for (int64_t b = 0; b < blocks; ++b) {
          for (unsigned mask = masks[b]; mask != 0; mask &= mask - 1) {
            numbers[count++] = (block + b) * kLanes + __builtin_ctz(mask);
            if (count == kLanes) {
              rescore(numbers, count, row);
              count = 0;
            }
          }
        }
        rescore(numbers, count, row);
      }
      begin = last;
    }
  }

  void rescore(const int64_t* numbers, int count, Compared* row) const {
    float found[kLanes];
    kernels_.squared_distances(centres(), row->vector, numbers, count, found);
    for (int i = 0; i < count; ++i) row->squared = std::min(row->squared, found[i]);
  }

  const CoresetParams& params_;
  const SearchKernels& kernels_;
  const int num_threads_;
  const int64_t row_bytes_;
  int64_t chosen_ = 0;
  std::vector<unsigned char> centres_;  // [count, dim], as stored
  std::vector<float> zeros_;
  std::vector<int8_t> codes_;   // of the centres, [count / 16, packs, 16, 4]
  std::vector<int32_t> bias_;   // [count]
  std::vector<double> slack_;   // [count / kGroup], bounds on how far a code is off
  std::vector<float> squared_;  // [M], only of a pass over all rows
  std::vector<int64_t> seen_;   // [M], how many centres a row has been compared with
  std::vector<Key> heap_;       // of the rows that have not been chosen
  Watch watch_;
};

}  // namespace

void coreset(const CoresetParams& params, int num_threads) {
  const IeeeArithmetic ieee;
  Selection selection(params, num_threads);
  if (params.method == SearchMethod::kPlain) {
    selection.run_plain();
  } else {
    selection.run();
  }
}

}  // namespace psvdd::cpu
