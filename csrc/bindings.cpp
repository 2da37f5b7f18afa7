// The Python face of the kernels: what both backends have, and the module. Each backend is a
// submodule with the same functions and arguments; the last argument is what the backend runs in:
// the number of threads on the CPU, the stream on CUDA.

#include "bindings.h"

#include <pybind11/stl.h>

#include "cpu/kernels.h"
#include "cpu/watch.h"
#include "params.h"
#if defined(PSVDD_WITH_CUDA)
#include "cuda/kernels.h"
#if defined(PSVDD_CUDA_ON_HOST)
#include "cuda_on_host.h"
#endif
#endif

#if !defined(PSVDD_MODULE_NAME)
#define PSVDD_MODULE_NAME _native
#endif

using namespace psvdd::bindings;

namespace {

template <typename Context>
struct Backend {
  void (*extract_patches)(const psvdd::ExtractPatchesParams&, Context);
  void (*extract_patches_backward)(const psvdd::ExtractPatchesBackwardParams&, Context);
  void (*score_map)(const psvdd::ScoreMapParams&, Context);
  void (*nearest)(const psvdd::NearestParams&, Context);
  void (*finish_search)(const psvdd::FinishSearchParams&, Context);
  int64_t (*nearest_workspace)(int64_t, int64_t, int64_t, psvdd::SearchMethod, bool, int, int64_t);
  void (*crop_pairs)(const psvdd::CropPairsParams&, Context);
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
                Pointer bank_data, bool bank_is_half, psvdd::SearchMethod method,
                Pointer query_groups, Pointer bank_groups, int64_t rows_per_group, int neighbours,
                Pointer ids, int64_t first_row, Pointer squared, Pointer indices, Pointer workspace,
                int64_t workspace_limit, Context context) {
        bool seems_finite = true;
        backend.nearest(
            {queries, bank_rows, dim, at<const float>(query_data), at<const void>(bank_data),
             bank_is_half, method, groups_of(query_groups, bank_groups, rows_per_group), neighbours,
             at<const int64_t>(ids), first_row, at<float>(squared), at<int64_t>(indices),
             at<void>(workspace), workspace_limit, &seems_finite},
            context);
        return seems_finite;
      },
      py::arg("queries"), py::arg("bank_rows"), py::arg("dim"), py::arg("query_data"),
      py::arg("bank_data"), py::arg("bank_is_half"), py::arg("method"), py::arg("query_groups"),
      py::arg("bank_groups"), py::arg("rows_per_group"), py::arg("neighbours"), py::arg("ids"),
      py::arg("first_row"), py::arg("squared"), py::arg("indices"), py::arg("workspace"),
      py::arg("workspace_limit"), py::arg("context"), release);
  module.def("nearest_workspace", backend.nearest_workspace, py::arg("queries"), py::arg("rows"),
             py::arg("dim"), py::arg("method"), py::arg("has_groups"), py::arg("neighbours"),
             py::arg("limit"));
  module.def(
      "finish_search",
      [backend](int64_t count, Pointer distances, Pointer indices, Context context) {
        backend.finish_search({count, at<float>(distances), at<int64_t>(indices)}, context);
      },
      py::arg("count"), py::arg("distances"), py::arg("indices"), py::arg("context"), release);
  module.def(
      "crop_pairs",
      [backend](int64_t images, int64_t channels, int64_t height, int64_t width, int64_t pairs,
                int64_t size, psvdd::PairKind kind, int64_t first_pair, int64_t max_redraws,
                uint64_t seed, uint32_t step, float colour_shift, float pixel_noise, Pointer pixels,
                Pointer mean, Pointer image_of, Pointer patches, Pointer corners, Pointer labels,
                Context context) {
        backend.crop_pairs(
            {images, channels, height, width, pairs, size, kind, first_pair, max_redraws, seed,
             step, colour_shift, pixel_noise, at<const uint8_t>(pixels), at<const float>(mean),
             at<const int64_t>(image_of), at<float>(patches), at<int64_t>(corners),
             at<int64_t>(labels)},
            context);
      },
      py::arg("images"), py::arg("channels"), py::arg("height"), py::arg("width"), py::arg("pairs"),
      py::arg("size"), py::arg("kind"), py::arg("first_pair"), py::arg("max_redraws"),
      py::arg("seed"), py::arg("step"), py::arg("colour_shift"), py::arg("pixel_noise"),
      py::arg("pixels"), py::arg("mean"), py::arg("image_of"), py::arg("patches"),
      py::arg("corners"), py::arg("labels"), py::arg("context"), release);
}

// The progress callback of the searches that this thread starts; a borrowed reference or null.
thread_local PyObject* progress_callback = nullptr;

void watch_search(double share_done) {
  const py::gil_scoped_acquire acquire;
  if (PyErr_CheckSignals() != 0) throw py::error_already_set();
  if (progress_callback != nullptr) py::handle{progress_callback}(share_done);
}

}  // namespace

PYBIND11_MODULE(PSVDD_MODULE_NAME, module) {
  module.doc() = "Kernels of patchsvdd_fast, on raw pointers. Use patchsvdd_fast.ops instead.";

  // Local types, so that the test module built from this file can be loaded beside this one.
  py::enum_<psvdd::PixelType>(module, "PixelType", py::module_local())
      .value("UINT8", psvdd::PixelType::kUint8)
      .value("FLOAT16", psvdd::PixelType::kFloat16)
      .value("FLOAT32", psvdd::PixelType::kFloat32);

  py::enum_<psvdd::SearchMethod>(module, "SearchMethod", py::module_local())
      .value("AUTO", psvdd::SearchMethod::kAuto)
      .value("PLAIN", psvdd::SearchMethod::kPlain)
      .value("SCREENED", psvdd::SearchMethod::kScreened);

  py::enum_<psvdd::PairKind>(module, "PairKind", py::module_local())
      .value("POSITION", psvdd::PairKind::kPosition)
      .value("NEIGHBOUR", psvdd::PairKind::kNeighbour)
      .value("VIEW", psvdd::PairKind::kView);

  py::class_<psvdd::PatchGrid>(module, "PatchGrid", py::module_local())
      .def(py::init([](int64_t images, int64_t channels, int64_t height, int64_t width,
                       int64_t rows, int64_t columns, int64_t size, int64_t stride) {
             return psvdd::PatchGrid{images, channels, height, width, rows, columns, size, stride};
           }),
           py::arg("images"), py::arg("channels"), py::arg("height"), py::arg("width"),
           py::arg("rows"), py::arg("columns"), py::arg("size"), py::arg("stride"));

  auto cpu = module.def_submodule("cpu");
  define_backend<int>(cpu, {psvdd::cpu::extract_patches, psvdd::cpu::extract_patches_backward,
                            psvdd::cpu::score_map, psvdd::cpu::nearest, psvdd::cpu::finish_search,
                            [](int64_t, int64_t, int64_t, psvdd::SearchMethod, bool, int, int64_t) {
                              return int64_t{0};
                            },
                            psvdd::cpu::crop_pairs});
  cpu.def("instruction_sets", psvdd::cpu::instruction_sets);
  cpu.def("instruction_set", psvdd::cpu::instruction_set);
  define_cpu_banks(cpu);
  cpu.def(
      "first_bad_row",
      [](Pointer data, int64_t rows, int64_t dim, bool is_half, int context) {
        return psvdd::cpu::first_bad_row(at<const void>(data), rows, dim, is_half, context);
      },
      py::arg("data"), py::arg("rows"), py::arg("dim"), py::arg("is_half"), py::arg("context"),
      py::call_guard<py::gil_scoped_release>());
  psvdd::cpu::watch_hook = watch_search;
  // Returns the callback that was set before; the caller keeps both alive.
  cpu.def(
      "set_progress",
      [](const py::object& callback) {
        const py::object before = progress_callback == nullptr
                                      ? py::none()
                                      : py::reinterpret_borrow<py::object>(progress_callback);
        progress_callback = callback.is_none() ? nullptr : callback.ptr();
        return before;
      },
      py::arg("callback").none(true));
  cpu.def("set_instruction_set", psvdd::cpu::set_instruction_set, py::arg("name"));

#if defined(PSVDD_WITH_CUDA)
  auto cuda = module.def_submodule("cuda");
  define_backend<std::uintptr_t>(
      cuda, {psvdd::cuda::extract_patches, psvdd::cuda::extract_patches_backward,
             psvdd::cuda::score_map, psvdd::cuda::nearest, psvdd::cuda::finish_search,
             psvdd::cuda::nearest_workspace, psvdd::cuda::crop_pairs});
  define_gpu_banks(cuda);
#if defined(PSVDD_CUDA_ON_HOST)
  cuda.def("set_schedule", cuda_on_host::set_schedule, py::arg("seed"));
#endif
  module.attr("cuda_architectures") = PSVDD_CUDA_ARCHITECTURES;
#else
  module.attr("cuda") = py::none();
  module.attr("cuda_architectures") = "";
#endif
}
