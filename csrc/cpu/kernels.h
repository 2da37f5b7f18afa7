// The CPU kernels. One file each, under the same name as its CUDA twin.
#pragma once

#include <string>
#include <vector>

#include "../params.h"

namespace psvdd::cpu {

void extract_patches(const ExtractPatchesParams& params, int num_threads);
void extract_patches_backward(const ExtractPatchesBackwardParams& params, int num_threads);
void score_map(const ScoreMapParams& params, int num_threads);
void nearest(const NearestParams& params, int num_threads);

// Instruction sets that `nearest` can use on this processor, best first; "portable" is always one.
std::vector<std::string> instruction_sets();
std::string instruction_set();                      // the one in use
void set_instruction_set(const std::string& name);  // throws std::invalid_argument

}  // namespace psvdd::cpu
