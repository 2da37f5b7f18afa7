// The search for k nearest neighbours on CUDA: all rows, compared canonically. It also takes a
// search for one neighbour among rows with `ids`, which the 64-bit keys of rescore.h have no room
// for.
#pragma once

#include <cstdint>

#include "../params.h"

namespace psvdd::cuda {

// Bytes of scratch for a search of this size. One that would need more than `limit` is made with
// fewer blocks at once, and with none of it if need be.
int64_t k_nearest_workspace(int64_t queries, int64_t rows, int k, int64_t limit);

// As `nearest` (kernels.h), by brute force; `method` is not looked at.
void k_nearest(const NearestParams& params, std::uintptr_t stream);

}  // namespace psvdd::cuda
