// The CUDA kernels. One file each, under the same name as its CPU twin. Every function launches on
// the given stream (a cudaStream_t as an integer) of the current device and throws
// std::runtime_error if a launch fails; none synchronises or allocates.
#pragma once

#include <cstdint>

#include "../params.h"

namespace psvdd::cuda {

void extract_patches(const ExtractPatchesParams& params, std::uintptr_t stream);
void extract_patches_backward(const ExtractPatchesBackwardParams& params, std::uintptr_t stream);
void score_map(const ScoreMapParams& params, std::uintptr_t stream);
void nearest(const NearestParams& params, std::uintptr_t stream);
void crop_pairs(const CropPairsParams& params, std::uintptr_t stream);

}  // namespace psvdd::cuda
