// Canonical squared distances with AVX-512: the sixteen partial sums are the lanes of a register.
// search_kernels_avx512.cpp includes this for its target.

namespace psvdd::cpu {
namespace {

template <bool kHalf>
inline __m512 load_sixteen(const void* data, int64_t element) {
  if constexpr (kHalf) {
    const auto* halves = static_cast<const Half*>(data) + element;
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(halves)));
  } else {
    return _mm512_loadu_ps(static_cast<const float*>(data) + element);
  }
}

// The first lanes of `mask` only, zero beyond.
template <bool kHalf>
inline __m512 load_some(__mmask16 mask, const void* data, int64_t element) {
  if constexpr (kHalf) {
    return _mm512_cvtph_ps(
        _mm256_maskz_loadu_epi16(mask, static_cast<const Half*>(data) + element));
  } else {
    return _mm512_maskz_loadu_ps(mask, static_cast<const float*>(data) + element);
  }
}

inline float canonical_sum(__m512 sums) {
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(sums), _mm512_extractf32x8_ps(sums, 1));
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}

// The canonical sums of sixteen rows at once: a transposing tree, row r in lane r.
inline __m512 canonical_sums(const __m512* sums) {
  // In the end lane 4 * l + e holds the e-th input of the l-th quarter, so rows are taken in the
  // order in which they shall come out.
  __m512 eights[8], fours[4], twos[2];
  constexpr int kOrder[16] = {0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15};
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {  // halves of two rows side by side: acc[i] + acc[i + 8]
    const __m512 a = sums[kOrder[2 * i]], b = sums[kOrder[2 * i + 1]];
    eights[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {  // quarters of four rows: + 4
    const __m512 a = eights[2 * i], b = eights[2 * i + 1];
    fours[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {  // + 2
    const __m512 a = fours[2 * i], b = fours[2 * i + 1];
    twos[i] = _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));
  }
  return _mm512_add_ps(_mm512_shuffle_ps(twos[0], twos[1], 0x88),
                       _mm512_shuffle_ps(twos[0], twos[1], 0xdd));  // + 1
}

// Adds the squares of kSteps * 16 differences of each row, from coordinate `j` on. The query stays
// in registers, so that per row there is one address to find and nothing else to load.
template <int kRows, int kSteps, bool kHalf>
inline void add_squares(const Rows& bank, const float* query, const int64_t* rows, int64_t j,
                        __m512* sums) {
  __m512 values[kSteps];
#pragma GCC unroll 4
  for (int i = 0; i < kSteps; ++i) values[i] = _mm512_loadu_ps(query + j + i * kLanes);
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    const int64_t start = rows[r] * bank.dim + j;
#pragma GCC unroll 4
    for (int i = 0; i < kSteps; ++i) {
      const __m512 difference =
          _mm512_sub_ps(values[i], load_sixteen<kHalf>(bank.data, start + i * kLanes));
      sums[r] = _mm512_fmadd_ps(difference, difference, sums[r]);
    }
  }
}

template <int kRows, bool kHalf>
inline void distances_to(const Rows& bank, const float* query, const int64_t* rows,
                         float* squared) {
  constexpr int kSteps = 4;
  __m512 sums[kRows];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) sums[r] = _mm512_setzero_ps();
  int64_t j = 0;
  for (; j + kSteps * kLanes <= bank.dim; j += kSteps * kLanes) {
    add_squares<kRows, kSteps, kHalf>(bank, query, rows, j, sums);
  }
  for (; j + kLanes <= bank.dim; j += kLanes) {
    add_squares<kRows, 1, kHalf>(bank, query, rows, j, sums);
  }
  if (j < bank.dim) {
    const auto mask = static_cast<__mmask16>((1u << (bank.dim - j)) - 1);
    const __m512 values = _mm512_maskz_loadu_ps(mask, query + j);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const __m512 difference =
          _mm512_sub_ps(values, load_some<kHalf>(mask, bank.data, rows[r] * bank.dim + j));
      sums[r] = _mm512_fmadd_ps(difference, difference, sums[r]);
    }
  }
  if constexpr (kRows == kLanes) {
    _mm512_storeu_ps(squared, canonical_sums(sums));
  } else {
    for (int r = 0; r < kRows; ++r) squared[r] = canonical_sum(sums[r]);
  }
}

template <bool kHalf>
inline void distances_of(const Rows& bank, const float* query, const int64_t* rows, int count,
                         float* squared) {
  if (count == kLanes) {
    distances_to<kLanes, kHalf>(bank, query, rows, squared);
    return;
  }
  int r = 0;
  for (; r + 4 <= count; r += 4) distances_to<4, kHalf>(bank, query, rows + r, squared + r);
  for (; r < count; ++r) distances_to<1, kHalf>(bank, query, rows + r, squared + r);
}

void avx512_squared_distances(const Rows& bank, const float* query, const int64_t* rows, int count,
                              float* squared) {
  (bank.half ? distances_of<true> : distances_of<false>)(bank, query, rows, count, squared);
}

// As `distances_to` for sixteen rows, one after the other: for rows that come from memory, which is
// fastest in its own order.
template <bool kHalf>
inline void distances_in_order(const Rows& bank, const float* query, const int64_t* rows,
                               float* squared) {
  __m512 sums[kLanes];
  const auto mask = static_cast<__mmask16>((1u << (bank.dim % kLanes)) - 1);
  for (int r = 0; r < kLanes; ++r) {
    const int64_t start = rows[r] * bank.dim;
    __m512 sum = _mm512_setzero_ps();
    int64_t j = 0;
    for (; j + kLanes <= bank.dim; j += kLanes) {
      const __m512 difference =
          _mm512_sub_ps(_mm512_loadu_ps(query + j), load_sixteen<kHalf>(bank.data, start + j));
      sum = _mm512_fmadd_ps(difference, difference, sum);
    }
    if (mask != 0) {
      const __m512 difference = _mm512_sub_ps(_mm512_maskz_loadu_ps(mask, query + j),
                                              load_some<kHalf>(mask, bank.data, start + j));
      sum = _mm512_fmadd_ps(difference, difference, sum);
    }
    sums[r] = sum;
  }
  _mm512_storeu_ps(squared, canonical_sums(sums));
}

// Distances to consecutive rows; those of the last row once more, up to a multiple of 16.
// is_fresh: the rows have not been read before.
inline void distances_to_run(const Rows& bank, const float* query, int64_t first, int count,
                             bool is_fresh, float* squared) {
  for (int r = 0; r < count; r += kLanes) {
    int64_t rows[kLanes];
    for (int i = 0; i < kLanes; ++i) rows[i] = first + std::min(r + i, count - 1);
    if (is_fresh) {
      (bank.half ? distances_in_order<true> : distances_in_order<false>)(bank, query, rows,
                                                                         squared + r);
      continue;
    }
    (bank.half ? distances_to<kLanes, true> : distances_to<kLanes, false>)(bank, query, rows,
                                                                           squared + r);
  }
}

}  // namespace
}  // namespace psvdd::cpu
