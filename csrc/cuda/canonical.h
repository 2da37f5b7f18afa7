// Canonical distances (csrc/cpu/nearest.cpp) as a warp computes them: one query per lane, to
// several rows that all lanes share. Whoever decides by a distance gets it from here.
#pragma once

#include <cstdint>

#include "../portable.h"
#include "warp.h"

namespace psvdd::cuda {

constexpr int kPartialSums = 16;  // fixed by the canonical distance
constexpr int kRowsAtOnce = 8;
constexpr int kMostStagedDims = 384;  // queries are staged in up to 48 KiB of shared memory

// Four coordinates from j on, zero beyond the end (which adds nothing to a sum). kWhole: dim is a
// multiple of four and every row aligned to four coordinates.
template <bool kWhole>
__device__ float4 four(const float* row, int64_t j, int64_t dim) {
  if (kWhole && j < dim) return *reinterpret_cast<const float4*>(row + j);
  return {j < dim ? row[j] : 0.0f, j + 1 < dim ? row[j + 1] : 0.0f, j + 2 < dim ? row[j + 2] : 0.0f,
          j + 3 < dim ? row[j + 3] : 0.0f};
}
template <bool kWhole>
__device__ float4 four(const Half* row, int64_t j, int64_t dim) {
  if (kWhole && j < dim) {
    const uint2 bits = *reinterpret_cast<const uint2*>(row + j);
    return {to_float(Half{static_cast<uint16_t>(bits.x)}),
            to_float(Half{static_cast<uint16_t>(bits.x >> 16)}),
            to_float(Half{static_cast<uint16_t>(bits.y)}),
            to_float(Half{static_cast<uint16_t>(bits.y >> 16)})};
  }
  return {j < dim ? to_float(row[j]) : 0.0f, j + 1 < dim ? to_float(row[j + 1]) : 0.0f,
          j + 2 < dim ? to_float(row[j + 2]) : 0.0f, j + 3 < dim ? to_float(row[j + 3]) : 0.0f};
}

// Floats from one staged query to the next, chosen so that what lanes read together lies in
// different banks of shared memory. Where lanes read 16 bytes, eight of them share a turn, and
// queries must be an odd number of 16 bytes apart; where they read single floats, all 32 do, and
// queries must be an odd number of floats apart.
__host__ __device__ constexpr int pitch_of(int64_t dim, bool whole) {
  return static_cast<int>(whole ? (dim + 3) / 8 * 8 + 4 : dim | 1);
}
static_assert(pitch_of(60, true) == 60 && pitch_of(64, true) == 68 && pitch_of(68, true) == 68,
              "the least number of whole fours, an odd one, that holds a vector");

__device__ inline void add_square(float q, float b, float* sum) {
  const float difference = q - b;
  *sum = fmaf(difference, difference, *sum);
}

// Whether rows can be read by fours, see `four`.
inline bool reads_whole_fours(const void* queries, const void* bank, bool is_half, int64_t dim) {
  const auto address = [](const void* data) { return reinterpret_cast<std::uintptr_t>(data); };
  return dim % 4 == 0 && address(queries) % 16 == 0 && address(bank) % (is_half ? 8 : 16) == 0;
}

// Bytes of shared memory for a warp's queries; 0: they are too long and stay where they are.
inline size_t staged_bytes(int64_t dim, bool whole) {
  return dim <= kMostStagedDims ? kWarp * pitch_of(dim, whole) * sizeof(float) : 0;
}

// Copies the queries of the lanes to shared memory, [kWarp, pitch_of(dim, kWhole)] floats. All
// kWarps warps of the block have the same queries and fetch a share each, lanes along coordinates,
// once none of them reads what was there before. Returns the lane's own.
template <bool kWhole, int kWarps>
__device__ const float* stage_queries(const float* queries, int64_t query, int64_t dim,
                                      float* shared) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int pitch = pitch_of(dim, kWhole);
  __syncthreads();
  for (int q = static_cast<int>(threadIdx.x) / kWarp; q < kWarp; q += kWarps) {
    const int64_t other = __shfl_sync(kAllLanes, query, q);
    for (int j = lane; j < dim; j += kWarp) shared[q * pitch + j] = queries[other * dim + j];
  }
  __syncthreads();
  return shared + lane * pitch;
}

// Squared distances of the lane's query to rows `row`, row + 1, ... of the bank; beyond end_row,
// to the last before it.
template <bool kWhole, typename Stored>
__device__ void canonical_squares(const float* query, const Stored* bank, int64_t row,
                                  int64_t end_row, int64_t dim, float (&squared)[kRowsAtOnce]) {
  const Stored* rows[kRowsAtOnce];
#pragma unroll
  for (int i = 0; i < kRowsAtOnce; ++i) {
    const int64_t place = row + i < end_row ? row + i : end_row - 1;
    rows[i] = bank + place * dim;
  }
  float sums[kRowsAtOnce][kPartialSums];
#pragma unroll
  for (int i = 0; i < kRowsAtOnce; ++i) {
#pragma unroll
    for (int s = 0; s < kPartialSums; ++s) sums[i][s] = 0.0f;
  }
  for (int64_t j = 0; j < dim; j += kPartialSums) {
#pragma unroll
    for (int s = 0; s < kPartialSums; s += 4) {
      const float4 q = four<kWhole>(query, j + s, dim);
#pragma unroll
      for (int i = 0; i < kRowsAtOnce; ++i) {
        const float4 b = four<kWhole>(rows[i], j + s, dim);
        add_square(q.x, b.x, &sums[i][s]);
        add_square(q.y, b.y, &sums[i][s + 1]);
        add_square(q.z, b.z, &sums[i][s + 2]);
        add_square(q.w, b.w, &sums[i][s + 3]);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kRowsAtOnce; ++i) {
    // Unrolled loops with constant bounds, so that every sum stays in a register.
#pragma unroll
    for (int s = 0; s < 8; ++s) sums[i][s] += sums[i][s + 8];
#pragma unroll
    for (int s = 0; s < 4; ++s) sums[i][s] += sums[i][s + 4];
    squared[i] = (sums[i][0] + sums[i][2]) + (sums[i][1] + sums[i][3]);
  }
}

}  // namespace psvdd::cuda
