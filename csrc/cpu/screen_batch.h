// Screening many queries, or the rows of a mask, for sets of kernels that do it tile by tile or
// block by block.
#pragma once

#include <algorithm>

#include "search_kernels.h"

namespace psvdd::cpu {

// `SearchKernels::screen_batch` by way of a `SearchKernels::screen_tile`.
template <auto kScreenTile>
void screen_batch_by_tiles(const ScreenBatch& batch) {
  for (int64_t row = 0; row < batch.rows; row += kTileRows) {
    const int8_t* codes = batch.codes + row * batch.packs * 4;
    for (int64_t first = 0; first < batch.count; first += kTileQueries) {
      const int queries = static_cast<int>(std::min<int64_t>(kTileQueries, batch.count - first));
      const uint8_t* pointers[kTileQueries];
      uint64_t masks[kTileQueries];
      for (int q = 0; q < queries; ++q) pointers[q] = batch.queries + (first + q) * batch.stride;
      kScreenTile(pointers, batch.thresholds + first, queries, codes, batch.bias + row, batch.packs,
                  masks);
      uint64_t any = 0;
      for (int q = 0; q < queries; ++q) any |= masks[q];
      if (any == 0) continue;
      for (int q = 0; q < queries; ++q) {
        if (masks[q] != 0) batch.passed(batch.search, first + q, row, masks[q]);
      }
    }
  }
}

// `SearchKernels::screen_masked` by way of a function that screens one block: 16 bits.
template <auto kScreenBlock>
inline uint64_t screen_masked_by_blocks(const uint8_t* query, int32_t threshold,
                                        const int8_t* codes, const int32_t* bias, int64_t packs,
                                        uint64_t mask) {
  for (int b = 0; b < kTileBlocks; ++b) {
    const uint64_t lanes = uint64_t{0xffff} << (b * kLanes);
    if ((mask & lanes) == 0) continue;
    const uint64_t passed =
        kScreenBlock(query, threshold, codes + b * packs * 64, bias + b * kLanes, packs);
    mask &= ~lanes | passed << (b * kLanes);
  }
  return mask;
}

}  // namespace psvdd::cpu
