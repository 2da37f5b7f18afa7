// The search kernels for AVX2 with FMA and F16C: eight lanes, so two registers per block.

#include <algorithm>
#include <cmath>
#include <utility>

#include "../portable.h"
#include "screen_batch.h"
#include "search_kernels.h"

#if PSVDD_X86
#include <immintrin.h>

// After the includes, so that nothing of the standard library is compiled for this target.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

#include "search_kernels_generic.h"
#include "search_kernels_rows.h"

namespace psvdd::cpu {
namespace {

struct Lanes {
  __m256 low;
  __m256 high;
};

template <bool kHalf>
inline Lanes load_sixteen(const void* data, int64_t element) {
  if constexpr (kHalf) {
    const auto* halves = static_cast<const Half*>(data) + element;
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(halves))),
            _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(halves + 8)))};
  } else {
    const auto* floats = static_cast<const float*>(data) + element;
    return {_mm256_loadu_ps(floats), _mm256_loadu_ps(floats + 8)};
  }
}

inline float canonical_sum(Lanes sums) {
  const __m256 eight = _mm256_add_ps(sums.low, sums.high);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}

// The canonical sums of four rows at once: a transposing tree.
inline __m128 canonical_sums(const Lanes* sums) {
  __m256 eights[4], fours[2];
#pragma GCC unroll 4
  for (int r = 0; r < 4; ++r) eights[r] = _mm256_add_ps(sums[r].low, sums[r].high);  // + 8
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {  // + 4, two rows side by side
    const __m256 a = eights[2 * i], b = eights[2 * i + 1];
    fours[i] =
        _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
  }
  // + 2, then + 1: rows 0 0 2 2 | 1 1 3 3
  const __m256 twos = _mm256_add_ps(_mm256_shuffle_ps(fours[0], fours[1], 0x44),
                                    _mm256_shuffle_ps(fours[0], fours[1], 0xee));
  const __m256 ones = _mm256_add_ps(twos, _mm256_permute_ps(twos, 0xb1));
  return _mm_blend_ps(_mm256_castps256_ps128(ones), _mm256_extractf128_ps(ones, 1), 0xa);
}

// Sixteen values of which the first `count` are loaded, the others zero.
template <bool kHalf>
inline Lanes load_some(const void* data, int64_t element, int64_t count) {
  if constexpr (kHalf) {
    Half halves[kLanes] = {};
    for (int64_t i = 0; i < count; ++i) halves[i] = static_cast<const Half*>(data)[element + i];
    return load_sixteen<true>(halves, 0);
  } else {
    const auto* floats = static_cast<const float*>(data) + element;
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const auto mask = [&](int64_t first) {
      return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count - first)), lane);
    };
    return {_mm256_maskload_ps(floats, mask(0)), _mm256_maskload_ps(floats + 8, mask(8))};
  }
}

inline void add_square(Lanes* sums, const Lanes& query, const Lanes& row) {
  const __m256 low = _mm256_sub_ps(query.low, row.low);
  const __m256 high = _mm256_sub_ps(query.high, row.high);
  sums->low = _mm256_fmadd_ps(low, low, sums->low);
  sums->high = _mm256_fmadd_ps(high, high, sums->high);
}

template <int kRows, bool kHalf>
inline void distances_to(const Rows& bank, const float* query, const int64_t* rows,
                         float* squared) {
  Lanes sums[kRows];
  for (Lanes& sum : sums) sum = {_mm256_setzero_ps(), _mm256_setzero_ps()};
  int64_t j = 0;
  for (; j + kLanes <= bank.dim; j += kLanes) {
    const Lanes values = load_sixteen<false>(query, j);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      add_square(&sums[r], values, load_sixteen<kHalf>(bank.data, rows[r] * bank.dim + j));
    }
  }
  if (j < bank.dim) {
    const Lanes values = load_some<false>(query, j, bank.dim - j);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      add_square(&sums[r], values,
                 load_some<kHalf>(bank.data, rows[r] * bank.dim + j, bank.dim - j));
    }
  }
  if constexpr (kRows == 4) {
    _mm_storeu_ps(squared, canonical_sums(sums));
  } else {
    for (int r = 0; r < kRows; ++r) squared[r] = canonical_sum(sums[r]);
  }
}

template <bool kHalf>
inline void distances_of(const Rows& bank, const float* query, const int64_t* rows, int count,
                         float* squared) {
  int r = 0;
  for (; r + 4 <= count; r += 4) distances_to<4, kHalf>(bank, query, rows + r, squared + r);
  for (; r < count; ++r) distances_to<1, kHalf>(bank, query, rows + r, squared + r);
}

void avx2_squared_distances(const Rows& bank, const float* query, const int64_t* rows, int count,
                            float* squared) {
  (bank.half ? distances_of<true> : distances_of<false>)(bank, query, rows, count, squared);
}

// Four rows one after the other, so that memory is read in order.
template <bool kHalf>
inline void distances_in_order(const Rows& bank, const float* query, const int64_t* rows,
                               float* squared) {
  Lanes sums[4];
#pragma GCC unroll 4
  for (int r = 0; r < 4; ++r) {
    Lanes sum = {_mm256_setzero_ps(), _mm256_setzero_ps()};
    const int64_t start = rows[r] * bank.dim;
    int64_t j = 0;
    for (; j + kLanes <= bank.dim; j += kLanes) {
      add_square(&sum, load_sixteen<false>(query, j), load_sixteen<kHalf>(bank.data, start + j));
    }
    if (j < bank.dim) {
      add_square(&sum, load_some<false>(query, j, bank.dim - j),
                 load_some<kHalf>(bank.data, start + j, bank.dim - j));
    }
    sums[r] = sum;
  }
  _mm_storeu_ps(squared, canonical_sums(sums));
}

// Distances to consecutive rows; those of the last row once more, up to a multiple of 4. is_fresh:
// the rows are not in a cache yet.
inline void distances_to_run(const Rows& bank, const float* query, int64_t first, int count,
                             bool is_fresh, float* squared) {
  const auto distances = is_fresh
                             ? (bank.half ? distances_in_order<true> : distances_in_order<false>)
                             : (bank.half ? distances_to<4, true> : distances_to<4, false>);
  for (int r = 0; r < count; r += 4) {
    int64_t rows[4];
    for (int i = 0; i < 4; ++i) rows[i] = first + std::min(r + i, count - 1);
    distances(bank, query, rows, squared + r);
  }
  for (int r = (count + 3) / 4 * 4; r < (count + 7) / 8 * 8; ++r) squared[r] = squared[count - 1];
}

inline float sum_of(__m256 values) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(values), _mm256_extractf128_ps(values, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}

// Eight differences: their codes as integers; adds to the sums.
inline __m256i encode_eight(const float* vector, const float* centre, float scale, float inverse,
                            float limit, __m256* residual, __m256* squared) {
  const __m256 t = _mm256_sub_ps(_mm256_loadu_ps(vector), _mm256_loadu_ps(centre));
  const __m256 scaled = _mm256_mul_ps(t, _mm256_set1_ps(inverse));
  const __m256i rounded = _mm256_cvtps_epi32(_mm256_max_ps(
      _mm256_min_ps(scaled, _mm256_set1_ps(limit)), _mm256_set1_ps(-limit)));  // NaN: the limit
  const __m256 rest = _mm256_fnmadd_ps(_mm256_set1_ps(scale), _mm256_cvtepi32_ps(rounded), t);
  *residual = _mm256_fmadd_ps(rest, rest, *residual);
  *squared = _mm256_fmadd_ps(t, t, *squared);
  return rounded;
}

// Columns [first, first + 4 kRegisters) of the products.
template <int kRegisters>
inline void products_of(const double* vector, const float* matrix, int64_t dims, int64_t columns,
                        double* result) {
  __m256d sums[kRegisters] = {};
  for (int64_t j = 0; j < dims; ++j, matrix += columns) {
    const __m256d value = _mm256_broadcast_sd(vector + j);
#pragma GCC unroll 8
    for (int i = 0; i < kRegisters; ++i) {
      const __m256d row = _mm256_cvtps_pd(_mm_loadu_ps(matrix + 4 * i));
      sums[i] = _mm256_fmadd_pd(value, row, sums[i]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRegisters; ++i) _mm256_storeu_pd(result + 4 * i, sums[i]);
}

void avx2_products(const double* vector, const float* matrix, int64_t dims, int64_t columns,
                   double* result) {
  int64_t first = 0;
  for (; first + 32 <= columns; first += 32) {
    products_of<8>(vector, matrix + first, dims, columns, result + first);
  }
  for (; first < columns; first += kLanes) {
    products_of<4>(vector, matrix + first, dims, columns, result + first);
  }
}

Encoding avx2_encode(const float* vector, const float* centre, int64_t dims, float scale, int limit,
                     int offset, uint8_t* code) {
  const float inverse = 1.0f / scale, largest = static_cast<float>(limit);
  __m256i code_squares = _mm256_setzero_si256();
  __m256 residual = _mm256_setzero_ps(), squared = residual;
  for (int64_t j = 0; j < dims; j += kLanes) {
    const __m256i low =
        encode_eight(vector + j, centre + j, scale, inverse, largest, &residual, &squared);
    const __m256i high =
        encode_eight(vector + j + 8, centre + j + 8, scale, inverse, largest, &residual, &squared);
    // In the order 0-3, 8-11, 4-7, 12-15 until the end.
    const __m256i words = _mm256_packs_epi32(low, high);
    code_squares = _mm256_add_epi32(code_squares, _mm256_madd_epi16(words, words));
    const __m256i shifted =
        _mm256_and_si256(_mm256_add_epi16(words, _mm256_set1_epi16(static_cast<int16_t>(offset))),
                         _mm256_set1_epi16(0xff));
    const __m128i bytes =
        _mm_packus_epi16(_mm256_castsi256_si128(shifted), _mm256_extracti128_si256(shifted, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(code + j), _mm_shuffle_epi32(bytes, 0xd8));
  }
  const __m128i four = _mm_add_epi32(_mm256_castsi256_si128(code_squares),
                                     _mm256_extracti128_si256(code_squares, 1));
  const __m128i two = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  return {_mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 0xb1))), sum_of(residual),
          sum_of(squared)};
}

float avx2_largest_difference(const float* vector, const float* centre, int64_t dims) {
  const __m256 no_sign = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
  __m256 largest = _mm256_setzero_ps();
  for (int64_t j = 0; j < dims; j += 8) {
    const __m256 difference =
        _mm256_sub_ps(_mm256_loadu_ps(vector + j), _mm256_loadu_ps(centre + j));
    largest = _mm256_max_ps(_mm256_and_ps(difference, no_sign), largest);
  }
  const __m128 four =
      _mm_max_ps(_mm256_castps256_ps128(largest), _mm256_extractf128_ps(largest, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps(two, two, 1)));
}

// A row's codes are at most 127 in size and a query's, stored unsigned, must be too: then a sum of
// two products fits into 16 bits. Hence the larger step.
constexpr int kQueryStep = 2;

inline __m256i add_products(__m256i sum, __m256i query, __m256i codes) {
  const __m256i pairs = _mm256_maddubs_epi16(query, codes);
  return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

inline int broadcast_pack(const uint8_t* query, int64_t p) {
  int pack;
  __builtin_memcpy(&pack, query + p * 4, sizeof pack);
  return pack;
}

// Rows of one block that pass, for `kQueries` queries: 16 bits each.
template <int kQueries>
inline void screen_block(const uint8_t* const* queries, const int32_t* thresholds,
                         const int8_t* codes, const int32_t* bias, int64_t packs, unsigned* masks) {
  __m256i sums[kQueries][2];
  for (int half = 0; half < 2; ++half) {
    const __m256i halved = _mm256_srai_epi32(
        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bias + half * 8)), kQueryStep / 2);
    const __m256i start = _mm256_sub_epi32(_mm256_setzero_si256(), halved);
    for (int q = 0; q < kQueries; ++q) sums[q][half] = start;
  }
  for (int64_t p = 0; p < packs; ++p) {
    const auto* values = reinterpret_cast<const __m256i*>(codes + p * 64);
    const __m256i low = _mm256_loadu_si256(values);
    const __m256i high = _mm256_loadu_si256(values + 1);
#pragma GCC unroll 4
    for (int q = 0; q < kQueries; ++q) {
      const __m256i query = _mm256_set1_epi32(broadcast_pack(queries[q], p));
      sums[q][0] = add_products(sums[q][0], query, low);
      sums[q][1] = add_products(sums[q][1], query, high);
    }
  }
  for (int q = 0; q < kQueries; ++q) {
    const __m256i threshold = _mm256_set1_epi32(thresholds[q]);
    unsigned below = 0;
    for (int half = 0; half < 2; ++half) {
      const __m256i less = _mm256_cmpgt_epi32(threshold, sums[q][half]);
      below |= static_cast<unsigned>(_mm256_movemask_ps(_mm256_castsi256_ps(less))) << (8 * half);
    }
    masks[q] = ~below & 0xffffu;
  }
}

void avx2_screen_tile(const uint8_t* const* queries, const int32_t* thresholds, int num_queries,
                      const int8_t* codes, const int32_t* bias, int64_t packs, uint64_t* masks) {
  for (int q = 0; q < num_queries; ++q) masks[q] = 0;
  for (int b = 0; b < kTileBlocks; ++b) {
    const int8_t* block = codes + b * packs * 64;
    unsigned found[kTileQueries];
    int q = 0;
    for (; q + 3 <= num_queries; q += 3) {
      screen_block<3>(queries + q, thresholds + q, block, bias + b * kLanes, packs, found + q);
    }
    for (; q < num_queries; ++q) {
      screen_block<1>(queries + q, thresholds + q, block, bias + b * kLanes, packs, found + q);
    }
    for (q = 0; q < num_queries; ++q) masks[q] |= uint64_t{found[q]} << (kLanes * b);
  }
}

bool avx2_screen_blocks(const uint8_t* query, int32_t threshold, const int8_t* codes,
                        const int32_t* bias, int64_t packs, int64_t blocks, uint16_t* masks) {
  unsigned any = 0;
  for (int64_t b = 0; b < blocks; ++b) {
    unsigned mask;
    screen_block<1>(&query, &threshold, codes + b * packs * 64, bias + b * kLanes, packs, &mask);
    masks[b] = static_cast<uint16_t>(mask);
    any |= mask;
  }
  return any != 0;
}

uint16_t avx2_screen_block(const uint8_t* query, int32_t threshold, const int8_t* codes,
                           const int32_t* bias, int64_t packs) {
  uint16_t mask;
  avx2_screen_blocks(query, threshold, codes, bias, packs, 1, &mask);
  return mask;
}

}  // namespace

const SearchKernels& avx2_kernels() {
  static const SearchKernels kernels = {"avx2",
                                        kQueryStep,
                                        avx2_squared_distances,
                                        distance_tile_by_rows<distances_to_run>,
                                        avx2_products,
                                        avx2_encode,
                                        avx2_largest_difference,
                                        avx2_screen_tile,
                                        screen_batch_by_tiles<avx2_screen_tile>,
                                        avx2_screen_blocks,
                                        screen_masked_by_blocks<avx2_screen_block>,
                                        generic_closest_codes,
                                        generic_tile_distances,
                                        generic_keep_clusters,
                                        generic_count_below};
  return kernels;
}

}  // namespace psvdd::cpu

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif  // PSVDD_X86
