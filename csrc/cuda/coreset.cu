// Greedy k-centre selection (csrc/cpu/coreset.cpp), every row compared with every choice.
//
// One launch a step, and none waits for the host: a step reads the row that the step before has
// found farthest, compares all rows with it canonically (csrc/cpu/nearest.cpp), and finds the
// farthest anew by a 64-bit atomic maximum, which does not depend on any order. Half a warp takes a
// row, a lane each of its sixteen partial sums. Traffic per step: all rows once, which bounds it.

#include "../portable.h"
#include "kernels.h"
#include "launch.h"
#include "rescore.h"
#include "warp.h"

namespace psvdd::cuda {
namespace {

constexpr int kPartialSums = 16;  // fixed by the canonical distance
constexpr int kRowsPerHalf = 4;   // rows that half a warp takes at once
constexpr int kRowsPerWarp = 2 * kRowsPerHalf;
constexpr int64_t kBlocksPerMultiprocessor = 8;

static_assert(kWarp == 2 * kPartialSums, "a warp takes two rows at a time, a lane per sum");

// The larger key is the farther row, of equally far ones the lower; 0: none.
__device__ uint64_t farness_key(float squared, int64_t row) {
  return static_cast<uint64_t>(__float_as_uint(squared)) << 32 |
         (0xffffffffu - static_cast<uint32_t>(row));
}

template <typename Stored>
__global__ void __launch_bounds__(kThreadsPerBlock)
    compare_with_choice(CoresetStepsParams params, int64_t step) {
  const int64_t dim = params.dim;
  const auto* data = static_cast<const Stored*>(params.data);
  const int64_t choice = 0xffffffffu - static_cast<uint32_t>(params.keys[step]);
  const Stored* centre = data + choice * dim;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int sum_of_lane = lane % kPartialSums, half = lane / kPartialSums;
  const int64_t warp = first_element() / kWarp, warps = element_step() / kWarp;
  uint64_t farthest = 0;
  for (int64_t first = warp * kRowsPerWarp; first < params.rows; first += warps * kRowsPerWarp) {
    const Stored* rows[kRowsPerHalf];
    float sums[kRowsPerHalf];
#pragma unroll
    for (int i = 0; i < kRowsPerHalf; ++i) {
      const int64_t row = first + half * kRowsPerHalf + i;
      rows[i] = data + (row < params.rows ? row : params.rows - 1) * dim;  // beyond: the last
      sums[i] = 0.0f;
    }
    for (int64_t j = sum_of_lane; j < dim; j += kPartialSums) {
      const float value = to_float(centre[j]);
#pragma unroll
      for (int i = 0; i < kRowsPerHalf; ++i) {
        const float difference = value - to_float(rows[i][j]);
        sums[i] = fmaf(difference, difference, sums[i]);
      }
    }
#pragma unroll
    for (int i = 0; i < kRowsPerHalf; ++i) {
#pragma unroll
      for (int lanes = kPartialSums / 2; lanes > 0; lanes /= 2) {
        sums[i] += __shfl_xor_sync(kAllLanes, sums[i], lanes);
      }
      const int64_t row = first + half * kRowsPerHalf + i;
      if (sum_of_lane != i || row >= params.rows) continue;
      // A row that has been chosen is marked, and stays so.
      const float before = params.squared[row];
      const float now = row == choice ? -1.0f : sums[i] < before ? sums[i] : before;
      params.squared[row] = now;
      if (now < 0) continue;
      const uint64_t key = farness_key(now, row);
      farthest = key > farthest ? key : farthest;
    }
  }
  const uint64_t of_warp = warp_max(static_cast<Key>(farthest));
  if (lane == 0) atomicMax(reinterpret_cast<Key*>(params.keys + step + 1), Key{of_warp});
}

}  // namespace

void coreset_steps(const CoresetStepsParams& params, std::uintptr_t stream) {
  check_rows(params.rows);
  constexpr int64_t kRowsPerBlock = int64_t{kWarpsPerBlock} * kRowsPerWarp;
  const int64_t blocks = std::min((params.rows + kRowsPerBlock - 1) / kRowsPerBlock,
                                  kBlocksPerMultiprocessor * multiprocessors());
  const Launch shape{dim3(static_cast<unsigned>(blocks)), kThreadsPerBlock};
  for (int64_t step = params.begin; step < params.end; ++step) {
    launch(params.is_half ? PSVDD_KERNEL(compare_with_choice<Half>)
                          : PSVDD_KERNEL(compare_with_choice<float>),
           shape, stream, params, step);
  }
}

}  // namespace psvdd::cuda
