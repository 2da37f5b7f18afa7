// The screen of a batch on tiles: matrix registers of 16 rows of 64 bytes.
//
// One step multiplies 16 queries by 64 codes (tile A) with 16 packs of codes of 16 rows (tile B:
// the layout of a block of codes as it is) and adds to 16 x 16 sums in 32 bits (tile C). Four C
// tiles, two A and two B make 32 queries x 32 rows, so that each tile loaded is used twice. C
// starts from the negated biases, so the sums are compared with the queries' thresholds as they
// are: a compare per 16 pairs, which is most of the work below 100 dimensions. The 32 rows' codes
// and the batch's queries come from the second-level cache.
//
// Queries are padded with zeros to whole tiles, so whatever B holds beyond a row's last pack adds
// nothing: mostly the next block, at the end of the array a copy with zeros.
//
// The operations are a template parameter: search_kernels_amx.cpp has the processor's, and
// tests/native some in plain C++ that run this very loop on any machine. They are
//
//   Tiles(), ~Tiles()                       configure all tiles as 16 x 64 bytes; release them
//   load<tile>(memory, stride)              stride: bytes from one row to the next
//   add_products<c, a, b>()                 c[m][n] += sum over 64 of unsigned a[m] * signed b[n]
//   store<tile>(memory, stride)
//   at_least(sums, threshold) -> uint32_t   a bit per each of 32 sums that is >= threshold
#pragma once

#include <cstring>

#include "search_kernels.h"

namespace psvdd::cpu {

template <class Tiles>
void screen_batch_on_tiles(const ScreenBatch& batch) {
  constexpr int64_t kTileBytes = 16 * 64;
  constexpr int64_t kPair = 2 * kLanes;  // rows, and queries, at a time
  static_assert(kBatchStep == kPair && kTileRows % kPair == 0 && kCodeStride == 64,
                "a batch consists of whole tiles");
  const int64_t block_bytes = batch.packs * 64;
  const int64_t all_bytes = batch.rows / kLanes * block_bytes;
  const int64_t steps = (block_bytes + kTileBytes - 1) / kTileBytes;
  alignas(64) int32_t start[kPair];
  alignas(64) int32_t sums[kPair][kPair];  // [query][row]
  alignas(64) int8_t copies[2][kTileBytes];
  Tiles tiles;
  for (int64_t row = 0; row < batch.rows; row += kPair) {
    for (int64_t r = 0; r < kPair; ++r) start[r] = -batch.bias[row + r];
    // Where the last step of each block is read.
    const int8_t* codes = batch.codes + row / kLanes * block_bytes;
    const int8_t* last[2];
    for (int64_t b = 0; b < 2; ++b) {
      last[b] = codes + b * block_bytes + (steps - 1) * kTileBytes;
      const int64_t left = batch.codes + all_bytes - last[b];
      if (left >= kTileBytes) continue;
      std::memcpy(copies[b], last[b], left);
      std::memset(copies[b] + left, 0, kTileBytes - left);
      last[b] = copies[b];
    }
    for (int64_t first = 0; first < batch.count; first += kPair) {
      const uint8_t* queries = batch.queries + first * batch.stride;
      tiles.template load<0>(start, 0);
      tiles.template load<1>(start + kLanes, 0);
      tiles.template load<2>(start, 0);
      tiles.template load<3>(start + kLanes, 0);
      for (int64_t step = 0; step < steps; ++step) {
        const bool is_last = step == steps - 1;
        tiles.template load<4>(queries + step * 64, batch.stride);
        tiles.template load<6>(is_last ? last[0] : codes + step * kTileBytes, 64);
        tiles.template load<7>(is_last ? last[1] : codes + block_bytes + step * kTileBytes, 64);
        tiles.template add_products<0, 4, 6>();
        tiles.template add_products<1, 4, 7>();
        tiles.template load<5>(queries + kLanes * batch.stride + step * 64, batch.stride);
        tiles.template add_products<2, 5, 6>();
        tiles.template add_products<3, 5, 7>();
      }
      constexpr int64_t kSumStride = kPair * sizeof(int32_t);
      tiles.template store<0>(&sums[0][0], kSumStride);
      tiles.template store<1>(&sums[0][kLanes], kSumStride);
      tiles.template store<2>(&sums[kLanes][0], kSumStride);
      tiles.template store<3>(&sums[kLanes][kLanes], kSumStride);
      for (int64_t q = 0; q < kPair; ++q) {
        const uint32_t mask = tiles.at_least(sums[q], batch.thresholds[first + q]);
        if (mask != 0) batch.passed(batch.search, first + q, row, mask);
      }
    }
  }
}

}  // namespace psvdd::cpu
