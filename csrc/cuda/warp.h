// Warps, the 32 threads of a block that run together, and reductions over their lanes.
#pragma once

#include "launch.h"

namespace psvdd::cuda {

constexpr int kWarp = 32;  // lanes
constexpr int kWarpsPerBlock = kThreadsPerBlock / kWarp;
constexpr unsigned kAllLanes = 0xffffffffu;  // the mask of a warp operation that all lanes reach

// Combines the values of all lanes; every lane gets the result. Lanes first combine with those 16
// away, then 8, 4, 2, 1: a fixed order, so that sums have the same bits each time.
template <typename T, typename Combine>
__device__ T reduce_over_warp(T value, Combine combine) {
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
    value = combine(value, __shfl_xor_sync(kAllLanes, value, lanes));
  }
  return value;
}

template <typename T>
__device__ T warp_sum(T value) {
  return reduce_over_warp(value, [](T a, T b) { return a + b; });
}
template <typename T>
__device__ T warp_max(T value) {
  return reduce_over_warp(value, [](T a, T b) { return b > a ? b : a; });
}
// The minimum of *least and the maximum of *largest, in place; one does not wait for the other.
template <typename T>
__device__ void warp_range(T* least, T* largest) {
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
    const T low = __shfl_xor_sync(kAllLanes, *least, lanes);
    const T high = __shfl_xor_sync(kAllLanes, *largest, lanes);
    *least = low < *least ? low : *least;
    *largest = high > *largest ? high : *largest;
  }
}

}  // namespace psvdd::cuda
