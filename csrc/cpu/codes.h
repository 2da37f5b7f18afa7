// The 8-bit codes of a block of consecutive rows of a bank.
#pragma once

#include <algorithm>
#include <cstdint>

#include "rescore.h"

namespace psvdd::cpu {

// Where the codes of one block are, or are to be put.
struct BlockCodes {
  float* centre;  // [dim, padded to a multiple of 16]
  int8_t* codes;  // [rows / 16, packs, 16, 4], rows padded to a multiple of 64
  int32_t* bias;  // [padded rows], see SearchKernels::screen_tile
  float scale;    // 0: the block is not to be screened
  float slack;    // bound on the distance of a row to what its code stands for
};

// Most rows of a block whose codes stay in the second-level cache; a multiple of kTileRows.
inline int64_t most_block_rows(int64_t dim) {
  constexpr int64_t kCodeBytes = 512 * 1024;  // half of a second-level cache
  constexpr int64_t kMostRows = 4096;
  const int64_t fitting = kCodeBytes / ((dim + 3) / 4 * 4) / kTileRows * kTileRows;
  return std::clamp<int64_t>(fitting, kTileRows, kMostRows);
}

// Encodes rows [begin, end) about their centre. A block whose values are too large is given the
// scale 0. Whether the rows are certainly finite.
bool encode_block(const SearchKernels& kernels, const Rows& bank, int64_t begin, int64_t end,
                  BlockCodes* block);

// One block of the codes of vectors [rows, dim].
BlockCodes block_of(const RowCodes& codes, int64_t dim, int64_t block);

}  // namespace psvdd::cpu
