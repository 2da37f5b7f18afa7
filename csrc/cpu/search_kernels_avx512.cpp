// The search kernels for AVX-512 (F, BW, DQ, VL) with VNNI: a register is a block of 16 rows.

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
#pragma clang attribute push(                                                          \
    __attribute__((target("f16c,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("f16c,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")
#endif

#include "search_kernels_avx512_distances.h"
#include "search_kernels_rows.h"

namespace psvdd::cpu {
namespace {

// Columns [first, first + 8 kRegisters) of the products.
template <int kRegisters>
inline void products_of(const double* vector, const float* matrix, int64_t dims, int64_t columns,
                        double* result) {
  __m512d sums[kRegisters] = {};
  for (int64_t j = 0; j < dims; ++j, matrix += columns) {
    const __m512d value = _mm512_set1_pd(vector[j]);
#pragma GCC unroll 8
    for (int i = 0; i < kRegisters; ++i) {
      const __m512d row = _mm512_cvtps_pd(_mm256_loadu_ps(matrix + 8 * i));
      sums[i] = _mm512_fmadd_pd(value, row, sums[i]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRegisters; ++i) _mm512_storeu_pd(result + 8 * i, sums[i]);
}

void avx512_products(const double* vector, const float* matrix, int64_t dims, int64_t columns,
                     double* result) {
  int64_t first = 0;
  for (; first + 64 <= columns; first += 64) {
    products_of<8>(vector, matrix + first, dims, columns, result + first);
  }
  for (; first < columns; first += kLanes) {
    products_of<2>(vector, matrix + first, dims, columns, result + first);
  }
}

Encoding avx512_encode(const float* vector, const float* centre, int64_t dims, float scale,
                       int limit, int offset, uint8_t* code) {
  const __m512 inverse = _mm512_set1_ps(1.0f / scale), step = _mm512_set1_ps(scale);
  const __m512 largest = _mm512_set1_ps(static_cast<float>(limit));
  const __m512 smallest = _mm512_set1_ps(static_cast<float>(-limit));
  const __m512i shift = _mm512_set1_epi32(offset);
  __m512i code_squares = _mm512_setzero_si512();
  __m512 residual = _mm512_setzero_ps(), squared = residual;
  for (int64_t j = 0; j < dims; j += kLanes) {
    const __m512 t = _mm512_sub_ps(_mm512_loadu_ps(vector + j), _mm512_loadu_ps(centre + j));
    const __m512 clamped =
        _mm512_max_ps(_mm512_min_ps(_mm512_mul_ps(t, inverse), largest), smallest);
    const __m512i rounded = _mm512_cvtps_epi32(clamped);
    const __m512 value = _mm512_cvtepi32_ps(rounded);
    const __m512 rest = _mm512_fnmadd_ps(step, value, t);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(code + j),
                     _mm512_cvtepi32_epi8(_mm512_add_epi32(rounded, shift)));
    code_squares = _mm512_add_epi32(code_squares, _mm512_mullo_epi32(rounded, rounded));
    residual = _mm512_fmadd_ps(rest, rest, residual);
    squared = _mm512_fmadd_ps(t, t, squared);
  }
  return {_mm512_reduce_add_epi32(code_squares), _mm512_reduce_add_ps(residual),
          _mm512_reduce_add_ps(squared)};
}

float avx512_largest_difference(const float* vector, const float* centre, int64_t dims) {
  __m512 largest = _mm512_setzero_ps();
  for (int64_t j = 0; j < dims; j += kLanes) {
    const __m512 difference =
        _mm512_sub_ps(_mm512_loadu_ps(vector + j), _mm512_loadu_ps(centre + j));
    largest = _mm512_max_ps(_mm512_abs_ps(difference), largest);
  }
  return _mm512_reduce_max_ps(largest);
}

// sum += the four products of unsigned and signed bytes in each 32-bit lane. In assembly, since GCC
// 12 keeps the intrinsic's sum in the lower sixteen registers and moves it there and back.
inline void add_products(__m512i* sum, __m512i query, __m512i codes) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(*sum) : "v"(query), "v"(codes));
}

inline __m512i broadcast_pack(const uint8_t* query, int64_t p) {
  int pack;
  __builtin_memcpy(&pack, query + p * 4, sizeof pack);
  return _mm512_set1_epi32(pack);
}

// Sums over one block for one query, in four chains of products, so that they do not wait for each
// other.
inline __m512i block_sums(const uint8_t* query, const int8_t* codes, const int32_t* bias,
                          int64_t packs) {
  constexpr int kChains = 4;
  __m512i sums[kChains] = {};
  sums[0] = _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_loadu_si512(bias));
  int64_t p = 0;
  for (; p + kChains <= packs; p += kChains) {
#pragma GCC unroll 4
    for (int i = 0; i < kChains; ++i) {
      add_products(&sums[i], broadcast_pack(query, p + i),
                   _mm512_loadu_si512(codes + (p + i) * 64));
    }
  }
  for (; p < packs; ++p) {
    add_products(&sums[0], broadcast_pack(query, p), _mm512_loadu_si512(codes + p * 64));
  }
  return _mm512_add_epi32(_mm512_add_epi32(sums[0], sums[1]), _mm512_add_epi32(sums[2], sums[3]));
}

// Which rows of one block pass.
inline uint16_t screen_block(const uint8_t* query, int32_t threshold, const int8_t* codes,
                             const int32_t* bias, int64_t packs) {
  return _mm512_cmpge_epi32_mask(block_sums(query, codes, bias, packs),
                                 _mm512_set1_epi32(threshold));
}

template <int kQueries>
inline void screen_queries(const uint8_t* const* queries, const int32_t* thresholds,
                           const int8_t* codes, const int32_t* bias, int64_t packs,
                           uint64_t* masks) {
  __m512i sums[kQueries][kTileBlocks];
#pragma GCC unroll 4
  for (int b = 0; b < kTileBlocks; ++b) {
    const __m512i start =
        _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_loadu_si512(bias + b * kLanes));
#pragma GCC unroll 6
    for (int q = 0; q < kQueries; ++q) sums[q][b] = start;
  }
  const int64_t block_bytes = packs * 64;
  for (int64_t p = 0; p < packs; ++p) {
    __m512i values[kTileBlocks];
#pragma GCC unroll 4
    for (int b = 0; b < kTileBlocks; ++b) {
      values[b] = _mm512_loadu_si512(codes + b * block_bytes + p * 64);
    }
#pragma GCC unroll 6
    for (int q = 0; q < kQueries; ++q) {
      const __m512i query = broadcast_pack(queries[q], p);
#pragma GCC unroll 4
      for (int b = 0; b < kTileBlocks; ++b) {
        add_products(&sums[q][b], query, values[b]);
      }
    }
  }
#pragma GCC unroll 6
  for (int q = 0; q < kQueries; ++q) {
    // Mostly no row passes: one comparison with the largest of the four tells.
    const __m512i threshold = _mm512_set1_epi32(thresholds[q]);
    const __m512i largest = _mm512_max_epi32(_mm512_max_epi32(sums[q][0], sums[q][1]),
                                             _mm512_max_epi32(sums[q][2], sums[q][3]));
    uint64_t mask = 0;
    if (_mm512_cmpge_epi32_mask(largest, threshold) != 0) {
#pragma GCC unroll 4
      for (int b = 0; b < kTileBlocks; ++b) {
        mask |= uint64_t{_mm512_cmpge_epi32_mask(sums[q][b], threshold)} << (kLanes * b);
      }
    }
    masks[q] = mask;
  }
}

void avx512_screen_tile(const uint8_t* const* queries, const int32_t* thresholds, int num_queries,
                        const int8_t* codes, const int32_t* bias, int64_t packs, uint64_t* masks) {
  static_assert(kTileQueries == 6, "one case per number of queries");
  switch (num_queries) {
    case 1:
      return screen_queries<1>(queries, thresholds, codes, bias, packs, masks);
    case 2:
      return screen_queries<2>(queries, thresholds, codes, bias, packs, masks);
    case 3:
      return screen_queries<3>(queries, thresholds, codes, bias, packs, masks);
    case 4:
      return screen_queries<4>(queries, thresholds, codes, bias, packs, masks);
    case 5:
      return screen_queries<5>(queries, thresholds, codes, bias, packs, masks);
    default:
      return screen_queries<6>(queries, thresholds, codes, bias, packs, masks);
  }
}

// Few packs: the query stays in registers and the codes are read once.
template <int kPacks>
inline bool screen_short(const uint8_t* query, int32_t threshold, const int8_t* codes,
                         const int32_t* bias, int64_t blocks, uint16_t* masks) {
  __m512i values[kPacks];
#pragma GCC unroll 8
  for (int p = 0; p < kPacks; ++p) values[p] = broadcast_pack(query, p);
  const __m512i least = _mm512_set1_epi32(threshold);
  unsigned any = 0;
  for (int64_t b = 0; b < blocks; ++b) {
    // Two chains, so that the products do not wait for each other.
    __m512i even = _mm512_setzero_si512(), odd = even;
#pragma GCC unroll 8
    for (int p = 0; p < kPacks; ++p) {
      add_products(p % 2 ? &odd : &even, values[p],
                   _mm512_loadu_si512(codes + (b * kPacks + p) * 64));
    }
    const __m512i sum =
        _mm512_sub_epi32(_mm512_add_epi32(even, odd), _mm512_loadu_si512(bias + b * kLanes));
    const __mmask16 mask = _mm512_cmpge_epi32_mask(sum, least);
    masks[b] = mask;
    any |= mask;
  }
  return any != 0;
}

bool avx512_screen_blocks(const uint8_t* query, int32_t threshold, const int8_t* codes,
                          const int32_t* bias, int64_t packs, int64_t blocks, uint16_t* masks) {
  switch (packs) {
    case 2:
      return screen_short<2>(query, threshold, codes, bias, blocks, masks);
    case 3:
      return screen_short<3>(query, threshold, codes, bias, blocks, masks);
    case 4:
      return screen_short<4>(query, threshold, codes, bias, blocks, masks);
    case 6:
      return screen_short<6>(query, threshold, codes, bias, blocks, masks);
    case 8:
      return screen_short<8>(query, threshold, codes, bias, blocks, masks);
    default:
      break;
  }
  uint64_t any = 0;
  int64_t b = 0;
  for (; b + kTileBlocks <= blocks; b += kTileBlocks) {
    uint64_t mask;
    screen_queries<1>(&query, &threshold, codes + b * packs * 64, bias + b * kLanes, packs, &mask);
    __builtin_memcpy(masks + b, &mask, sizeof mask);
    any |= mask;
  }
  for (; b < blocks; ++b) {
    masks[b] = screen_block(query, threshold, codes + b * packs * 64, bias + b * kLanes, packs);
    any |= masks[b];
  }
  return any != 0;
}

void avx512_closest_codes(const uint8_t* query, const int8_t* codes, const int32_t* bias,
                          int64_t packs, int64_t blocks, int32_t* block_of_lane) {
  __m512i largest = _mm512_set1_epi32(INT32_MIN), block = _mm512_setzero_si512();
  for (int64_t b = 0; b < blocks; ++b) {
    const __m512i sum = block_sums(query, codes + b * packs * 64, bias + b * kLanes, packs);
    const __mmask16 more = _mm512_cmpgt_epi32_mask(sum, largest);
    largest = _mm512_mask_mov_epi32(largest, more, sum);
    block = _mm512_mask_mov_epi32(block, more, _mm512_set1_epi32(static_cast<int>(b)));
  }
  _mm512_storeu_si512(block_of_lane, block);
}

int64_t avx512_tile_distances(const float* point, const float* tiles, int64_t dims,
                              int64_t num_tiles, float* squared) {
  __m512 least = _mm512_set1_ps(INFINITY);
  __m512i tile_of_least = _mm512_setzero_si512();
  int64_t tile = 0;
  const int64_t tile_floats = dims * kLanes;
  for (; tile + 4 <= num_tiles; tile += 4) {
    __m512 sums[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(),
                      _mm512_setzero_ps()};
    for (int64_t j = 0; j < dims; ++j) {
      const __m512 value = _mm512_set1_ps(point[j]);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const __m512 difference =
            _mm512_sub_ps(value, _mm512_loadu_ps(tiles + (tile + i) * tile_floats + j * kLanes));
        sums[i] = _mm512_fmadd_ps(difference, difference, sums[i]);
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      _mm512_storeu_ps(squared + (tile + i) * kLanes, sums[i]);
      const __mmask16 less = _mm512_cmp_ps_mask(sums[i], least, _CMP_LT_OQ);
      least = _mm512_mask_mov_ps(least, less, sums[i]);
      tile_of_least =
          _mm512_mask_mov_epi32(tile_of_least, less, _mm512_set1_epi32(static_cast<int>(tile) + i));
    }
  }
  for (; tile < num_tiles; ++tile) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t j = 0; j < dims; ++j) {
      const __m512 difference = _mm512_sub_ps(
          _mm512_set1_ps(point[j]), _mm512_loadu_ps(tiles + tile * tile_floats + j * kLanes));
      sum = _mm512_fmadd_ps(difference, difference, sum);
    }
    _mm512_storeu_ps(squared + tile * kLanes, sum);
    const __mmask16 less = _mm512_cmp_ps_mask(sum, least, _CMP_LT_OQ);
    least = _mm512_mask_mov_ps(least, less, sum);
    tile_of_least =
        _mm512_mask_mov_epi32(tile_of_least, less, _mm512_set1_epi32(static_cast<int>(tile)));
  }
  float values[kLanes];
  int32_t tiles_of[kLanes];
  _mm512_storeu_ps(values, least);
  _mm512_storeu_si512(tiles_of, tile_of_least);
  int lane = 0;
  for (int r = 1; r < kLanes; ++r) lane = values[r] < values[lane] ? r : lane;
  return int64_t{tiles_of[lane]} * kLanes + lane;
}

int64_t avx512_keep_clusters(const ClusterBounds& bounds, const float* squared, int64_t clusters,
                             int32_t* kept) {
  const __m512 low = _mm512_set1_ps(1.0f - bounds.rounding);
  const __m512 high = _mm512_set1_ps(1.0f + bounds.rounding);
  const __m512 limit = _mm512_set1_ps(bounds.limit);
  const __m512 own = _mm512_set1_ps(bounds.own * (1.0f + bounds.rounding));
  const __m512 twice_rounding = _mm512_set1_ps(2 * bounds.rounding);
  const __m512 two = _mm512_set1_ps(2.0f);
  const __m512 least = _mm512_set1_ps(kLeastSquared);
  __m512i index = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  int64_t count = 0;
  for (int64_t c = 0; c < clusters; c += kLanes) {
    const auto valid =
        static_cast<__mmask16>(clusters - c < kLanes ? (1u << (clusters - c)) - 1 : 0xffff);
    const __m512 reach = _mm512_maskz_loadu_ps(valid, bounds.reach + c);
    const __m512 slack = _mm512_maskz_loadu_ps(valid, bounds.slack + c);
    const __m512 radius = _mm512_add_ps(limit, reach);
    const __m512 at_least = _mm512_mul_ps(_mm512_loadu_ps(squared + c), low);
    const __mmask16 beyond_radius =
        _mm512_cmp_ps_mask(at_least, _mm512_mul_ps(radius, radius), _CMP_GT_OQ);
    const __m512 at_most =
        _mm512_add_ps(own, _mm512_mul_ps(_mm512_mul_ps(twice_rounding, reach), reach));
    const __m512 width = _mm512_mul_ps(_mm512_mul_ps(two, _mm512_add_ps(limit, slack)),
                                       _mm512_loadu_ps(bounds.gaps + c));
    const __mmask16 beyond_half_plane = _mm512_cmp_ps_mask(_mm512_sub_ps(at_least, at_most),
                                                           _mm512_mul_ps(width, high), _CMP_GT_OQ);
    const __mmask16 certain = _mm512_cmp_ps_mask(at_least, least, _CMP_GT_OQ);
    const auto keep =
        static_cast<__mmask16>(valid & ~(certain & (beyond_radius | beyond_half_plane)));
    // Compressed in a register: storing compressed lanes directly is slow on some processors.
    _mm512_storeu_si512(kept + count, _mm512_maskz_compress_epi32(keep, index));
    count += __builtin_popcount(keep);
    index = _mm512_add_epi32(index, _mm512_set1_epi32(kLanes));
  }
  return count;
}

int64_t avx512_count_below(const float* ascending, int64_t count, float value) {
  const __m512 limit = _mm512_set1_ps(value);
  int64_t below = 0;
  for (int64_t i = 0; i < count; i += kLanes) {
    const auto mask = static_cast<__mmask16>(count - i < kLanes ? (1u << (count - i)) - 1 : 0xffff);
    below += __builtin_popcount(_mm512_mask_cmp_ps_mask(
        mask, _mm512_maskz_loadu_ps(mask, ascending + i), limit, _CMP_LT_OQ));
  }
  return below;
}

}  // namespace

const SearchKernels& avx512_kernels() {
  static const SearchKernels kernels = {"avx512",
                                        1,
                                        avx512_squared_distances,
                                        distance_tile_by_rows<distances_to_run>,
                                        avx512_products,
                                        avx512_encode,
                                        avx512_largest_difference,
                                        avx512_screen_tile,
                                        screen_batch_by_tiles<avx512_screen_tile>,
                                        avx512_screen_blocks,
                                        screen_masked_by_blocks<screen_block>,
                                        avx512_closest_codes,
                                        avx512_tile_distances,
                                        avx512_keep_clusters,
                                        avx512_count_below};
  return kernels;
}

}  // namespace psvdd::cpu

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif  // PSVDD_X86
