// Kernels in plain C++, for every instruction set that does not bring its own. Each source file
// that includes this compiles it for its own target, hence the unnamed namespace.

namespace psvdd::cpu {
namespace {

// Sixteen values starting at `j` of a row, zero beyond its end (which adds nothing to a sum).
inline void load_lanes(const Rows& bank, int64_t row, int64_t j, float* lanes) {
  const int64_t count = bank.dim - j < kLanes ? bank.dim - j : kLanes;
  const int64_t start = row * bank.dim + j;
  for (int64_t i = 0; i < count; ++i) {
    lanes[i] = bank.half ? to_float(static_cast<const Half*>(bank.data)[start + i])
                         : static_cast<const float*>(bank.data)[start + i];
  }
  for (int64_t i = count; i < kLanes; ++i) lanes[i] = 0.0f;
}

inline void generic_squared_distances(const Rows& bank, const float* query, const int64_t* rows,
                                      int count, float* squared) {
  for (int r = 0; r < count; ++r) {
    float sums[kLanes] = {};
    float lanes[kLanes];
    for (int64_t j = 0; j < bank.dim; j += kLanes) {
      load_lanes(bank, rows[r], j, lanes);
      const int64_t left = bank.dim - j < kLanes ? bank.dim - j : kLanes;
      for (int64_t i = 0; i < left; ++i) {
        const float difference = query[j + i] - lanes[i];
        sums[i] = std::fma(difference, difference, sums[i]);
      }
    }
    for (int half = kLanes / 2; half >= 1; half /= 2) {
      for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
    }
    squared[r] = sums[0];
  }
}

inline bool generic_distance_tile(const Rows& bank, int64_t first, int count, const float* queries,
                                  int num_queries, const float* limits, float* squared,
                                  uint64_t* masks) {
  bool finite = true;
  for (int q = 0; q < num_queries; ++q, squared += kTileRows) {
    masks[q] = 0;
    for (int r = 0; r < count; ++r) {
      const int64_t row = first + r;
      generic_squared_distances(bank, queries + q * bank.dim, &row, 1, squared + r);
      masks[q] |= uint64_t{squared[r] <= limits[q]} << r;
      finite &= squared[r] < INFINITY;
    }
  }
  return finite;
}

inline Encoding generic_encode(const float* vector, const float* centre, int64_t dims, float scale,
                               int limit, int offset, uint8_t* code) {
  int32_t code_squares[kLanes] = {};
  float residual[kLanes] = {}, squared[kLanes] = {};
  const float inverse = 1.0f / scale;
  const auto largest = static_cast<float>(limit);
  for (int64_t j = 0; j < dims; j += kLanes) {
    for (int i = 0; i < kLanes; ++i) {
      const float t = vector[j + i] - centre[j + i];
      float scaled = t * inverse;
      scaled = scaled < largest ? scaled : largest;
      scaled = scaled > -largest ? scaled : -largest;
      // To the nearest integer, by adding and taking away 1.5 * 2^23.
      const float rounded = (scaled + 12582912.0f) - 12582912.0f;
      // Not an fma: the product of a float and a small integer may round. The caller allows for it.
      const float rest = t - scale * rounded;
      const auto integer = static_cast<int32_t>(rounded);
      code[j + i] = static_cast<uint8_t>(integer + offset);
      code_squares[i] += integer * integer;
      residual[i] += rest * rest;
      squared[i] += t * t;
    }
  }
  Encoding sums = {};
  for (int i = 0; i < kLanes; ++i) {
    sums.code_squares += code_squares[i];
    sums.residual += residual[i];
    sums.squared += squared[i];
  }
  return sums;
}

inline float generic_largest_difference(const float* vector, const float* centre, int64_t dims) {
  float largest[kLanes] = {};
  for (int64_t j = 0; j < dims; j += kLanes) {
    for (int i = 0; i < kLanes; ++i) {
      const float size = std::fabs(vector[j + i] - centre[j + i]);
      largest[i] = largest[i] > size ? largest[i] : size;
    }
  }
  for (int i = 1; i < kLanes; ++i) largest[0] = largest[0] > largest[i] ? largest[0] : largest[i];
  return largest[0];
}

inline void generic_products(const double* vector, const float* matrix, int64_t dims,
                             int64_t columns, double* result) {
  for (int64_t first = 0; first < columns; first += kLanes) {
    double sums[kLanes] = {};
    for (int64_t j = 0; j < dims; ++j) {
      const float* values = matrix + j * columns + first;
      for (int r = 0; r < kLanes; ++r) sums[r] += vector[j] * values[r];
    }
    for (int r = 0; r < kLanes; ++r) result[first + r] = sums[r];
  }
}

// Sums over one block for one query: [16].
inline void generic_block_sums(const uint8_t* query, const int8_t* codes, const int32_t* bias,
                               int64_t packs, int32_t* sums) {
  for (int r = 0; r < kLanes; ++r) sums[r] = -bias[r];
  for (int64_t p = 0; p < packs; ++p) {
    for (int r = 0; r < kLanes; ++r) {
      const int8_t* code = codes + (p * kLanes + r) * 4;
      sums[r] += query[p * 4] * code[0] + query[p * 4 + 1] * code[1] + query[p * 4 + 2] * code[2] +
                 query[p * 4 + 3] * code[3];
    }
  }
}

inline bool generic_screen_blocks(const uint8_t* query, int32_t threshold, const int8_t* codes,
                                  const int32_t* bias, int64_t packs, int64_t blocks,
                                  uint16_t* masks) {
  unsigned any = 0;
  for (int64_t b = 0; b < blocks; ++b) {
    int32_t sums[kLanes];
    generic_block_sums(query, codes + b * packs * 64, bias + b * kLanes, packs, sums);
    unsigned mask = 0;
    for (int r = 0; r < kLanes; ++r) mask |= static_cast<unsigned>(sums[r] >= threshold) << r;
    masks[b] = static_cast<uint16_t>(mask);
    any |= mask;
  }
  return any != 0;
}

inline uint16_t generic_screen_block(const uint8_t* query, int32_t threshold, const int8_t* codes,
                                     const int32_t* bias, int64_t packs) {
  uint16_t mask;
  generic_screen_blocks(query, threshold, codes, bias, packs, 1, &mask);
  return mask;
}

inline void generic_closest_codes(const uint8_t* query, const int8_t* codes, const int32_t* bias,
                                  int64_t packs, int64_t blocks, int32_t* block_of_lane) {
  int32_t largest[kLanes];
  for (int64_t b = 0; b < blocks; ++b) {
    int32_t sums[kLanes];
    generic_block_sums(query, codes + b * packs * 64, bias + b * kLanes, packs, sums);
    for (int r = 0; r < kLanes; ++r) {
      if (b > 0 && sums[r] <= largest[r]) continue;
      largest[r] = sums[r];
      block_of_lane[r] = static_cast<int32_t>(b);
    }
  }
}

inline void generic_screen_tile(const uint8_t* const* queries, const int32_t* thresholds,
                                int num_queries, const int8_t* codes, const int32_t* bias,
                                int64_t packs, uint64_t* masks) {
  for (int q = 0; q < num_queries; ++q) {
    uint16_t blocks[kTileBlocks];
    generic_screen_blocks(queries[q], thresholds[q], codes, bias, packs, kTileBlocks, blocks);
    masks[q] = 0;
    for (int b = 0; b < kTileBlocks; ++b) masks[q] |= uint64_t{blocks[b]} << (kLanes * b);
  }
}

inline int64_t generic_tile_distances(const float* point, const float* tiles, int64_t dims,
                                      int64_t num_tiles, float* squared) {
  float least[kLanes];
  int64_t tile_of_least[kLanes] = {};
  for (float& value : least) value = INFINITY;
  for (int64_t tile = 0; tile < num_tiles; ++tile) {
    float sums[kLanes] = {};
    const float* values = tiles + tile * dims * kLanes;
    for (int64_t j = 0; j < dims; ++j) {
      for (int r = 0; r < kLanes; ++r) {
        const float difference = point[j] - values[j * kLanes + r];
        sums[r] += difference * difference;
      }
    }
    for (int r = 0; r < kLanes; ++r) {
      squared[tile * kLanes + r] = sums[r];
      if (sums[r] < least[r]) {
        least[r] = sums[r];
        tile_of_least[r] = tile;
      }
    }
  }
  int lane = 0;
  for (int r = 1; r < kLanes; ++r) lane = least[r] < least[lane] ? r : lane;
  return tile_of_least[lane] * kLanes + lane;
}

inline int64_t generic_keep_clusters(const ClusterBounds& bounds, const float* squared,
                                     int64_t clusters, int32_t* kept) {
  int64_t count = 0;
  const float low = 1.0f - bounds.rounding;
  const float high = 1.0f + bounds.rounding;
  for (int64_t c = 0; c < clusters; ++c) {
    const float radius = bounds.limit + bounds.reach[c];
    const float at_least = squared[c] * low;
    const bool beyond_radius = at_least > radius * radius;
    const float own = bounds.own * high + 2 * bounds.rounding * bounds.reach[c] * bounds.reach[c];
    const float width = 2 * (bounds.limit + bounds.slack[c]) * bounds.gaps[c];
    const bool beyond_half_plane = at_least - own > width * high;
    kept[count] = static_cast<int32_t>(c);
    count += !(at_least > kLeastSquared && (beyond_radius || beyond_half_plane));
  }
  return count;
}

inline int64_t generic_count_below(const float* ascending, int64_t count, float value) {
  int64_t below = 0;
  for (int64_t i = 0; i < count; ++i) below += ascending[i] < value;
  return below;
}

}  // namespace
}  // namespace psvdd::cpu
