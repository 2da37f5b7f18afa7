// The Python face of banks with codes or clusters, of searches within a radius, and of coresets.

#include "bindings.h"
#include "cpu/kernels.h"
#include "cpu/matches.h"
#if defined(PSVDD_WITH_CUDA)
#include "cuda/kernels.h"
#endif

namespace psvdd::bindings {
namespace {

// The CPU's bank with codes.
void define_codes(py::module_ cpu) {
  const auto release = py::call_guard<py::gil_scoped_release>();
  py::class_<psvdd::Projection>(cpu, "Projection", py::module_local())
      .def(py::init([](int64_t dim, int64_t axes, Pointer mean, Pointer basis, double stretch) {
             return psvdd::Projection{dim, axes, at<const float>(mean), at<const float>(basis),
                                      stretch};
           }),
           py::arg("dim"), py::arg("axes"), py::arg("mean"), py::arg("basis"), py::arg("stretch"));
  py::class_<psvdd::RowCodes>(cpu, "RowCodes", py::module_local())
      .def(py::init([](int64_t block_rows, Pointer codes, Pointer bias, Pointer centres,
                       Pointer scales, Pointer slack) {
             return psvdd::RowCodes{block_rows,         at<int8_t>(codes), at<int32_t>(bias),
                                    at<float>(centres), at<float>(scales), at<float>(slack)};
           }),
           py::arg("block_rows"), py::arg("codes"), py::arg("bias"), py::arg("centres"),
           py::arg("scales"), py::arg("slack"));
  py::class_<psvdd::LeadingAxes>(cpu, "LeadingAxes", py::module_local())
      .def(py::init([](const psvdd::Projection& projection, float error) {
             return psvdd::LeadingAxes{projection, error};
           }),
           py::arg("projection"), py::arg("error"));
  py::class_<psvdd::CodedRows>(cpu, "CodedRows", py::module_local())
      .def(py::init([](int64_t rows, int64_t dim, Pointer data, bool is_half,
                       const psvdd::RowCodes& codes, const psvdd::LeadingAxes& leading_axes,
                       const psvdd::RowCodes& leading) {
             return psvdd::CodedRows{rows,         dim,    at<const void>(data), is_half, codes,
                                     leading_axes, leading};
           }),
           py::arg("rows"), py::arg("dim"), py::arg("data"), py::arg("is_half"), py::arg("codes"),
           py::arg("leading_axes"), py::arg("leading"));
  cpu.def("code_block_rows", psvdd::cpu::code_block_rows, py::arg("dim"));
  cpu.def(
      "leading_images",
      [](const psvdd::LeadingAxes& leading_axes, int64_t rows, Pointer data, bool is_half,
         Pointer images, Pointer errors, int context) {
        psvdd::cpu::leading_images({leading_axes, rows, at<const void>(data), is_half,
                                    at<float>(images), at<float>(errors)},
                                   context);
      },
      py::arg("leading_axes"), py::arg("rows"), py::arg("data"), py::arg("is_half"),
      py::arg("images"), py::arg("errors"), py::arg("context"), release);
  cpu.def("encode_rows", psvdd::cpu::encode_rows, py::arg("bank"), py::arg("context"), release);
  cpu.def(
      "nearest_in_codes",
      [](const psvdd::CodedRows& bank, psvdd::SearchMethod method, int64_t queries,
         Pointer query_data, Pointer query_groups, Pointer bank_groups, int64_t rows_per_group,
         int neighbours, Pointer squared, Pointer indices, psvdd::cpu::Matches* matches,
         int context) {
        psvdd::cpu::nearest_in_codes(
            {bank, method, groups_of(query_groups, bank_groups, rows_per_group), queries,
             at<const float>(query_data), neighbours, at<float>(squared), at<int64_t>(indices)},
            context, matches);
      },
      py::arg("bank"), py::arg("method"), py::arg("queries"), py::arg("query_data"),
      py::arg("query_groups"), py::arg("bank_groups"), py::arg("rows_per_group"),
      py::arg("neighbours"), py::arg("squared"), py::arg("indices"), py::arg("matches").none(true),
      py::arg("context"), release);
}

// The CPU's clustered bank: the structs as they are, pointers as integers.
void define_clusters(py::module_ cpu) {
  const auto release = py::call_guard<py::gil_scoped_release>();
  py::class_<psvdd::ClusteredBank>(cpu, "ClusteredBank", py::module_local())
      .def(py::init([](const psvdd::Projection& projection, int64_t rows, int64_t clusters,
                       int64_t packs, Pointer data, bool is_half, Pointer ids, Pointer starts,
                       Pointer blocks, Pointer codes, Pointer bias, Pointer block_radius,
                       Pointer centroids, Pointer scales, Pointer slack, Pointer code_slack,
                       Pointer reach, Pointer centroid_tiles, Pointer gaps) {
             return psvdd::ClusteredBank{projection,
                                         rows,
                                         clusters,
                                         packs,
                                         at<const void>(data),
                                         is_half,
                                         at<const int64_t>(ids),
                                         at<const int64_t>(starts),
                                         at<const int64_t>(blocks),
                                         at<int8_t>(codes),
                                         at<int32_t>(bias),
                                         at<float>(block_radius),
                                         at<const float>(centroids),
                                         at<float>(scales),
                                         at<float>(slack),
                                         at<float>(code_slack),
                                         at<float>(reach),
                                         at<float>(centroid_tiles),
                                         at<float>(gaps)};
           }),
           py::arg("projection"), py::arg("rows"), py::arg("clusters"), py::arg("packs"),
           py::arg("data"), py::arg("is_half"), py::arg("ids"), py::arg("starts"),
           py::arg("blocks"), py::arg("codes"), py::arg("bias"), py::arg("block_radius"),
           py::arg("centroids"), py::arg("scales"), py::arg("slack"), py::arg("code_slack"),
           py::arg("reach"), py::arg("centroid_tiles"), py::arg("gaps"));
  cpu.def(
      "project",
      [](const psvdd::Projection& projection, int64_t rows, Pointer data, bool is_half,
         Pointer projected, Pointer errors, int context) {
        psvdd::cpu::project({projection, rows, at<const void>(data), is_half, at<float>(projected),
                             at<float>(errors)},
                            context);
      },
      py::arg("projection"), py::arg("rows"), py::arg("data"), py::arg("is_half"),
      py::arg("projected"), py::arg("errors"), py::arg("context"), release);
  cpu.def(
      "pack_clusters",
      [](const psvdd::ClusteredBank& bank, Pointer projected, Pointer errors, Pointer radii,
         int context) {
        psvdd::cpu::pack_clusters(
            {bank, at<const float>(projected), at<const float>(errors), at<const float>(radii)},
            context);
      },
      py::arg("bank"), py::arg("projected"), py::arg("errors"), py::arg("radii"),
      py::arg("context"), release);
  cpu.def("link_clusters", psvdd::cpu::link_clusters, py::arg("bank"), py::arg("context"), release);
  cpu.def("release_memory", psvdd::cpu::release_memory, release);
  cpu.def(
      "nearest_in_clusters",
      [](const psvdd::ClusteredBank& bank, int64_t queries, Pointer query_data,
         Pointer query_groups, Pointer bank_groups, int64_t rows_per_group, int neighbours,
         Pointer squared, Pointer indices, psvdd::cpu::Matches* matches, int context) {
        int64_t scanned = 0;
        psvdd::cpu::nearest_in_clusters({bank, groups_of(query_groups, bank_groups, rows_per_group),
                                         queries, at<const float>(query_data), neighbours,
                                         at<float>(squared), at<int64_t>(indices), &scanned},
                                        context, matches);
        return scanned;
      },
      py::arg("bank"), py::arg("queries"), py::arg("query_data"), py::arg("query_groups"),
      py::arg("bank_groups"), py::arg("rows_per_group"), py::arg("neighbours"), py::arg("squared"),
      py::arg("indices"), py::arg("matches").none(true), py::arg("context"), release);
}

// Searches for all rows within a radius, and what the metrics take.
void define_within(py::module_ cpu) {
  const auto release = py::call_guard<py::gil_scoped_release>();
  using psvdd::cpu::Matches;
  py::class_<Matches>(cpu, "Matches", py::module_local())
      .def(py::init<int64_t>(), py::arg("most"))
      .def("total", &Matches::total)
      .def(
          "take",
          [](Matches& matches, int64_t queries, Pointer starts, Pointer squared, Pointer ids,
             int context) {
            matches.take(queries, at<int64_t>(starts), at<float>(squared), at<int64_t>(ids),
                         context);
          },
          py::arg("queries"), py::arg("starts"), py::arg("squared"), py::arg("ids"),
          py::arg("context"), release);
  cpu.def(
      "within",
      [](int64_t queries, int64_t bank_rows, int64_t dim, Pointer query_data, Pointer bank_data,
         bool bank_is_half, psvdd::SearchMethod method, Pointer query_groups, Pointer bank_groups,
         int64_t rows_per_group, int64_t first_row, Pointer limits, Matches& matches, int context) {
        psvdd::NearestParams params{};
        params.queries = queries;
        params.bank_rows = bank_rows;
        params.dim = dim;
        params.query_data = at<const float>(query_data);
        params.bank_data = at<const void>(bank_data);
        params.bank_is_half = bank_is_half;
        params.method = method;
        params.groups = groups_of(query_groups, bank_groups, rows_per_group);
        params.k = 1;
        params.first_row = first_row;
        params.squared = at<float>(limits);
        return psvdd::cpu::within(params, &matches, context);
      },
      py::arg("queries"), py::arg("bank_rows"), py::arg("dim"), py::arg("query_data"),
      py::arg("bank_data"), py::arg("bank_is_half"), py::arg("method"), py::arg("query_groups"),
      py::arg("bank_groups"), py::arg("rows_per_group"), py::arg("first_row"), py::arg("limits"),
      py::arg("matches"), py::arg("context"), release);
  cpu.def(
      "squared_limits",
      [](int64_t count, Pointer radii, bool is_cosine, Pointer limits) {
        psvdd::cpu::squared_limits(count, at<const float>(radii), is_cosine, at<float>(limits));
      },
      py::arg("count"), py::arg("radii"), py::arg("is_cosine"), py::arg("limits"), release);
  cpu.def(
      "finish_cosine_search",
      [](int64_t count, Pointer distances, Pointer indices, int context) {
        psvdd::cpu::finish_cosine_search({count, at<float>(distances), at<int64_t>(indices)},
                                         context);
      },
      py::arg("count"), py::arg("distances"), py::arg("indices"), py::arg("context"), release);
  cpu.def(
      "normalise",
      [](int64_t rows, int64_t dim, Pointer data, Pointer normalised, int context) {
        return psvdd::cpu::normalise({rows, dim, at<const float>(data), at<float>(normalised)},
                                     context);
      },
      py::arg("rows"), py::arg("dim"), py::arg("data"), py::arg("normalised"), py::arg("context"),
      release);
}

void define_coreset(py::module_ cpu) {
  cpu.def(
      "coreset",
      [](int64_t rows, int64_t dim, int64_t count, int64_t first, Pointer data, bool is_half,
         psvdd::SearchMethod method, Pointer projected, Pointer errors, int64_t axes,
         double stretch, float scale, Pointer chosen, Pointer distances, int context) {
        float radius = 0;
        psvdd::cpu::coreset({rows, dim, count, first, at<const void>(data), is_half, method,
                             at<const float>(projected), at<const float>(errors), axes, stretch,
                             scale, at<int64_t>(chosen), at<float>(distances), &radius},
                            context);
        return radius;
      },
      py::arg("rows"), py::arg("dim"), py::arg("count"), py::arg("first"), py::arg("data"),
      py::arg("is_half"), py::arg("method"), py::arg("projected"), py::arg("errors"),
      py::arg("axes"), py::arg("stretch"), py::arg("scale"), py::arg("chosen"),
      py::arg("distances"), py::arg("context"), py::call_guard<py::gil_scoped_release>());
}

}  // namespace

void define_cpu_banks(py::module_ cpu) {
  define_within(cpu);  // first: others take its Matches
  define_codes(cpu);
  define_clusters(cpu);
  define_coreset(cpu);
}

#if defined(PSVDD_WITH_CUDA)
void define_gpu_banks(py::module_ cuda) {
  const auto release = py::call_guard<py::gil_scoped_release>();
  using psvdd::SegmentedBank;
  py::class_<SegmentedBank>(cuda, "SegmentedBank", py::module_local())
      .def(py::init([](int64_t rows, int64_t dim, int64_t clusters, int64_t segments, Pointer data,
                       bool is_half, Pointer ids, Pointer segment_starts, Pointer segment_clusters,
                       Pointer cluster_segments, Pointer least_radius, Pointer largest_radius,
                       Pointer centroids, Pointer gaps, Pointer centre, Pointer largest,
                       Pointer halves, Pointer squares, Pointer errors, Pointer segment_norms,
                       Pointer segment_errors) {
             return SegmentedBank{rows,
                                  dim,
                                  clusters,
                                  segments,
                                  at<const void>(data),
                                  is_half,
                                  at<const int64_t>(ids),
                                  at<const int64_t>(segment_starts),
                                  at<const int32_t>(segment_clusters),
                                  at<const int32_t>(cluster_segments),
                                  at<const float>(least_radius),
                                  at<const float>(largest_radius),
                                  at<const float>(centroids),
                                  at<const float>(gaps),
                                  at<float>(centre),
                                  at<float>(largest),
                                  at<uint16_t>(halves),
                                  at<float>(squares),
                                  at<float>(errors),
                                  at<float>(segment_norms),
                                  at<float>(segment_errors)};
           }),
           py::arg("rows"), py::arg("dim"), py::arg("clusters"), py::arg("segments"),
           py::arg("data"), py::arg("is_half"), py::arg("ids"), py::arg("segment_starts"),
           py::arg("segment_clusters"), py::arg("cluster_segments"), py::arg("least_radius"),
           py::arg("largest_radius"), py::arg("centroids"), py::arg("gaps"), py::arg("centre"),
           py::arg("largest"), py::arg("halves"), py::arg("squares"), py::arg("errors"),
           py::arg("segment_norms"), py::arg("segment_errors"));
  cuda.def(
      "coreset_steps",
      [](int64_t rows, int64_t dim, Pointer data, bool is_half, int64_t begin, int64_t end,
         Pointer squared, Pointer keys, std::uintptr_t context) {
        psvdd::cuda::coreset_steps({rows, dim, at<const void>(data), is_half, begin, end,
                                    at<float>(squared), at<uint64_t>(keys)},
                                   context);
      },
      py::arg("rows"), py::arg("dim"), py::arg("data"), py::arg("is_half"), py::arg("begin"),
      py::arg("end"), py::arg("squared"), py::arg("keys"), py::arg("context"), release);
  cuda.attr("SEGMENT_ROWS") = psvdd::cuda::kSegmentRows;
  cuda.def("visit_tile", psvdd::cuda::visit_tile, py::arg("dim"));
  cuda.def("padded_dim", psvdd::cuda::padded_dim, py::arg("dim"));
  cuda.def("encode_segments", psvdd::cuda::encode_segments, py::arg("bank"), py::arg("context"),
           release);
  cuda.def("nearest_in_segments_workspace", psvdd::cuda::nearest_in_segments_workspace,
           py::arg("bank"), py::arg("queries"), py::arg("limit"));
  cuda.def(
      "nearest_in_segments",
      [](const SegmentedBank& bank, int64_t queries, Pointer query_data, Pointer own,
         Pointer own_starts, Pointer query_groups, Pointer bank_groups, int64_t rows_per_group,
         Pointer squared, Pointer indices, Pointer workspace, int64_t workspace_limit,
         Pointer visits, std::uintptr_t context) {
        psvdd::cuda::nearest_in_segments(
            {bank, groups_of(query_groups, bank_groups, rows_per_group), queries,
             at<const float>(query_data), at<const int64_t>(own), at<const int64_t>(own_starts),
             at<float>(squared), at<int64_t>(indices), at<void>(workspace), workspace_limit,
             at<int64_t>(visits)},
            context);
      },
      py::arg("bank"), py::arg("queries"), py::arg("query_data"), py::arg("own"),
      py::arg("own_starts"), py::arg("query_groups"), py::arg("bank_groups"),
      py::arg("rows_per_group"), py::arg("squared"), py::arg("indices"), py::arg("workspace"),
      py::arg("workspace_limit"), py::arg("visits"), py::arg("context"), release);
}
#endif

}  // namespace psvdd::bindings
