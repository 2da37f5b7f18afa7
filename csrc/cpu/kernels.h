// The operations on the CPU. Each has a file of its name, as its CUDA twin has; building a
// clustered bank is in clusters.cpp. All throw what goes wrong on any of their threads.
#pragma once

#include <string>
#include <vector>

#include "../params.h"

namespace psvdd::cpu {

class Matches;
class Watch;

void extract_patches(const ExtractPatchesParams& params, int num_threads);
void extract_patches_backward(const ExtractPatchesBackwardParams& params, int num_threads);
void score_map(const ScoreMapParams& params, int num_threads);
void nearest(const NearestParams& params, int num_threads);
void nearest(const NearestParams& params, int num_threads, Watch* watch);  // as part of a search
void finish_search(const FinishSearchParams& params, int num_threads);
void crop_pairs(const CropPairsParams& params, int num_threads);
void coreset(const CoresetParams& params, int num_threads);

// A bank whose codes are kept: how many rows a block of it has (a multiple of 64), images along its
// leading axes, making the codes, and searching.
int64_t code_block_rows(int64_t dim);
void leading_images(const LeadingImagesParams& params, int num_threads);
void encode_rows(const CodedRows& bank, int num_threads);
void nearest_in_codes(const CodedNearestParams& params, int num_threads,
                      Matches* matches = nullptr);

// The clustered bank: projecting rows, filling in what a search needs, and searching.
void project(const ProjectParams& params, int num_threads);
void pack_clusters(const PackClustersParams& params, int num_threads);
void link_clusters(const ClusteredBank& bank, int num_threads);
void nearest_in_clusters(const ClusteredNearestParams& params, int num_threads,
                         Matches* matches = nullptr);

// All rows within a limit, as `nearest` and, given matches, the two searches above: `squared` holds
// the limits [Q] on squared distances, k is 1, indices are null. Returns what `nearest` says in
// seems_finite.
bool within(const NearestParams& params, Matches* matches, int num_threads);
bool within(const NearestParams& params, Matches* matches, int num_threads, Watch* watch);

// The largest squared distance that is within each radius [count], of none that is negative or NaN.
void squared_limits(int64_t count, const float* radii, bool is_cosine, float* limits);

// As finish_search, but distances become cosine distances: half of the squared ones.
void finish_cosine_search(const FinishSearchParams& params, int num_threads);

// Returns the first row that is zero, so has no direction, and leaves the result undefined then; or
// -1.
int64_t normalise(const NormaliseParams& params, int num_threads);

// Gives freed memory, which the allocator may have kept, back to the system: for after a large
// bank has been built.
void release_memory();

// The first row that holds NaN or infinity, or -1.
int64_t first_bad_row(const void* data, int64_t rows, int64_t dim, bool is_half, int num_threads);

// Instruction sets that the search can use on this processor, best first; "portable" is always one.
std::vector<std::string> instruction_sets();
std::string instruction_set();                      // the one in use
void set_instruction_set(const std::string& name);  // throws std::invalid_argument

}  // namespace psvdd::cpu
