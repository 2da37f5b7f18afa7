// Exact nearest neighbour by the canonical squared distance (csrc/cpu/nearest.cpp), brute force in
// fp32: the plain kernel that faster ones are compared with.
//
// A thread owns one query and walks one of S ranges of the bank, so that few queries still fill the
// card; a second launch takes the minimum over the ranges, the lowest index on ties. Queries come
// transposed, [D, Q], so that a warp reads 32 of them in one access; bank rows are the same for all
// threads of a warp and come as broadcasts. Bound by the fp32 units: two operations per coordinate.

#include <cmath>

#include "kernels.h"
#include "launch.h"

namespace psvdd::cuda {
namespace {

constexpr int kPartialSums = 16;  // fixed by the canonical distance

__device__ float canonical_squared_distance(const float* query, int64_t query_step,
                                            const float* row, int64_t dim) {
  float sums[kPartialSums];
#pragma unroll
  for (int i = 0; i < kPartialSums; ++i) sums[i] = 0.0f;
  int64_t j = 0;
  for (; j + kPartialSums <= dim; j += kPartialSums) {
#pragma unroll
    for (int i = 0; i < kPartialSums; ++i) {
      const float difference = query[(j + i) * query_step] - row[j + i];
      sums[i] = fmaf(difference, difference, sums[i]);
    }
  }
#pragma unroll
  for (int i = 0; i < kPartialSums; ++i) {
    if (j + i < dim) {
      const float difference = query[(j + i) * query_step] - row[j + i];
      sums[i] = fmaf(difference, difference, sums[i]);
    }
  }
  // Constant bounds, so that every sum stays in a register.
#pragma unroll
  for (int i = 0; i < 8; ++i) sums[i] += sums[i + 8];
#pragma unroll
  for (int i = 0; i < 4; ++i) sums[i] += sums[i + 4];
#pragma unroll
  for (int i = 0; i < 2; ++i) sums[i] += sums[i + 2];
  return sums[0] + sums[1];
}

// Element = split * Q + query.
__global__ void search_splits(NearestParams params, int64_t count) {
  const int64_t rows_per_split = (params.bank_rows + params.bank_splits - 1) / params.bank_splits;
  for (int64_t e = first_element(); e < count; e += element_step()) {
    const auto* bank = static_cast<const float*>(params.bank_data);
    const float* query = params.query_data + e % params.queries;
    const int64_t begin = e / params.queries * rows_per_split;
    const int64_t limit = begin + rows_per_split;
    const int64_t end = limit < params.bank_rows ? limit : params.bank_rows;
    float best = INFINITY;
    int64_t index = -1;
    const Groups& groups = params.groups;
    for (int64_t row = begin; row < end; ++row) {
      if (groups.query_groups != nullptr && groups.query_groups[e % params.queries] ==
                                                groups.bank_groups[row / groups.rows_per_group]) {
        continue;
      }
      const float squared =
          canonical_squared_distance(query, params.queries, bank + row * params.dim, params.dim);
      if (squared < best || index < 0) {  // the first one even if it overflowed
        best = squared;
        index = row;
      }
    }
    params.split_distances[e] = best;
    params.split_indices[e] = index;
  }
}

__global__ void reduce_splits(NearestParams params, int64_t count) {
  for (int64_t q = first_element(); q < count; q += element_step()) {
    float best = params.split_distances[q];
    int64_t index = params.split_indices[q];
    for (int64_t split = 1; split < params.bank_splits; ++split) {
      const int64_t e = split * params.queries + q;
      if (params.split_indices[e] >= 0 && (params.split_distances[e] < best || index < 0)) {
        best = params.split_distances[e];
        index = params.split_indices[e];
      }
    }
    params.distances[q] = sqrtf(best);
    params.indices[q] = index;
  }
}

}  // namespace

void nearest(const NearestParams& params, std::uintptr_t stream) {
  launch_elements("nearest", search_splits, params, params.queries * params.bank_splits, stream);
  launch_elements("nearest", reduce_splits, params, params.queries, stream);
}

}  // namespace psvdd::cuda
