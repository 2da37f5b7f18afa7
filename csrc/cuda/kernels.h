// The operations on CUDA. Each has a file of its name, as its CPU twin has; what the searches share
// is in screen.h, bounds.h and rescore.h. Every function launches on the given stream (a
// cudaStream_t as an integer) of the current device and throws std::runtime_error, with the
// kernel's name, if a launch fails. None synchronises or allocates.
#pragma once

#include <cstdint>

#include "../params.h"

namespace psvdd::cuda {

void extract_patches(const ExtractPatchesParams& params, std::uintptr_t stream);
void extract_patches_backward(const ExtractPatchesBackwardParams& params, std::uintptr_t stream);
void score_map(const ScoreMapParams& params, std::uintptr_t stream);
void nearest(const NearestParams& params, std::uintptr_t stream);
void finish_search(const FinishSearchParams& params, std::uintptr_t stream);
void crop_pairs(const CropPairsParams& params, std::uintptr_t stream);
// Steps of the selection that cpu::coreset makes as a whole.
void coreset_steps(const CoresetStepsParams& params, std::uintptr_t stream);
// Bytes of scratch that `nearest` needs for a search of this size. A search that would need more
// than `limit` is cut into chunks, which need about so many.
int64_t nearest_workspace(int64_t queries, int64_t rows, int64_t dim, SearchMethod method,
                          bool has_groups, int neighbours, int64_t limit);

// The layout of a bank's float16 codes (screen.h).
constexpr int kSegmentRows = 256;    // bank rows that share one result of the screen
constexpr int kDimStep = 16;         // coordinates of one tensor-core instruction
constexpr int64_t kNarrowDims = 64;  // up to here a warp keeps its queries in registers

// Coordinates of a code, with padding.
inline int64_t padded_dim(int64_t dim) {
  const int64_t step = dim <= kNarrowDims ? kDimStep : kNarrowDims;
  return (dim + step - 1) / step * step;
}

// Queries that share a list of segments to visit in a clustered bank.
inline int64_t visit_tile(int64_t dim) { return dim <= kNarrowDims ? 64 : 256; }

// Fills in the codes of a clustered bank.
void encode_segments(const SegmentedBank& bank, std::uintptr_t stream);
// The twin of cpu::nearest_in_clusters.
void nearest_in_segments(const SegmentedNearestParams& params, std::uintptr_t stream);
int64_t nearest_in_segments_workspace(const SegmentedBank& bank, int64_t queries, int64_t limit);

}  // namespace psvdd::cuda
