// A parallel loop over independent pieces of work, and the floating-point state that they need.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <functional>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#include "watch.h"

#if defined(__x86_64__) || defined(_M_X64)
#include <xmmintrin.h>
#endif

namespace psvdd::cpu {

// While it lives, the thread rounds to nearest and keeps subnormals: torch may have been told to
// flush them to zero, which would change the last bits of a distance.
class IeeeArithmetic {
 public:
#if defined(__x86_64__) || defined(_M_X64)
  IeeeArithmetic() : saved_(_mm_getcsr()) { _mm_setcsr(0x1f80); }
  ~IeeeArithmetic() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#else
  IeeeArithmetic() {}
#endif
 public:
  IeeeArithmetic(const IeeeArithmetic&) = delete;
  IeeeArithmetic& operator=(const IeeeArithmetic&) = delete;
};

// Calls work(item) for every item in [0, items), on up to `num_threads` threads. Threads are
// started per call: a pool would not survive a fork. The first exception of a piece of work is
// rethrown once all threads have stopped.
inline void parallel_for(int64_t items, int num_threads, const std::function<void(int64_t)>& work) {
  const int64_t threads = std::max<int64_t>(1, std::min<int64_t>(num_threads, items));
  std::atomic<int64_t> next{0};
  std::exception_ptr failure;
  std::mutex failure_lock;
  const auto run = [&] {
    const IeeeArithmetic ieee;
    try {
      for (int64_t item = next++; item < items; item = next++) work(item);
    } catch (const Stopped&) {  // another thread has failed and says why
    } catch (...) {
      const std::lock_guard<std::mutex> guard(failure_lock);
      if (!failure) failure = std::current_exception();
      next = items;
    }
  };
  std::vector<std::thread> helpers;
  helpers.reserve(threads);
  try {
    for (int64_t i = 1; i < threads; ++i) helpers.emplace_back(run);
  } catch (const std::system_error&) {  // no more threads: those that have started do the work
  }
  run();
  for (std::thread& helper : helpers) helper.join();
  if (failure) std::rethrow_exception(failure);
}

}  // namespace psvdd::cpu
