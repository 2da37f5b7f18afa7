// Screening many queries against many rows, for sets of kernels that do it tile by tile.
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

}  // namespace psvdd::cpu
