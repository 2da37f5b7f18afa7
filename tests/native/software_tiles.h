// The tile operations of csrc/cpu/amx_tiles.h in plain C++, so that the screen on tiles runs on any
// machine and under sanitizers.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstring>

#include "../../csrc/cpu/amx_tiles.h"

namespace psvdd::cpu {

class SoftwareTiles {
 public:
  SoftwareTiles() {
    if (configured_) misused_ = true;
    configured_ = true;
  }
  ~SoftwareTiles() { configured_ = false; }
  SoftwareTiles(const SoftwareTiles&) = delete;
  SoftwareTiles& operator=(const SoftwareTiles&) = delete;

  // Whether a thread configured the tiles again, or this one has not released them.
  static bool misused() { return misused_ || configured_; }

  template <int kTile>
  void load(const void* memory, int64_t stride) {
    for (int r = 0; r < 16; ++r) {
      std::memcpy(tiles_[kTile][r], static_cast<const char*>(memory) + r * stride, 64);
    }
  }
  template <int kTile>
  void store(void* memory, int64_t stride) {
    for (int r = 0; r < 16; ++r) {
      std::memcpy(static_cast<char*>(memory) + r * stride, tiles_[kTile][r], 64);
    }
  }
  template <int kSums, int kUnsigned, int kSigned>
  void add_products() {
    for (int m = 0; m < 16; ++m) {
      int32_t sums[16];
      std::memcpy(sums, tiles_[kSums][m], sizeof sums);
      for (int n = 0; n < 16; ++n) {
        for (int k = 0; k < 64; ++k) {
          sums[n] +=
              tiles_[kUnsigned][m][k] * static_cast<int8_t>(tiles_[kSigned][k / 4][n * 4 + k % 4]);
        }
      }
      std::memcpy(tiles_[kSums][m], sums, sizeof sums);
    }
  }
  static uint32_t at_least(const int32_t* sums, int32_t threshold) {
    uint32_t mask = 0;
    for (int i = 0; i < 32; ++i) mask |= static_cast<uint32_t>(sums[i] >= threshold) << i;
    return mask;
  }

 private:
  static inline std::atomic<bool> misused_{false};
  static inline thread_local bool configured_ = false;
  uint8_t tiles_[8][16][64];
};

// The portable kernels, but for the screen of a batch, however small.
inline const SearchKernels& software_tile_kernels() {
  static const SearchKernels kernels = [] {
    SearchKernels set = portable_kernels();
    set.name = "tiles in software";
    set.screen_batch = screen_batch_on_tiles<SoftwareTiles>;
    return set;
  }();
  return kernels;
}

}  // namespace psvdd::cpu
