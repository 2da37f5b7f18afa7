// Which instruction sets this processor has, and the one in use.

#include <algorithm>
#include <atomic>
#include <stdexcept>

#include "kernels.h"
#include "search_kernels.h"

namespace psvdd::cpu {
namespace {

// Best first. The compiler's checks cover the operating system's support for wide registers too.
const std::vector<const SearchKernels*>& supported() {
  static const std::vector<const SearchKernels*> sets = [] {
    std::vector<const SearchKernels*> found;
#if PSVDD_X86
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512vnni")) {
#if PSVDD_AMX
      if (may_use_tiles()) found.push_back(&amx_kernels());
#endif
      found.push_back(&avx512_kernels());
    }
    // F16C came before AVX2 in every line of processors.
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
      found.push_back(&avx2_kernels());
    }
#endif
    found.push_back(&portable_kernels());
    return found;
  }();
  return sets;
}

std::atomic<const SearchKernels*>& active() {
  static std::atomic<const SearchKernels*> set{supported().front()};
  return set;
}

}  // namespace

const SearchKernels& active_kernels() { return *active().load(); }

void set_active_kernels(const SearchKernels& kernels) { active() = &kernels; }

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const SearchKernels* set : supported()) names.emplace_back(set->name);
  return names;
}

std::string instruction_set() { return active_kernels().name; }

void set_instruction_set(const std::string& name) {
  for (const SearchKernels* set : supported()) {
    if (name == set->name) {
      set_active_kernels(*set);
      return;
    }
  }
  throw std::invalid_argument("this processor does not support the instruction set " + name);
}

}  // namespace psvdd::cpu
