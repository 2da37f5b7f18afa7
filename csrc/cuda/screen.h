// The float16 screen of the nearest-neighbour search: vectors are rounded to float16 about a
// centre, and for each query and each segment of 256 bank rows tensor cores find the largest
// v = q b - |b|^2 / 2 over its rows. As |q - b|^2 = |q|^2 - 2 v, that is the v of the nearest row.
// What it proves about true distances is in bounds.h.
#pragma once

#include <cstdint>

#include "kernels.h"
#include "launch.h"

namespace psvdd::cuda {

constexpr int kQueryTile = 256;  // queries are padded to a multiple of this
static_assert(kQueryTile == kSegmentRows,
              "queries are encoded as segments, whose padding must be that of the screen's tiles");

constexpr float kScreenable = 1e15f;  // coordinates below it; squares of larger might overflow

// Vectors as the search was given them, bank or queries, in segments of up to kSegmentRows.
struct Vectors {
  const void* data;  // [rows, dim], float32 or float16
  bool is_half;
  int64_t rows;
  int64_t dim;
  const int64_t* segment_starts = nullptr;  // [segments + 1] first rows; null: all are full
  int64_t num_segments = 0;                 // where there are starts

  __host__ __device__ int64_t segments() const {
    return segment_starts != nullptr ? num_segments : (rows + kSegmentRows - 1) / kSegmentRows;
  }
  // The rows [begin, end) of a segment.
  __device__ int64_t begin(int64_t segment) const {
    return segment_starts != nullptr ? segment_starts[segment] : segment * kSegmentRows;
  }
  __device__ int64_t end(int64_t segment) const {
    if (segment_starts != nullptr) return segment_starts[segment + 1];
    return rows < (segment + 1) * kSegmentRows ? rows : (segment + 1) * kSegmentRows;
  }
};

// What vectors are rounded about: the code of x is float16((x - centre) * scale), where scale is a
// power of two that follows from `largest` (frame_scale).
struct Frame {
  float* centre;   // [dim]
  float* largest;  // [1], largest |x - centre| of any coordinate of the bank; NaN if one is NaN
};

// Rounded vectors, with zeros as padding: rows to whole segments, coordinates to padded_dim.
struct Codes {
  int64_t padded_dim;
  uint16_t* halves;  // [padded rows, padded_dim], float16
  float* squares;    // [padded rows], squared norms of the codes; infinity for padding
  float* errors;     // [padded rows], bounds on |x - code|, in units of the code
};

// What the bounds need of each segment of bank rows.
struct Segments {
  float* norms;   // [segments], largest norm of a code, rounded up
  float* errors;  // [segments], largest error of a code
};

// Which segments are screened for each visit_tile() queries, which share a list; null: all.
struct Visits {
  const int32_t* segments;  // [lists, segments], the first `counts` of each are valid
  const int32_t* counts;    // [lists]
};

// Finds the centre and range of a bank.
void find_frame(const Vectors& bank, const Frame& frame, std::uintptr_t stream);

// Codes of all rows, each segment padded to kSegmentRows; nulls in `segments`: not wanted.
void encode(const Vectors& vectors, const Frame& frame, const Codes& codes,
            const Segments& segments, std::uintptr_t stream);

// maxima [segments, padded queries]: the largest q b - |b|^2 / 2 of each query over each segment.
// Entries that `visits` leaves out are not written.
void screen(const Codes& queries, int64_t query_tiles, const Codes& bank, int64_t segments,
            const Visits& visits, float* maxima, std::uintptr_t stream);

// --- bounds, for whoever reads the maxima --------------------------------------------------------

constexpr float kRoundUp = 1.0f + 0x1p-20f;  // covers a few roundings of float32

// Bound on the error of q b - |b|^2 / 2, relative to (|q| + |b|)^2: every addition of a tensor core
// may lose a unit in the last place of float32 (two, to be safe) of the largest sum on the way.
__host__ __device__ inline float screen_rounding(int64_t padded_dim) {
  return static_cast<float>(padded_dim + padded_dim / 16 + 64) * 0x1p-22f;
}

// Bound on the relative error of a canonical squared distance, doubled (see csrc/cpu/rescore.h).
__host__ __device__ inline float canonical_rounding(int64_t dim) {
  return 2.0f * static_cast<float>(dim / 16 + 9) * 0x1p-24f;
}

// The power of two that codes are scaled by; 0: the vectors cannot be screened.
__device__ inline float frame_scale(float largest) {
  if (!(largest < kScreenable)) return 0.0f;
  const int exponent = static_cast<int>(__float_as_uint(largest) >> 23);  // biased by 127
  const int scaled = 127 + 10 - (exponent - 127);
  return __uint_as_float(static_cast<uint32_t>(scaled > 253 ? 253 : scaled) << 23);
}

}  // namespace psvdd::cuda
