// The Python face of the kernels: the only file that knows pybind11. Pointers come as integers,
// already validated by patchsvdd_fast/ops.py; the interpreter lock is released while kernels run.
//
// Each backend is a submodule with the same functions and arguments; the last argument is what the
// backend runs in: the number of threads on the CPU, the stream on CUDA.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/kernels.h"
#include "params.h"
#if defined(PSVDD_WITH_CUDA)
#include "cuda/kernels.h"
#endif

#if !defined(PSVDD_MODULE_NAME)
#define PSVDD_MODULE_NAME _native
#endif

namespace py = pybind11;

namespace {

using Pointer = std::uintptr_t;

template <typename T>
T* at(Pointer pointer) {
  return reinterpret_cast<T*>(pointer);
}

template <typename Context>
struct Backend {
  void (*extract_patches)(const psvdd::ExtractPatchesParams&, Context);
  void (*extract_patches_backward)(const psvdd::ExtractPatchesBackwardParams&, Context);
  void (*score_map)(const psvdd::ScoreMapParams&, Context);
  void (*nearest)(const psvdd::NearestParams&, Context);
};

template <typename Context>
void define_backend(py::module_ module, const Backend<Context>& backend) {
  const auto release = py::call_guard<py::gil_scoped_release>();
  module.def(
      "extract_patches",
      [backend](const psvdd::PatchGrid& grid, Pointer images, Pointer mean, Pointer patches,
                int64_t element_size, psvdd::PixelType pixel_type, Context context) {
        backend.extract_patches({grid, at<const void>(images), at<const float>(mean),
                                 at<void>(patches), element_size, pixel_type},
                                context);
      },
      py::arg("grid"), py::arg("images"), py::arg("mean"), py::arg("patches"),
      py::arg("element_size"), py::arg("pixel_type"), py::arg("context"), release);
  module.def(
      "extract_patches_backward",
      [backend](const psvdd::PatchGrid& grid, Pointer patch_gradients, Pointer image_gradients,
                bool is_double, Context context) {
        backend.extract_patches_backward(
            {grid, at<const void>(patch_gradients), at<void>(image_gradients), is_double}, context);
      },
      py::arg("grid"), py::arg("patch_gradients"), py::arg("image_gradients"), py::arg("is_double"),
      py::arg("context"), release);
  module.def(
      "score_map",
      [backend](const psvdd::PatchGrid& grid, Pointer distances, Pointer row_sums, Pointer maps,
                Context context) {
        backend.score_map({grid, at<const float>(distances), at<double>(row_sums), at<float>(maps)},
                          context);
      },
      py::arg("grid"), py::arg("distances"), py::arg("row_sums"), py::arg("maps"),
      py::arg("context"), release);
  module.def(
      "nearest",
      [backend](int64_t queries, int64_t bank_rows, int64_t dim, Pointer query_data,
                Pointer bank_data, Pointer distances, Pointer indices, int64_t bank_splits,
                Pointer split_distances, Pointer split_indices, Context context) {
        backend.nearest({queries, bank_rows, dim, at<const float>(query_data),
                         at<const float>(bank_data), at<float>(distances), at<int64_t>(indices),
                         bank_splits, at<float>(split_distances), at<int64_t>(split_indices)},
                        context);
      },
      py::arg("queries"), py::arg("bank_rows"), py::arg("dim"), py::arg("query_data"),
      py::arg("bank_data"), py::arg("distances"), py::arg("indices"), py::arg("bank_splits"),
      py::arg("split_distances"), py::arg("split_indices"), py::arg("context"), release);
}

}  // namespace

PYBIND11_MODULE(PSVDD_MODULE_NAME, module) {
  module.doc() = "Kernels of patchsvdd_fast, on raw pointers. Use patchsvdd_fast.ops instead.";

  // Local types, so that the test module built from this file can be loaded beside this one.
  py::enum_<psvdd::PixelType>(module, "PixelType", py::module_local())
      .value("UINT8", psvdd::PixelType::kUint8)
      .value("FLOAT16", psvdd::PixelType::kFloat16)
      .value("FLOAT32", psvdd::PixelType::kFloat32);

  py::class_<psvdd::PatchGrid>(module, "PatchGrid", py::module_local())
      .def(py::init([](int64_t images, int64_t channels, int64_t height, int64_t width,
                       int64_t rows, int64_t columns, int64_t size, int64_t stride) {
             return psvdd::PatchGrid{images, channels, height, width, rows, columns, size, stride};
           }),
           py::arg("images"), py::arg("channels"), py::arg("height"), py::arg("width"),
           py::arg("rows"), py::arg("columns"), py::arg("size"), py::arg("stride"));

  auto cpu = module.def_submodule("cpu");
  define_backend<int>(cpu, {psvdd::cpu::extract_patches, psvdd::cpu::extract_patches_backward,
                            psvdd::cpu::score_map, psvdd::cpu::nearest});
  cpu.def("instruction_sets", psvdd::cpu::instruction_sets);
  cpu.def("instruction_set", psvdd::cpu::instruction_set);
  cpu.def("set_instruction_set", psvdd::cpu::set_instruction_set, py::arg("name"));

#if defined(PSVDD_WITH_CUDA)
  define_backend<std::uintptr_t>(
      module.def_submodule("cuda"),
      {psvdd::cuda::extract_patches, psvdd::cuda::extract_patches_backward, psvdd::cuda::score_map,
       psvdd::cuda::nearest});
  module.attr("cuda_architectures") = PSVDD_CUDA_ARCHITECTURES;
#else
  module.attr("cuda") = py::none();
  module.attr("cuda_architectures") = "";
#endif
}
