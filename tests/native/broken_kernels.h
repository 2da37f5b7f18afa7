// Kernels that are wrong on purpose, by name.
#pragma once

#include <string>

namespace psvdd::cuda {

// Runs one block of `threads`; out: [threads].
void run_broken_kernel(const std::string& name, float* out, unsigned threads);

}  // namespace psvdd::cuda
