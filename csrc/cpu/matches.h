// What a search for all rows within a radius finds: unlike the nearest rows, nobody knows before
// how many there are.
#pragma once

#include <atomic>
#include <cstdint>
#include <deque>
#include <mutex>
#include <stdexcept>
#include <string>

namespace psvdd::cpu {

// A row that is within the limit of a query.
struct Match {
  int64_t id;      // the row's number
  uint32_t query;  // the query's
  float squared;   // canonical squared distance
};

// The matches of one search, or of several in parts of a bank. Each thread fills a list of its own.
// Traffic: 16 bytes a match, and twice as many again when they are put in order.
class Matches {
 public:
  // most: how many there may be. More are std::length_error, thrown soon after they are found, or
  // in the end.
  explicit Matches(int64_t most) : most_(most) {}
  Matches(const Matches&) = delete;
  Matches& operator=(const Matches&) = delete;

  // What one thread finds.
  class List {
   public:
    explicit List(Matches* all) : all_(all) {}

    void add(int64_t query, int64_t id, float squared) {
      if (all_->numbers_ != nullptr) query = all_->numbers_[query];
      found_.push_back({id, static_cast<uint32_t>(query), squared});
      if (found_.size() % kCountedAtOnce == 0) all_->check(all_->counted_ += kCountedAtOnce);
    }

   private:
    friend class Matches;
    static constexpr int64_t kCountedAtOnce = 4096;

    Matches* all_;
    std::deque<Match> found_;
  };

  // What the queries of the searches to come are numbered by, until this is called again; null: as
  // they are.
  void number_by(const int64_t* numbers) { numbers_ = numbers; }

  // An empty list, for one thread; valid as long as this object. May be called on any thread.
  List* new_list() {
    const std::lock_guard<std::mutex> guard(lock_);
    return &lists_.emplace_back(this);
  }

  // How many there are, after the searches.
  int64_t total() const {
    int64_t count = 0;
    for (const List& list : lists_) count += static_cast<int64_t>(list.found_.size());
    check(count);
    return count;
  }

  // Moves the matches into arrays, query by query: those of query q are [starts[q], starts[q + 1]),
  // ascending by squared distance, then by id. starts: [queries + 1]; the others: [total].
  void take(int64_t queries, int64_t* starts, float* squared, int64_t* ids, int num_threads);

 private:
  void check(int64_t count) const {
    if (count <= most_) return;
    throw std::length_error("more rows are within the radius than most = " + std::to_string(most_) +
                            ": narrow it, search for fewer queries at a time, or allow more");
  }

  const int64_t most_;
  const int64_t* numbers_ = nullptr;
  std::atomic<int64_t> counted_{0};  // in whole steps of a list
  std::mutex lock_;
  std::deque<List> lists_;
};

}  // namespace psvdd::cpu
