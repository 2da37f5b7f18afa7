// Canonical distances (csrc/cpu/nearest.cpp) of listed queries to whole segments of bank rows.
//
// A block takes a segment and 32 of its queries at a time, one per lane; its four warps share the
// 256 rows. A lane keeps the sixteen partial sums of eight rows in registers. Of every four
// coordinates, the query's come from shared memory once and the rows' as broadcasts, so that nine
// loads of 16 bytes go with 32 subtractions and 32 fmas. Where every query is listed for every
// segment this is the plain search in fp32, bound by the fp32 units: two operations per coordinate.

#include "rescore.h"

#include "canonical.h"
#include "kernels.h"
#include "ptx.h"
#include "warp.h"

namespace psvdd::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = kWarp * kWarps;
constexpr int kRowsPerWarp = kSegmentRows / kWarps;
constexpr int64_t kBlocksPerSegment = 8;  // if queries suffice; more where that fills the card

static_assert(kRowsPerWarp % kRowsAtOnce == 0,
              "a warp's rows are a multiple of those it takes at once");

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

  for (int64_t first = blockIdx.y * int64_t{kWarp}; first < count;
       first += gridDim.y * int64_t{kWarp}) {
    const bool has_query = first + lane < count;
    const int64_t entry = has_query ? first + lane : first;
    const int64_t query = listed ? list[entry] : range.begin + entry;
    const float* vector = all_queries + query * dim;
    if (staged) vector = stage_queries<kWhole, kWarps>(all_queries, query, dim, shared);
    Key best = kNothingYet;
    for (int r = 0; r < kRowsPerWarp; r += kRowsAtOnce) {
      const int64_t row = begin_row + warp * kRowsPerWarp + r;
      if (row >= end_row) break;
      float squared[kRowsAtOnce];
      canonical_squares<kWhole>(vector, static_cast<const Stored*>(params.bank.data), row, end_row,
                                dim, squared);
#pragma unroll
      for (int i = 0; i < kRowsAtOnce; ++i) {
        const int64_t place = row + i < end_row ? row + i : end_row - 1;
        const int64_t number = params.number_of(place);
        const Key key =
            static_cast<Key>(__float_as_uint(squared[i])) << 32 | static_cast<Key>(number);
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
  const bool whole = reads_whole_fours(params.queries.data, params.bank.data, params.bank.is_half,
                                       params.bank.dim);
  const size_t shared_bytes = staged_bytes(params.bank.dim, whole);
  const auto segments = static_cast<unsigned>(params.end_segment - params.first_segment);
  const int64_t batches = (params.queries.rows + kWarp - 1) / kWarp;
  // At least eight blocks for each multiprocessor, where there are as many batches.
  const int64_t wanted = (8 * int64_t{multiprocessors()} + segments - 1) / segments;
  const auto across = static_cast<unsigned>(
      std::min<int64_t>({batches, std::max<int64_t>(wanted, kBlocksPerSegment), 65535}));
  launch(whole ? PSVDD_KERNEL(rescore_segment<Stored, true>)
               : PSVDD_KERNEL(rescore_segment<Stored, false>),
         {dim3(segments, across), kThreads, shared_bytes}, stream, params, shared_bytes > 0);
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
