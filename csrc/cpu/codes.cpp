// Encoding rows: each block of a bank gets a centre, a scale and 8-bit codes (docs/design/
// cpu-search.md has the proof of what follows from them). Traffic: the rows are read twice, the
// second time from a cache, and a quarter of them is written.

#include "codes.h"

#include <cmath>
#include <vector>

#include "kernels.h"
#include "parallel.h"

namespace psvdd::cpu {
namespace {

constexpr int64_t kRowsForCentre = 64;
constexpr float kLargest = 1e15f;  // squares of larger differences might overflow

// Rows of a bank as the kernels take them, padded with zeros to `dims`.
class PaddedRows {
 public:
  PaddedRows(const Rows& bank, int64_t dims)
      : bank_(bank), direct_(!bank.half && bank.dim == dims), row_(direct_ ? 0 : dims, 0.0f) {}

  const float* operator[](int64_t row) {
    if (direct_) return static_cast<const float*>(bank_.data) + row * bank_.dim;
    read_row(bank_, row, row_.data());
    return row_.data();
  }

 private:
  const Rows& bank_;
  const bool direct_;
  std::vector<float> row_;
};

}  // namespace

bool encode_block(const SearchKernels& kernels, const Rows& bank, int64_t begin, int64_t end,
                  BlockCodes* block) {
  const int64_t dims = round_up(bank.dim, kLanes);
  const int64_t packs = (bank.dim + 3) / 4;
  const int64_t padded_rows = round_up(end - begin, kTileRows);
  PaddedRows rows(bank, dims);
  // Any centre will do; the mean of some rows is close to that of all.
  const int64_t step = std::max<int64_t>(1, (end - begin) / kRowsForCentre);
  std::fill(block->centre, block->centre + dims, 0.0f);
  for (int64_t r = begin; r < end; r += step) {
    const float* row = rows[r];
    const auto weight = static_cast<float>(step) / static_cast<float>(end - begin);
    for (int64_t j = 0; j < bank.dim; ++j) block->centre[j] += weight * row[j];
  }
  float largest = 0;
  for (int64_t r = begin; r < end; ++r) {
    largest = std::max(largest, kernels.largest_difference(rows[r], block->centre, dims));
  }
  block->scale = 0;
  block->slack = 0;
  // False for NaN, too, from centres that overflow.
  if (!(largest < kLargest) || bank.dim > kMostDims) return false;
  block->scale = std::max(largest / kCodeLimit, 1e-30f);
  std::fill(block->codes, block->codes + padded_rows * packs * 4, int8_t{0});
  std::fill(block->bias, block->bias + padded_rows, kNothing);
  Encoding most{};  // the bound grows with both sums
  bool finite = true;
  std::vector<uint8_t> code(dims);
  for (int64_t r = begin; r < end; ++r) {
    const Encoding encoding =
        encode_row(kernels, rows[r], block->centre, dims, block->scale, code.data());
    finite &= encoding.squared < INFINITY;  // a value that is not finite shows here
    most.residual = std::max(most.residual, encoding.residual);
    most.squared = std::max(most.squared, encoding.squared);
    write_code(code.data(), encoding, packs, r - begin, block->codes, block->bias);
  }
  block->slack = static_cast<float>(residual_bound(most, dims) * (1 + 1e-6));  // rounded up
  return finite;
}

int64_t code_block_rows(int64_t dim) { return most_block_rows(dim); }

BlockCodes block_of(const RowCodes& codes, int64_t dim, int64_t block) {
  const int64_t begin = block * codes.block_rows;
  return {codes.centres + block * round_up(dim, kLanes), codes.codes + begin * ((dim + 3) / 4) * 4,
          codes.bias + begin, codes.scales[block], codes.slack[block]};
}

void encode_rows(const CodedRows& bank, int num_threads) {
  const Rows rows{bank.data, bank.dim, bank.is_half};
  const SearchKernels& kernels = active_kernels();
  const int64_t block_rows = bank.codes.block_rows;
  const int64_t packs = (bank.dim + 3) / 4;
  const int64_t blocks = (bank.rows + block_rows - 1) / block_rows;
  parallel_for(blocks, num_threads, [&](int64_t b) {
    const int64_t begin = b * block_rows;
    const int64_t end = std::min(bank.rows, begin + block_rows);
    BlockCodes block = block_of(bank.codes, bank.dim, b);
    encode_block(kernels, rows, begin, end, &block);
    if (block.scale == 0) {  // so that all of the arrays have values
      const int64_t padded_rows = round_up(end - begin, kTileRows);
      std::fill(block.codes, block.codes + padded_rows * packs * 4, int8_t{0});
      std::fill(block.bias, block.bias + padded_rows, kNothing);
      std::fill(block.centre, block.centre + round_up(bank.dim, kLanes), 0.0f);
    }
    bank.codes.scales[b] = block.scale;
    bank.codes.slack[b] = block.slack;
  });
}

}  // namespace psvdd::cpu
