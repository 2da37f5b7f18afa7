// Tests of single kernels of the CPU search, for whichever set of kernels is active.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "../../csrc/cpu/kernels.h"
#include "../../csrc/cpu/rescore.h"
#include "checks.h"
#include "software_tiles.h"

#include "../../csrc/cpu/search_kernels_generic.h"

namespace psvdd::cpu {

// Slightly more than a distance: a limit under which the pair must not be ruled out.
inline double just_above(long double distance) {
  return std::nextafter(static_cast<double>(distance * (1 + 1e-15L)), 1e300);
}

// A row whose canonical squared distance does not exceed `squared` is within winning_distance.
inline void test_winning_distance() {
  const int64_t dim = integer(1, 300);
  const std::vector<float> values = hard_values(40, dim, dim);
  for (int64_t b = 1; b < 40; ++b) {
    float squared;
    active_kernels().squared_distances({values.data(), dim, false}, values.data(), &b, 1, &squared);
    const long double distance = true_distance(values.data(), values.data() + b * dim, dim);
    EXPECT(distance <= winning_distance(squared, dim), "dim %ld, distance %Lg", long(dim),
           distance);
  }
}

// The screen passes every pair under a limit that is just its distance.
inline void test_screen() {
  const SearchKernels& kernels = active_kernels();
  const int64_t dim = integer(0, 3) ? integer(1, 100) : integer(1, kMostDims);
  const int64_t padded = round_up(dim, kLanes), packs = (dim + 3) / 4;
  const int64_t queries = integer(1, kTileQueries);
  const std::vector<float> values = hard_values(kTileRows + queries + 1, dim, padded);
  const float* centre = values.data() + (kTileRows + queries) * padded;
  float largest = 0;
  for (int64_t r = 0; r < kTileRows; ++r) {
    for (int64_t j = 0; j < dim; ++j) {
      largest = std::max(largest, std::fabs(values[r * padded + j] - centre[j]));
    }
  }
  // Also with scales that clip the rows or waste the codes.
  const auto scale = static_cast<float>(
      std::max(static_cast<double>(largest) / kCodeLimit * std::exp2(uniform(-2, 2)), 1e-30));
  std::vector<int8_t> codes(kTileRows * packs * 4);
  std::vector<int32_t> bias(kTileRows, kNothing);
  std::vector<double> row_error(kTileRows);
  std::vector<uint8_t> code(padded);
  const int64_t rows = integer(1, kTileRows);
  for (int64_t r = 0; r < rows; ++r) {
    const Encoding encoding =
        encode_row(kernels, values.data() + r * padded, centre, padded, scale, code.data());
    row_error[r] = residual_bound(encoding, padded);
    write_code(code.data(), encoding, packs, r, codes.data(), bias.data());
  }
  std::vector<std::vector<uint8_t>> query_codes(queries, std::vector<uint8_t>(padded));
  std::vector<const uint8_t*> pointers;
  std::vector<Encoding> encodings;
  for (int64_t q = 0; q < queries; ++q) {
    encodings.push_back(encode_query(kernels, values.data() + (kTileRows + q) * padded, centre,
                                     padded, scale, query_codes[q].data()));
    pointers.push_back(query_codes[q].data());
  }
  for (int64_t r = 0; r < rows; ++r) {
    std::vector<int32_t> thresholds;
    for (int64_t q = 0; q < queries; ++q) {
      const long double distance =
          true_distance(values.data() + r * padded, values.data() + (kTileRows + q) * padded, dim);
      thresholds.push_back(screen_threshold(encodings[q].code_squares, just_above(distance),
                                            row_error[r] + residual_bound(encodings[q], padded),
                                            scale, kernels.query_step));
    }
    uint64_t masks[kTileQueries];
    kernels.screen_tile(pointers.data(), thresholds.data(), static_cast<int>(queries), codes.data(),
                        bias.data(), packs, masks);
    for (int64_t q = 0; q < queries; ++q) {
      EXPECT(masks[q] >> r & 1, "%s, dim %ld, row %ld", kernels.name, long(dim), long(r));
      EXPECT(rows == kTileRows || masks[q] >> rows == 0, "padding passed");
      uint16_t blocks[kTileBlocks];
      kernels.screen_blocks(pointers[q], thresholds[q], codes.data(), bias.data(), packs,
                            kTileBlocks, blocks);
      EXPECT(std::memcmp(blocks, &masks[q], sizeof blocks) == 0, "%s: tile and blocks differ",
             kernels.name);
    }
  }
}

// Codes, thresholds and what passed: the bits of all pairs of a batch.
struct TestBatch {
  std::vector<uint8_t> queries;
  std::vector<int8_t> codes;
  std::vector<int32_t> bias, thresholds;
  ScreenBatch batch;
  std::vector<uint64_t> passed;  // [count, rows / 64]
  int64_t calls = 0;

  TestBatch(int64_t dim, int64_t count, int64_t rows) {
    const int64_t packs = (dim + 3) / 4, stride = round_up(dim, kCodeStride);
    const int64_t padded_rows = round_up(rows, kTileRows), padded = round_up(count, kBatchStep);
    const SearchKernels& kernels = active_kernels();
    const int step = kernels.query_step, largest = kCodeLimit / step, offset = kQueryOffset / step;
    // Random codes, or the extremes, whose products would overflow 16 bits.
    const bool extremes = integer(0, 1);
    const auto draw = [&](int limit) {
      return static_cast<int>(extremes ? limit * (2 * integer(0, 1) - 1) : integer(-limit, limit));
    };
    queries.assign(padded * stride, 0);
    for (int64_t q = 0; q < count; ++q) {
      for (int64_t j = 0; j < packs * 4; ++j) {
        queries[q * stride + j] = static_cast<uint8_t>(draw(largest) + offset);
      }
    }
    codes.assign(padded_rows * packs * 4, 0);
    bias.assign(padded_rows, kNothing);
    std::vector<uint8_t> code(packs * 4);
    for (int64_t r = 0; r < rows; ++r) {
      Encoding encoding{};
      for (int64_t j = 0; j < packs * 4; ++j) {
        const int value = j < dim ? draw(kCodeLimit) : 0;
        code[j] = static_cast<uint8_t>(value);
        encoding.code_squares += value * value;
      }
      write_code(code.data(), encoding, packs, r, codes.data(), bias.data());
    }
    // Thresholds that some row just meets, everything, or nothing.
    thresholds.assign(padded, kNothing);
    for (int64_t q = 0; q < count; ++q) {
      const int64_t r = integer(0, rows - 1);
      int32_t sums[kLanes];
      generic_block_sums(queries.data() + q * stride, codes.data() + r / kLanes * packs * 64,
                         halved(bias.data() + r / kLanes * kLanes, step).data(), packs, sums);
      const int64_t kind = integer(0, 9);
      thresholds[q] = kind == 0 ? kEverything : kind == 1 ? kNothing / 4 : sums[r % kLanes];
    }
    passed.assign(count * (padded_rows / kTileRows), 0);
    batch = {queries.data(), stride, count,       thresholds.data(), codes.data(),
             bias.data(),    packs,  padded_rows, note_passed,       this};
  }

  static std::vector<int32_t> halved(const int32_t* bias, int step) {
    std::vector<int32_t> result(bias, bias + kLanes);
    for (int32_t& value : result) value >>= step / 2;
    return result;
  }

  static void note_passed(void* test, int64_t query, int64_t row, uint64_t mask) {
    auto& self = *static_cast<TestBatch*>(test);
    EXPECT(query < self.batch.count && mask != 0, "query %ld of %ld", long(query),
           long(self.batch.count));
    self.passed[query * (self.batch.rows / kTileRows) + row / kTileRows] |= mask << row % kTileRows;
    ++self.calls;
  }

  // The bits by a plain loop.
  std::vector<uint64_t> expected(int64_t rows) const {
    std::vector<uint64_t> bits(passed.size());
    for (int64_t q = 0; q < batch.count; ++q) {
      for (int64_t r = 0; r < rows; ++r) {
        int64_t sum = -(int64_t{bias[r]} >> (active_kernels().query_step / 2));
        const int8_t* block = codes.data() + r / kLanes * batch.packs * 64;
        for (int64_t j = 0; j < batch.packs * 4; ++j) {
          sum += queries[q * batch.stride + j] * block[(j / 4 * kLanes + r % kLanes) * 4 + j % 4];
        }
        bits[q * (batch.rows / kTileRows) + r / kTileRows] |= uint64_t{sum >= thresholds[q]}
                                                              << r % kTileRows;
      }
    }
    return bits;
  }
};

// A batch is screened as a plain loop does it.
inline void test_batches() {
  const int64_t dim = integer(0, 3) ? integer(1, 200) : integer(1, kMostDims);
  const int64_t count = integer(1, 70), rows = integer(1, dim > 500 ? 100 : 300);
  TestBatch test(dim, count, rows);
  active_kernels().screen_batch(test.batch);
  EXPECT(!SoftwareTiles::misused(), "tiles configured twice, or not released");
  EXPECT(test.passed == test.expected(rows), "%s: dim %ld, %ld queries, %ld rows",
         active_kernels().name, long(dim), long(count), long(rows));
}

// Distances of a tile of rows, and which of them are near.
inline void test_distance_tiles() {
  const int64_t dim = integer(0, 1) ? integer(1, 20) : integer(1, 200);
  const int64_t rows = integer(1, 150), first = integer(0, rows - 1), queries = integer(1, 5);
  const int count = static_cast<int>(std::min<int64_t>(integer(1, kTileRows), rows - first));
  std::vector<float> values = hard_values(rows + queries, dim, dim);
  if (integer(0, 3) == 0) values[integer(first, first + count - 1) * dim] = NAN;
  if (integer(0, 3) == 0) values[integer(first, first + count - 1) * dim] = INFINITY;
  const std::vector<float> bank_values(values.begin(), values.begin() + rows * dim);
  const Rows bank{bank_values.data(), dim, false};
  const float* vectors = values.data() + rows * dim;
  std::vector<float> limits, squared(queries * kTileRows);
  std::vector<uint64_t> masks(queries);
  float expected[kTileRows];
  for (int64_t q = 0; q < queries; ++q) {
    const int64_t row = first + integer(0, count - 1);
    portable_kernels().squared_distances(bank, vectors + q * dim, &row, 1, expected);
    limits.push_back(integer(0, 9) ? expected[0] : INFINITY);
  }
  const bool finite =
      active_kernels().distance_tile(bank, first, count, vectors, static_cast<int>(queries),
                                     limits.data(), squared.data(), masks.data());
  bool all_finite = true;
  for (int64_t q = 0; q < queries; ++q) {
    uint64_t mask = 0;
    for (int r = 0; r < count; ++r) {
      const int64_t row = first + r;
      portable_kernels().squared_distances(bank, vectors + q * dim, &row, 1, &expected[r]);
      mask |= uint64_t{expected[r] <= limits[q]} << r;
      all_finite &= expected[r] < INFINITY;
      const float found = squared[q * kTileRows + r];
      EXPECT(!(expected[r] < INFINITY) || std::memcmp(&found, &expected[r], sizeof found) == 0,
             "%s: dim %ld, %g for %g", active_kernels().name, long(dim), found, expected[r]);
    }
    EXPECT(masks[q] == mask, "%s: dim %ld, mask %lx for %lx", active_kernels().name, long(dim),
           static_cast<unsigned long>(masks[q]), static_cast<unsigned long>(mask));
  }
  EXPECT(finite == all_finite, "%s: dim %ld", active_kernels().name, long(dim));
}

}  // namespace psvdd::cpu
