// Exact nearest neighbour by the canonical squared distance, brute force.
//
// Canonical squared distance of q and b: sixteen partial sums; for each j the difference
// t = q[j] - b[j], rounded to float32, enters acc[j % 16] = fma(t, t, acc[j % 16]); then
// acc[i] += acc[i + 8], + 4, + 2, + 1. Every instruction set computes exactly this, so the answer
// does not depend on the machine, the number of threads or the size of the batch.
//
// Sixteen bank rows are transposed into a tile [D, 16] so that one vector lane belongs to one bank
// row: the partial sums of a query against sixteen rows live in registers, and the final additions
// are vertical. A tile is reused by every query of a block while it sits in the first cache.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <stdexcept>

#include "kernels.h"
#include "parallel.h"

#if (defined(__x86_64__) || defined(__i386__)) && defined(__GNUC__)
#define PSVDD_X86 1
#include <immintrin.h>
#endif

namespace psvdd::cpu {
namespace {

constexpr int kPartialSums = 16;      // fixed by the canonical distance
constexpr int kTileRows = 16;         // bank rows per tile
constexpr int64_t kQueryBlock = 256;  // queries that share a tile

// Writes the canonical squared distances of one query to the 16 rows of a tile.
using DistanceKernel = void (*)(const float* query, const float* tile, int64_t dim, float* out);

void distances_portable(const float* query, const float* tile, int64_t dim, float* out) {
  float sums[kPartialSums][kTileRows] = {};
  for (int64_t j = 0; j < dim; ++j) {
    float* sum = sums[j % kPartialSums];
    for (int row = 0; row < kTileRows; ++row) {
      const float difference = query[j] - tile[j * kTileRows + row];
      sum[row] = std::fma(difference, difference, sum[row]);
    }
  }
  for (int half = kPartialSums / 2; half >= 1; half /= 2) {
    for (int i = 0; i < half; ++i) {
      for (int row = 0; row < kTileRows; ++row) sums[i][row] += sums[i + half][row];
    }
  }
  for (int row = 0; row < kTileRows; ++row) out[row] = sums[0][row];
}

#if PSVDD_X86

// Sixteen lanes of bank rows, sixteen partial sums: half of the 32 registers.
__attribute__((target("avx512f"))) void distances_avx512(const float* query, const float* tile,
                                                         int64_t dim, float* out) {
  __m512 sums[kPartialSums];
  for (__m512& sum : sums) sum = _mm512_setzero_ps();
  int64_t j = 0;
  for (; j + kPartialSums <= dim; j += kPartialSums) {
#pragma GCC unroll 16
    for (int i = 0; i < kPartialSums; ++i) {
      const __m512 difference =
          _mm512_sub_ps(_mm512_set1_ps(query[j + i]), _mm512_loadu_ps(tile + (j + i) * kTileRows));
      sums[i] = _mm512_fmadd_ps(difference, difference, sums[i]);
    }
  }
  const int64_t tail = dim - j;
#pragma GCC unroll 16
  for (int i = 0; i < kPartialSums; ++i) {
    if (i < tail) {
      const __m512 difference =
          _mm512_sub_ps(_mm512_set1_ps(query[j + i]), _mm512_loadu_ps(tile + (j + i) * kTileRows));
      sums[i] = _mm512_fmadd_ps(difference, difference, sums[i]);
    }
  }
#pragma GCC unroll 4
  for (int half = kPartialSums / 2; half >= 1; half /= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i) sums[i] = _mm512_add_ps(sums[i], sums[i + half]);
  }
  _mm512_storeu_ps(out, sums[0]);
}

// Eight lanes at a time and, of the 16 registers, eight for partial sums: two passes over the tile
// columns, each over the j that belong to one half of the sums.
__attribute__((target("avx2,fma"))) void distances_avx2(const float* query, const float* tile,
                                                        int64_t dim, float* out) {
  constexpr int kHalf = kPartialSums / 2;
  for (int lanes = 0; lanes < kTileRows; lanes += 8) {
    __m256 halves[2][kHalf];
    for (int upper = 0; upper < 2; ++upper) {
      __m256 sums[kHalf];
      for (__m256& sum : sums) sum = _mm256_setzero_ps();
      int64_t j = upper * kHalf;
      for (; j + kHalf <= dim; j += kPartialSums) {
#pragma GCC unroll 8
        for (int i = 0; i < kHalf; ++i) {
          const __m256 difference = _mm256_sub_ps(
              _mm256_set1_ps(query[j + i]), _mm256_loadu_ps(tile + (j + i) * kTileRows + lanes));
          sums[i] = _mm256_fmadd_ps(difference, difference, sums[i]);
        }
      }
      const int64_t tail = dim - j;
#pragma GCC unroll 8
      for (int i = 0; i < kHalf; ++i) {
        if (i < tail) {
          const __m256 difference = _mm256_sub_ps(
              _mm256_set1_ps(query[j + i]), _mm256_loadu_ps(tile + (j + i) * kTileRows + lanes));
          sums[i] = _mm256_fmadd_ps(difference, difference, sums[i]);
        }
        halves[upper][i] = sums[i];
      }
    }
    __m256* sums = halves[0];
#pragma GCC unroll 8
    for (int i = 0; i < kHalf; ++i) sums[i] = _mm256_add_ps(sums[i], halves[1][i]);
#pragma GCC unroll 3
    for (int half = kHalf / 2; half >= 1; half /= 2) {
#pragma GCC unroll 4
      for (int i = 0; i < half; ++i) sums[i] = _mm256_add_ps(sums[i], sums[i + half]);
    }
    _mm256_storeu_ps(out + lanes, sums[0]);
  }
}

#endif  // PSVDD_X86

struct InstructionSet {
  const char* name;
  DistanceKernel distances;
  bool supported;
};

// Best first. Detection covers the operating system's support for the wide registers too.
const std::vector<InstructionSet>& known_instruction_sets() {
  static const std::vector<InstructionSet> sets = {
#if PSVDD_X86
      {"avx512", distances_avx512, __builtin_cpu_supports("avx512f") != 0},
      {"avx2", distances_avx2,
       __builtin_cpu_supports("avx2") != 0 && __builtin_cpu_supports("fma") != 0},
#endif
      {"portable", distances_portable, true},
  };
  return sets;
}

const InstructionSet* best_instruction_set() {
  const auto& sets = known_instruction_sets();
  return &*std::find_if(sets.begin(), sets.end(), [](const auto& set) { return set.supported; });
}

std::atomic<const InstructionSet*>& active() {
  static std::atomic<const InstructionSet*> set{best_instruction_set()};
  return set;
}

struct Best {
  float squared = std::numeric_limits<float>::infinity();
  int64_t index = 0;  // what remains if every squared distance overflows to infinity
};

// Bank rows [first, first + rows) as columns of the tile, [D, 16]; missing rows are left as zero.
void fill_tile(const NearestParams& params, int64_t first, int64_t rows, float* tile) {
  if (rows < kTileRows) std::fill(tile, tile + params.dim * kTileRows, 0.0f);
  for (int64_t row = 0; row < rows; ++row) {
    const float* source = params.bank_data + (first + row) * params.dim;
    for (int64_t j = 0; j < params.dim; ++j) tile[j * kTileRows + row] = source[j];
  }
}

// Searches bank rows [begin, end) for a block of queries. Rows are visited in ascending order and
// only a smaller distance replaces the best, so the lowest index wins a tie.
void search_range(const NearestParams& params, DistanceKernel distances, int64_t first_query,
                  int64_t queries, int64_t begin, int64_t end, Best* best) {
  std::vector<float> tile(params.dim * kTileRows);
  alignas(64) float squared[kTileRows];
  for (int64_t first = begin; first < end; first += kTileRows) {
    const int64_t rows = std::min<int64_t>(kTileRows, end - first);
    fill_tile(params, first, rows, tile.data());
    for (int64_t q = 0; q < queries; ++q) {
      distances(params.query_data + (first_query + q) * params.dim, tile.data(), params.dim,
                squared);
      // All 16 lanes at once, without a branch; lanes beyond the bank are sorted out below.
      bool any_closer = false;
      for (int row = 0; row < kTileRows; ++row) any_closer |= squared[row] < best[q].squared;
      if (!any_closer) continue;
      for (int64_t row = 0; row < rows; ++row) {
        if (squared[row] < best[q].squared) best[q] = {squared[row], first + row};
      }
    }
  }
}

}  // namespace

void nearest(const NearestParams& params, int num_threads) {
  if (params.queries == 0) return;
  const IeeeArithmetic ieee;  // for the square roots below; the threads have their own
  const DistanceKernel distances = active().load()->distances;
  const int64_t blocks = (params.queries + kQueryBlock - 1) / kQueryBlock;

  // Few queries: split the bank as well, on tile borders, so that every thread has work.
  const int64_t tiles = (params.bank_rows + kTileRows - 1) / kTileRows;
  const int64_t splits = std::clamp<int64_t>((num_threads + blocks - 1) / blocks, 1, tiles);
  const int64_t rows_per_split = (tiles + splits - 1) / splits * kTileRows;

  std::vector<Best> best(splits * params.queries);  // [splits, Q]
  parallel_for(blocks * splits, num_threads, [&](int64_t item) {
    const int64_t split = item / blocks;
    const int64_t first_query = item % blocks * kQueryBlock;
    const int64_t queries = std::min(kQueryBlock, params.queries - first_query);
    const int64_t begin = split * rows_per_split;
    const int64_t end = std::min(params.bank_rows, begin + rows_per_split);
    search_range(params, distances, first_query, queries, begin, end,
                 best.data() + split * params.queries + first_query);
  });

  for (int64_t q = 0; q < params.queries; ++q) {
    Best result = best[q];
    for (int64_t split = 1; split < splits; ++split) {
      const Best& candidate = best[split * params.queries + q];
      if (candidate.squared < result.squared) result = candidate;
    }
    params.distances[q] = std::sqrt(result.squared);
    params.indices[q] = result.index;
  }
}

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const InstructionSet& set : known_instruction_sets()) {
    if (set.supported) names.emplace_back(set.name);
  }
  return names;
}

std::string instruction_set() { return active().load()->name; }

void set_instruction_set(const std::string& name) {
  for (const InstructionSet& set : known_instruction_sets()) {
    if (set.supported && name == set.name) {
      active() = &set;
      return;
    }
  }
  throw std::invalid_argument("this processor does not support the instruction set " + name);
}

}  // namespace psvdd::cpu
