// Watching a long search: reporting how far it is, and stopping it.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <exception>
#include <thread>

namespace psvdd::cpu {

// Called every so often on the thread that started a search, with the share done in [0, 1]; ends
// the search by throwing. Null: not called. The Python bindings set it to look for Ctrl-C.
using WatchHook = void (*)(double share_done);
inline std::atomic<WatchHook> watch_hook{nullptr};

// Thrown in the other threads of a search that has been stopped; never leaves `parallel_for`.
struct Stopped : std::exception {};

// Shared by the threads of one search. Owned by the thread that starts it.
class Watch {
 public:
  explicit Watch(double total_work) : total_(total_work) {}

  // Adds work done, on any thread; called every few milliseconds.
  void advance(double work) {
    if (stopped_.load(std::memory_order_relaxed)) throw Stopped();
    double done = done_.load(std::memory_order_relaxed);
    while (!done_.compare_exchange_weak(done, done + work, std::memory_order_relaxed)) {
    }
    if (std::this_thread::get_id() != owner_) return;
    const WatchHook hook = watch_hook.load();
    const auto now = std::chrono::steady_clock::now();
    if (hook == nullptr || now - last_ < std::chrono::milliseconds(100)) return;
    last_ = now;
    try {
      hook(total_ > 0 ? (done + work) / total_ : 1.0);
    } catch (...) {
      stopped_ = true;
      throw;
    }
  }

 private:
  const double total_;
  const std::thread::id owner_ = std::this_thread::get_id();
  std::chrono::steady_clock::time_point last_ = std::chrono::steady_clock::now();
  std::atomic<double> done_{0.0};
  std::atomic<bool> stopped_{false};
};

}  // namespace psvdd::cpu
