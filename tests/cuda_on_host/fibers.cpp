// The runtime behind cuda_on_host.h. Compiled without ThreadSanitizer's instrumentation, so that
// its own bookkeeping does not count as the kernel's; PSVDD_TSAN says that the rest has it.

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <deque>
#include <limits>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda_on_host.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(PSVDD_TSAN)
extern "C" {
void* __tsan_create_fiber(unsigned flags);
void* __tsan_get_current_fiber(void);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
}
#endif

namespace cuda_on_host {
namespace {

constexpr size_t kStackBytes = 256 * 1024;
constexpr size_t kExchangeBytes = 32;

void acquire([[maybe_unused]] void* object) {
#if defined(PSVDD_TSAN)
  __tsan_acquire(object);
#endif
}
void release([[maybe_unused]] void* object) {
#if defined(PSVDD_TSAN)
  __tsan_release(object);
#endif
}

// Where to go on. `swapcontext` asks the kernel for the signal mask each time; without sanitizers,
// which know it but not jumps between stacks, it only starts fibers and jumps do the rest.
struct Context {
  ucontext_t start;
  jmp_buf jump;
  bool jumps = false;
};

void switch_context(Context* from, Context* to) {
#if defined(__SANITIZE_ADDRESS__) || defined(PSVDD_TSAN)
  swapcontext(&from->start, &to->start);
#else
  from->jumps = true;
  if (_setjmp(from->jump) != 0) return;
  if (to->jumps) _longjmp(to->jump, 1);
  swapcontext(&from->start, &to->start);
#endif
}

// Threads that have to meet. A fiber waits until the generation it came in is over.
struct Meeting {
  int expected = 0;
  int arrived = 0;
  int64_t generation = 0;
};

// Two sets of values: nobody can come to the next but one before all have read the last.
struct Warp {
  Meeting meeting;
  alignas(8) unsigned char values[2][kWarp][kExchangeBytes];
};

struct Fiber {
  Context context;
  void* stack = nullptr;
  void* tsan = nullptr;
  void* asan_stack = nullptr;
  unsigned thread = 0;
  bool done = true;
  const Meeting* waits_for = nullptr;
  int64_t generation = 0;                // of what it waits for
  std::deque<std::vector<Copy>> groups;  // committed copies, oldest first
  std::vector<Copy> open;
};

struct Block {
  Meeting meeting;
  int counts[2] = {0, 0};  // of count_in_block, by generation
  std::vector<Warp> warps;
  unsigned char* shared = nullptr;
};

struct Scheduler {
  Context context;
  void* tsan = nullptr;
  void* asan_stack = nullptr;
  const void* stack_bottom = nullptr;
  size_t stack_size = 0;
  std::vector<std::unique_ptr<Fiber>> fibers;
  Fiber* running = nullptr;
  const std::function<void()>* work = nullptr;
  Block block;
  std::map<const void*, size_t> shared_asked_for;  // by kernel
  unsigned seed = 0;
  std::mt19937 random;
  int launches_to_refusal = -1;  // -1: none is refused
};

thread_local Scheduler scheduler;

// From the scheduler into a fiber, until it waits or is done.
void resume(Fiber* fiber) {
  scheduler.running = fiber;
  threadIdx.x = fiber->thread;
#if defined(PSVDD_TSAN)
  __tsan_switch_to_fiber(fiber->tsan, 1);  // 1: without making the one happen before the other
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&scheduler.asan_stack, fiber->stack, kStackBytes);
#endif
  switch_context(&scheduler.context, &fiber->context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(scheduler.asan_stack, nullptr, nullptr);
#endif
}

// From the running fiber back to the scheduler.
void pause() {
  Fiber* fiber = scheduler.running;
#if defined(PSVDD_TSAN)
  __tsan_switch_to_fiber(scheduler.tsan, 1);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&fiber->asan_stack, scheduler.stack_bottom, scheduler.stack_size);
#endif
  switch_context(&fiber->context, &scheduler.context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fiber->asan_stack, nullptr, nullptr);
#endif
}

// Fibers are kept: each runs one thread after another.
void run_threads() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &scheduler.stack_bottom, &scheduler.stack_size);
#endif
  while (true) {
    acquire(&scheduler);
    (*scheduler.work)();
    release(&scheduler.running);
    scheduler.running->done = true;
    pause();
  }
}

void create_fiber() {
  auto fiber = std::make_unique<Fiber>();
  fiber->thread = static_cast<unsigned>(scheduler.fibers.size());
  fiber->stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (fiber->stack == MAP_FAILED) throw std::runtime_error("no memory for the stack of a fiber");
  ucontext_t& start = fiber->context.start;
  getcontext(&start);
  start.uc_stack.ss_sp = fiber->stack;
  start.uc_stack.ss_size = kStackBytes;
  start.uc_link = nullptr;
  makecontext(&start, run_threads, 0);
#if defined(PSVDD_TSAN)
  fiber->tsan = __tsan_create_fiber(0);
#endif
  scheduler.fibers.push_back(std::move(fiber));
}

// Comes to a meeting and waits for the others. Returns the generation that came together.
int64_t meet(Meeting* meeting) {
  const int64_t generation = meeting->generation;
  if (++meeting->arrived == meeting->expected) {
    meeting->arrived = 0;
    ++meeting->generation;
    return generation;
  }
  Fiber* fiber = scheduler.running;
  fiber->waits_for = meeting;
  fiber->generation = generation;
  pause();
  return generation;
}

// Runs the threads of one block to their ends.
void run_block(unsigned threads) {
  std::vector<Fiber*> order;
  for (unsigned t = 0; t < threads; ++t) {
    Fiber* fiber = scheduler.fibers[t].get();
    fiber->done = false;
    fiber->waits_for = nullptr;
    fiber->groups.clear();
    fiber->open.clear();
    order.push_back(fiber);
  }
  if (scheduler.seed != 1) std::reverse(order.begin(), order.end());
  for (size_t left = threads; left > 0;) {
    if (scheduler.seed > 1) std::shuffle(order.begin(), order.end(), scheduler.random);
    bool any_ran = false;
    for (Fiber* fiber : order) {
      if (fiber->done) continue;
      if (fiber->waits_for != nullptr && fiber->waits_for->generation == fiber->generation) {
        continue;
      }
      fiber->waits_for = nullptr;
      resume(fiber);
      any_ran = true;
      left -= fiber->done ? 1 : 0;
    }
    if (!any_ran) {
      const size_t waiting = left;
      scheduler.fibers.clear();  // those that wait can never be used again; their stacks leak
      throw std::runtime_error("cuda_on_host: " + std::to_string(waiting) + " of " +
                               std::to_string(threads) +
                               " threads wait for others that never come");
    }
  }
}

// Word by word: sanitizers would see a memcpy. All sizes are multiples of four.
void copy_unseen(const void* from, void* to, size_t bytes) {
  for (size_t i = 0; i < bytes / 4; ++i) {
    static_cast<volatile uint32_t*>(to)[i] = static_cast<const volatile uint32_t*>(from)[i];
  }
}

Warp& warp_of_running() { return scheduler.block.warps[scheduler.running->thread / kWarp]; }

}  // namespace

void set_schedule(unsigned seed) {
  scheduler.seed = seed;
  scheduler.random.seed(seed);
}

cudaError_t allow_shared(const void* kernel, size_t bytes) {
  if (bytes > kMostShared) return cudaErrorInvalidValue;
  scheduler.shared_asked_for[kernel] = bytes;
  return cudaSuccess;
}

void refuse_launch(int launches) { scheduler.launches_to_refusal = launches; }

cudaError_t launch(const void* kernel, dim3 grid, dim3 block, size_t shared_bytes,
                   const std::function<void()>& thread) {
  if (scheduler.launches_to_refusal >= 0 && scheduler.launches_to_refusal-- == 0) {
    return cudaErrorInvalidValue;
  }
  if (block.y != 1 || block.z != 1) {
    throw std::runtime_error("cuda_on_host: only blocks of one dimension are supported");
  }
  if (block.x == 0 || block.x > 1024 || grid.x == 0 || grid.x > 0x7fffffff || grid.y == 0 ||
      grid.y > 65535 || grid.z == 0 || grid.z > 65535) {
    return cudaErrorInvalidConfiguration;
  }
  if (shared_bytes > std::max(kUnaskedShared, scheduler.shared_asked_for[kernel])) {
    throw std::runtime_error("cuda_on_host: " + std::to_string(shared_bytes) +
                             " bytes of shared memory that were not asked for");
  }
  while (scheduler.fibers.size() < block.x) create_fiber();
#if defined(PSVDD_TSAN)
  scheduler.tsan = __tsan_get_current_fiber();
#endif
  scheduler.work = &thread;
  gridDim = grid;
  blockDim = block;
  // Kept to the end of the launch: a buffer used again would make the blocks look ordered.
  std::vector<std::unique_ptr<unsigned char[]>> shared;
  release(&scheduler);
  for (unsigned index = grid.x * grid.y * grid.z; index-- > 0;) {
    const unsigned b = scheduler.seed == 1 ? grid.x * grid.y * grid.z - 1 - index : index;
    blockIdx = dim3(b % grid.x, b / grid.x % grid.y, b / (grid.x * grid.y));
    Block state;
    state.meeting.expected = static_cast<int>(block.x);
    state.warps.resize((block.x + kWarp - 1) / kWarp);
    for (size_t w = 0; w < state.warps.size(); ++w) {
      state.warps[w].meeting.expected =
          std::min<int>(kWarp, static_cast<int>(block.x) - static_cast<int>(w) * kWarp);
    }
    if (shared_bytes > 0) {
      shared.push_back(std::make_unique<unsigned char[]>(shared_bytes));
      state.shared = shared.back().get();
      std::fill(state.shared, state.shared + shared_bytes, static_cast<unsigned char>(0xff));
      release(&scheduler);
    }
    scheduler.block = std::move(state);
    run_block(block.x);
#if !defined(PSVDD_TSAN)
    shared.clear();
#endif
  }
  acquire(&scheduler.running);
  return cudaSuccess;
}

unsigned char* shared_memory() { return scheduler.block.shared; }

void sync_block() {
  Meeting* meeting = &scheduler.block.meeting;
  release(meeting);
  meet(meeting);
  acquire(meeting);
}

int count_in_block(bool value) {
  Block& block = scheduler.block;
  int& count = block.counts[block.meeting.generation % 2];
  if (block.meeting.arrived == 0) count = 0;
  count += value ? 1 : 0;
  sync_block();
  return count;
}

void sync_warp() {
  Meeting* meeting = &warp_of_running().meeting;
  release(meeting);
  meet(meeting);
  acquire(meeting);
}

void exchange(const void* mine, void* all, size_t bytes) {
  if (bytes > kExchangeBytes || bytes % 4 != 0) std::abort();
  Warp& warp = warp_of_running();
  const unsigned lane = scheduler.running->thread % kWarp;
  auto& values = warp.values[warp.meeting.generation % 2];
  copy_unseen(mine, values[lane], bytes);
  meet(&warp.meeting);
  for (int l = 0; l < kWarp; ++l) {
    copy_unseen(values[l], static_cast<unsigned char*>(all) + l * bytes, bytes);
  }
}

bool copies_are_late() { return scheduler.seed % 2 == 0; }
void defer_copy(Copy copy) { scheduler.running->open.push_back(copy); }
void commit_copies() {
  scheduler.running->groups.push_back(std::move(scheduler.running->open));
  scheduler.running->open.clear();
}

bool take_copy(int pending_groups, Copy* copy) {
  auto& groups = scheduler.running->groups;
  while (groups.size() > static_cast<size_t>(pending_groups)) {
    if (!groups.front().empty()) {
      *copy = groups.front().back();
      groups.front().pop_back();
      return true;
    }
    groups.pop_front();
  }
  return false;
}

}  // namespace cuda_on_host
