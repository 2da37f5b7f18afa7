// The search kernels for AVX-512 with AMX (AMX-TILE, AMX-INT8): those of AVX-512, but for the
// screen of a batch, which runs on tiles.

#include "search_kernels.h"

#if PSVDD_AMX
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "screen_batch.h"

// After the includes, so that nothing of the standard library is compiled for this target.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,amx-tile,amx-int8"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,amx-tile,amx-int8")
#endif

#include "amx_tiles.h"

namespace psvdd::cpu {
namespace {

// In assembly, since GCC's intrinsics take the number of a tile as text, which a template has not.
class AmxTiles {
 public:
  AmxTiles() {
    struct alignas(64) Configuration {
      uint8_t palette = 1;
      uint8_t start_row = 0;
      uint8_t reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    };
    static_assert(sizeof(Configuration) == 64, "the processor reads 64 bytes");
    const Configuration configuration;
    __asm__ volatile("ldtilecfg %0" : : "m"(configuration));
  }
  ~AmxTiles() { __asm__ volatile("tilerelease"); }
  AmxTiles(const AmxTiles&) = delete;
  AmxTiles& operator=(const AmxTiles&) = delete;

  template <int kTile>
  void load(const void* memory, int64_t stride) {
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2"
                     :
                     : "r"(memory), "r"(stride), "i"(kTile)
                     : "memory");
  }
  template <int kTile>
  void store(void* memory, int64_t stride) {
    __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)"
                     :
                     : "r"(memory), "r"(stride), "i"(kTile)
                     : "memory");
  }
  template <int kSums, int kUnsigned, int kSigned>
  void add_products() {
    __asm__ volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0"
                     :
                     : "i"(kSums), "i"(kUnsigned), "i"(kSigned));
  }
  static uint32_t at_least(const int32_t* sums, int32_t threshold) {
    const __m512i least = _mm512_set1_epi32(threshold);
    const uint32_t low = _mm512_cmpge_epi32_mask(_mm512_load_si512(sums), least);
    const uint32_t high = _mm512_cmpge_epi32_mask(_mm512_load_si512(sums + kLanes), least);
    return low | high << kLanes;
  }
};

// Below, registers are likely to be as fast. Estimated, not measured.
constexpr int64_t kFewPacks = 8;
constexpr int64_t kFewQueries = 16;

void amx_screen_batch(const ScreenBatch& batch) {
  if (batch.packs <= kFewPacks || batch.count <= kFewQueries) {
    avx512_kernels().screen_batch(batch);
  } else {
    screen_batch_on_tiles<AmxTiles>(batch);
  }
}

}  // namespace

const SearchKernels& amx_kernels() {
  static const SearchKernels kernels = [] {
    SearchKernels set = avx512_kernels();
    set.name = "amx";
    set.screen_batch = amx_screen_batch;
    return set;
  }();
  return kernels;
}

}  // namespace psvdd::cpu

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace psvdd::cpu {

bool may_use_tiles() {
  unsigned a, b, c, d;
  constexpr unsigned kOsSavesState = 1u << 27, kTile = 1u << 24, kInt8 = 1u << 25;
  if (__get_cpuid(1, &a, &b, &c, &d) == 0 || (c & kOsSavesState) == 0) return false;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0) return false;
  if ((d & kTile) == 0 || (d & kInt8) == 0) return false;
  unsigned low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  constexpr unsigned kTileState = 3u << 17;  // configuration and data
  if ((low & kTileState) != kTileState) return false;
  // Linux saves the tiles' 8 KiB for a process only if it has asked.
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

}  // namespace psvdd::cpu
#endif  // PSVDD_AMX
