// What the files of the Python face share; they alone know pybind11. Pointers come as integers;
// patchsvdd_fast/ops has validated the arrays behind them (ops/checks.py) and keeps them alive. The
// interpreter lock is released while kernels run.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

#include "params.h"

namespace psvdd::bindings {

namespace py = pybind11;

using Pointer = std::uintptr_t;

template <typename T>
T* at(Pointer pointer) {
  return reinterpret_cast<T*>(pointer);
}

inline psvdd::Groups groups_of(Pointer query_groups, Pointer bank_groups, int64_t rows_per_group) {
  return {at<const int64_t>(query_groups), at<const int64_t>(bank_groups), rows_per_group};
}

// Banks of either backend, and coresets: the structs as they are, pointers as integers.
void define_cpu_banks(py::module_ cpu);
#if defined(PSVDD_WITH_CUDA)
void define_gpu_banks(py::module_ cuda);
#endif

}  // namespace psvdd::bindings
