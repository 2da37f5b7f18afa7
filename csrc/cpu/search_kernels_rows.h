// The plain search of a tile of rows with 256-bit registers, for AVX2 and AVX-512. Embeddings of up
// to 16 dimensions lie with eight rows side by side in a register, so that no lane is idle and
// nothing has to be added up across a register. Each source file that includes this compiles it for
// its own target, hence the unnamed namespace.

namespace psvdd::cpu {
namespace {

// `kDim` <= 8 values of a row from element `start` on, zero beyond; reads nothing else.
template <int kDim, bool kHalf>
inline __m256 load_values(const void* data, int64_t start) {
  if constexpr (kHalf) {
    Half halves[8] = {};
    __builtin_memcpy(halves, static_cast<const Half*>(data) + start, kDim * sizeof(Half));
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(halves)));
  } else {
    const float* floats = static_cast<const float*>(data) + start;
    if constexpr (kDim == 8) return _mm256_loadu_ps(floats);
    if constexpr (kDim == 4) return _mm256_castps128_ps256(_mm_loadu_ps(floats));
    const __m256i mask =
        _mm256_cmpgt_epi32(_mm256_set1_epi32(kDim), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    return _mm256_maskload_ps(floats, mask);
  }
}

// Transposes up to eight values of eight rows: columns[j * kTileRows + r] = value j of row r.
template <int kDim, bool kHalf>
inline void transpose_eight(const void* data, const int64_t* starts, float* columns) {
  __m256 rows[8], pairs[8];
#pragma GCC unroll 8
  for (int r = 0; r < 8; ++r) rows[r] = load_values<kDim, kHalf>(data, starts[r]);
  // Rows r and r + 4 share a register; its halves are transposed as 4 x 4 values each.
#pragma GCC unroll 2
  for (int half = 0; half < (kDim + 3) / 4; ++half) {
    __m256 fours[4];
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
      fours[r] = half == 0 ? _mm256_permute2f128_ps(rows[r], rows[r + 4], 0x20)
                           : _mm256_permute2f128_ps(rows[r], rows[r + 4], 0x31);
    }
    pairs[0] = _mm256_unpacklo_ps(fours[0], fours[1]);
    pairs[1] = _mm256_unpackhi_ps(fours[0], fours[1]);
    pairs[2] = _mm256_unpacklo_ps(fours[2], fours[3]);
    pairs[3] = _mm256_unpackhi_ps(fours[2], fours[3]);
    const __m256 turned[4] = {
        _mm256_shuffle_ps(pairs[0], pairs[2], 0x44), _mm256_shuffle_ps(pairs[0], pairs[2], 0xee),
        _mm256_shuffle_ps(pairs[1], pairs[3], 0x44), _mm256_shuffle_ps(pairs[1], pairs[3], 0xee)};
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      if (4 * half + j < kDim) _mm256_storeu_ps(columns + (4 * half + j) * kTileRows, turned[j]);
    }
  }
}

// A tile of rows [first, first + count) as columns [kDim, kTileRows]; the last row fills it up.
template <int kDim, bool kHalf>
inline void load_columns(const Rows& bank, int64_t first, int count, float* columns) {
  for (int r = 0; r < count; r += 8) {
    int64_t starts[8];
    for (int i = 0; i < 8; ++i) starts[i] = (first + std::min(r + i, count - 1)) * kDim;
    if constexpr (kDim <= 8) {
      transpose_eight<kDim, kHalf>(bank.data, starts, columns + r);
    } else {
      transpose_eight<8, kHalf>(bank.data, starts, columns + r);
      for (int64_t& start : starts) start += 8;
      transpose_eight<kDim - 8, kHalf>(bank.data, starts, columns + 8 * kTileRows + r);
    }
  }
}

// The canonical sum over the coordinates j, j + kStep, j + 2 kStep, ... below 16: up to there each
// partial sum is one square, and absent ones, zeros, change nothing.
template <int kDim, int kStep, int kFirst>
inline __m256 canonical_tree(const float* query, const float* columns) {
  if constexpr (kStep == kLanes) {
    const __m256 difference = _mm256_sub_ps(_mm256_broadcast_ss(query + kFirst),
                                            _mm256_loadu_ps(columns + kFirst * kTileRows));
    return _mm256_mul_ps(difference, difference);
  } else if constexpr (kFirst + kStep >= kDim) {
    return canonical_tree<kDim, 2 * kStep, kFirst>(query, columns);
  } else {
    return _mm256_add_ps(canonical_tree<kDim, 2 * kStep, kFirst>(query, columns),
                         canonical_tree<kDim, 2 * kStep, kFirst + kStep>(query, columns));
  }
}

inline bool all_finite(__m256 total) {
  return _mm256_movemask_ps(_mm256_cmp_ps(total, _mm256_set1_ps(INFINITY), _CMP_NLT_UQ)) == 0;
}

// The rows of a tile [kTileRows] whose distance is at most `limit`.
inline uint64_t rows_within(const float* squared, int count, float limit) {
  uint64_t mask = 0;
  for (int r = 0; r < count; r += 8) {
    const __m256 within =
        _mm256_cmp_ps(_mm256_loadu_ps(squared + r), _mm256_set1_ps(limit), _CMP_LE_OQ);
    mask |= uint64_t{static_cast<unsigned>(_mm256_movemask_ps(within))} << r;
  }
  return count == kTileRows ? mask : mask & ((uint64_t{1} << count) - 1);
}

template <int kDim, bool kHalf>
bool low_distance_tile(const Rows& bank, int64_t first, int count, const float* queries,
                       int num_queries, const float* limits, float* squared, uint64_t* masks) {
  alignas(32) float columns[kDim * kTileRows];
  load_columns<kDim, kHalf>(bank, first, count, columns);
  __m256 total = _mm256_setzero_ps();  // infinite or NaN if one of the distances is
  for (int q = 0; q < num_queries; ++q, squared += kTileRows) {
    __m256 least = _mm256_set1_ps(INFINITY);
#pragma GCC unroll 2
    for (int r = 0; r < count; r += 8) {
      const __m256 sums = canonical_tree<kDim, 1, 0>(queries + q * kDim, columns + r);
      _mm256_storeu_ps(squared + r, sums);
      total = _mm256_add_ps(total, sums);
      least = _mm256_min_ps(sums, least);
    }
    // Mostly no row is near enough: one comparison with the least of each lane tells.
    const __m256 within = _mm256_cmp_ps(least, _mm256_set1_ps(limits[q]), _CMP_LE_OQ);
    masks[q] = _mm256_movemask_ps(within) == 0 ? 0 : rows_within(squared, count, limits[q]);
  }
  return all_finite(total);
}

// Looks through the distances of a tile that have been computed.
inline bool mark_near_rows(const float* squared, int count, float limit, uint64_t* mask) {
  __m256 total = _mm256_setzero_ps();
  for (int r = 0; r < count; r += 8) total = _mm256_add_ps(total, _mm256_loadu_ps(squared + r));
  *mask = rows_within(squared, count, limit);
  return all_finite(total);
}

using DistanceTile = bool (*)(const Rows&, int64_t, int, const float*, int, const float*, float*,
                              uint64_t*);

// One function per dimension: [dim - 1][half].
template <int... kDims>
inline DistanceTile low_tile_of(int64_t dim, bool half, std::integer_sequence<int, kDims...>) {
  static constexpr DistanceTile kTiles[][2] = {
      {low_distance_tile<kDims + 1, false>, low_distance_tile<kDims + 1, true>}...};
  return kTiles[dim - 1][half];
}

// `SearchKernels::distance_tile`; kWide(bank, query, first, count, is_fresh, squared) computes the
// distances of longer embeddings, at most 15 rows of no tile too many.
template <auto kWide>
bool distance_tile_by_rows(const Rows& bank, int64_t first, int count, const float* queries,
                           int num_queries, const float* limits, float* squared, uint64_t* masks) {
  if (bank.dim <= kLanes) {
    return low_tile_of(bank.dim, bank.half, std::make_integer_sequence<int, kLanes>())(
        bank, first, count, queries, num_queries, limits, squared, masks);
  }
  bool finite = true;
  for (int q = 0; q < num_queries; ++q, squared += kTileRows) {
    kWide(bank, queries + q * bank.dim, first, count, q == 0, squared);
    finite &= mark_near_rows(squared, count, limits[q], &masks[q]);
  }
  return finite;
}

}  // namespace
}  // namespace psvdd::cpu
