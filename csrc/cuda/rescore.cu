// Canonical distances (csrc/cpu/nearest.cpp) of listed queries to whole segments of bank rows.
//
// A block takes a segment and 32 of its queries at a time, one per lane; its four warps share the
// 256 rows. A lane keeps the sixteen partial sums of eight rows in registers. Of every four
// coordinates, the query's come from shared memory once and the rows' as broadcasts, so that nine
// loads of 16 bytes go with 32 subtractions and 32 fmas. Where every query is listed for every
// segment this is the plain search in fp32, bound by the fp32 units: two operations per coordinate.

#include "rescore.h"

#include "../portable.h"
#include "kernels.h"
#include "ptx.h"
#include "warp.h"

namespace psvdd::cuda {
namespace {

constexpr int kPartialSums = 16;  // fixed by the canonical distance
constexpr int kWarps = 4;
constexpr int kThreads = kWarp * kWarps;
constexpr int kRowsAtOnce = 8;
constexpr int kRowsPerWarp = kSegmentRows / kWarps;
constexpr int kMostStagedDims = 384;      // queries are staged in up to 48 KiB of shared memory
constexpr int64_t kBlocksPerSegment = 8;  // if queries suffice; more where that fills the card

static_assert(kRowsPerWarp % kRowsAtOnce == 0,
              "a warp's rows are a multiple of those it takes at once");

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

__device__ void add_square(float q, float b, float* sum) {
  const float difference = q - b;
  *sum = fmaf(difference, difference, *sum);
}

struct Range {
  int64_t begin, end;
};

// The queries that look at a segment: numbers, or positions where there is a list.
__device__ Range queries_of(const Rescore& params, int64_t segment) {
  const int64_t all = params.queries.rows;
  if (params.lists != nullptr) return {0, params.counts[segment]};
  if (params.own_starts == nullptr) return {0, all};
  const int64_t* own = params.own_starts + params.segment_clusters[segment];
  const int64_t begin = own[0] - params.first_query, end = own[1] - params.first_query;
  return {begin < 0 ? 0 : begin, end < all ? end : all};  // none if the end comes first
}

template <typename Stored, bool kWhole>
__global__ void __launch_bounds__(kThreads, 2) rescore_segment(Rescore params, bool staged) {
  const int64_t dim = params.bank.dim;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int64_t segment = params.first_segment + blockIdx.x;
  const bool listed = params.lists != nullptr;
  const int32_t* list = listed ? params.lists + segment * params.list_pitch : nullptr;
  const Range range = queries_of(params, segment);
  const int64_t count = range.end - range.begin;
  const int64_t begin_row = params.bank.begin(segment), end_row = params.bank.end(segment);
  const auto* all_queries = static_cast<const float*>(params.queries.data);
  auto* shared = reinterpret_cast<float*>(shared_memory());
  const int pitch = pitch_of(dim, kWhole);  // only where staged

  for (int64_t first = blockIdx.y * int64_t{kWarp}; first < count;
       first += gridDim.y * int64_t{kWarp}) {
    const bool has_query = first + lane < count;
    const int64_t entry = has_query ? first + lane : first;
    const int64_t query = listed ? list[entry] : range.begin + entry;
    const float* vector = all_queries + query * dim;
    if (staged) {
      // Each warp fetches a quarter of the queries, lanes along the coordinates.
      __syncthreads();
      for (int q = warp; q < kWarp; q += kWarps) {
        const int64_t other = __shfl_sync(kAllLanes, query, q);
        for (int j = lane; j < dim; j += kWarp) {
          shared[q * pitch + j] = all_queries[other * dim + j];
        }
      }
      __syncthreads();
      vector = shared + lane * pitch;
    }
    Key best = kNothingYet;
    for (int r = 0; r < kRowsPerWarp; r += kRowsAtOnce) {
      const int64_t row = begin_row + warp * kRowsPerWarp + r;
      if (row >= end_row) break;
      const Stored* rows[kRowsAtOnce];
#pragma unroll
      for (int i = 0; i < kRowsAtOnce; ++i) {
        const int64_t place = row + i < end_row ? row + i : end_row - 1;
        rows[i] = static_cast<const Stored*>(params.bank.data) + place * dim;  // beyond: the last
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
          const float4 q = four<kWhole>(vector, j + s, dim);
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
        const float squared = (sums[i][0] + sums[i][2]) + (sums[i][1] + sums[i][3]);
        const int64_t place = row + i < end_row ? row + i : end_row - 1;
        const int64_t number = params.number_of(place);
        const Key key = static_cast<Key>(__float_as_uint(squared)) << 32 | static_cast<Key>(number);
        if (key >= best) continue;
        const int64_t* query_groups = params.groups.query_groups;
        if (query_groups != nullptr && query_groups[query] == params.group_of(number)) continue;
        best = key;
      }
    }
    if (has_query && best != kNothingYet) atomicMin(params.keys + query, best);
  }
}

template <typename Stored>
void rescore_stored(const Rescore& params, std::uintptr_t stream) {
  const auto address = [](const Vectors& vectors) {
    return reinterpret_cast<std::uintptr_t>(vectors.data);
  };
  const bool whole = params.bank.dim % 4 == 0 && address(params.queries) % 16 == 0 &&
                     address(params.bank) % (4 * sizeof(Stored)) == 0;
  const bool staged = params.bank.dim <= kMostStagedDims;
  const size_t shared_bytes = staged ? kWarp * pitch_of(params.bank.dim, whole) * sizeof(float) : 0;
  const auto segments = static_cast<unsigned>(params.end_segment - params.first_segment);
  const int64_t batches = (params.queries.rows + kWarp - 1) / kWarp;
  // At least eight blocks for each multiprocessor, where there are as many batches.
  const int64_t wanted = (8 * int64_t{multiprocessors()} + segments - 1) / segments;
  const auto across = static_cast<unsigned>(
      std::min<int64_t>({batches, std::max<int64_t>(wanted, kBlocksPerSegment), 65535}));
  launch(whole ? PSVDD_KERNEL(rescore_segment<Stored, true>)
               : PSVDD_KERNEL(rescore_segment<Stored, false>),
         {dim3(segments, across), kThreads, shared_bytes}, stream, params, staged);
}

}  // namespace

void rescore(const Rescore& params, std::uintptr_t stream) {
  if (params.bank.is_half) {
    rescore_stored<Half>(params, stream);
  } else {
    rescore_stored<float>(params, stream);
  }
}

}  // namespace psvdd::cuda
