// Exact nearest neighbour by the canonical squared distance (csrc/cpu/nearest.cpp), brute force.
//
// The bank is taken in chunks, and for each the queries in chunks:
//   1. encode   both are rounded to float16 about the bank chunk's centre (screen_encode.cu);
//   2. screen   per query and segment of 256 rows, the largest q b - |b|^2 / 2, by tensor cores;
//   3. bound    the least upper bound that these give on each query's distance;
//   4. keep     per segment, the queries that may have their nearest row in it, a list written over
//               the maxima it was made from;
//   5. rescore  listed pairs canonically (rescore.cu); the least (distance, row) per query is kept
//               by a 64-bit atomic minimum, which does not depend on any order.
// Where groups exclude rows, 4 and 5 take segments in ranges, each with the limits that those
// before have found. A plain search is step 5 alone, for all pairs: without tensor cores, where the
// search is small (nearest_plan.h), or where the caller wants it. bounds.h has the proof that what
// is skipped cannot win.
//
// Traffic per bank chunk and query chunk: the bank's codes once per 256 queries (from the second-
// level cache), 12 bytes per query and segment for the maxima. Bound by the tensor cores.

#include "bounds.h"
#include "kernels.h"
#include "nearest_k.h"
#include "nearest_plan.h"
#include "ptx.h"

namespace psvdd::cuda {
namespace {

const void* row_of(const void* data, bool is_half, int64_t row, int64_t dim) {
  return static_cast<const unsigned char*>(data) + row * dim * (is_half ? 2 : 4);
}

}  // namespace

int64_t nearest_workspace(int64_t queries, int64_t rows, int64_t dim, SearchMethod method,
                          bool has_groups, int neighbours, int64_t limit) {
  const int64_t of_lists = k_nearest_workspace(queries, rows, neighbours, limit);
  if (neighbours > 1) return of_lists;
  Workspace workspace(nullptr);
  Arrays(Plan(queries, rows, dim, method, limit), queries, dim, has_groups, &workspace);
  return std::max(workspace.bytes(), of_lists);  // for rows with ids or without
}

void nearest(const NearestParams& params, std::uintptr_t stream) {
  if (params.queries == 0) return;
  if (params.k > 1 || params.ids != nullptr) return k_nearest(params, stream);
  check_rows(params.bank_rows);
  const bool has_groups = params.groups.query_groups != nullptr;
  Plan plan(params.queries, params.bank_rows, params.dim, params.method, params.workspace_limit);
  Workspace workspace(params.workspace);
  const Arrays arrays(plan, params.queries, params.dim, has_groups, &workspace);
  plan.is_screened = plan.is_screened && has_tensor_cores();

  clear_keys(arrays.keys, params.queries, stream);
  for (int64_t row = 0; row < params.bank_rows; row += plan.bank_chunk) {
    const Vectors bank{row_of(params.bank_data, params.bank_is_half, row, params.dim),
                       params.bank_is_half, std::min(plan.bank_chunk, params.bank_rows - row),
                       params.dim};
    const int64_t segments = bank.segments();
    Rescore todo{};
    todo.bank = bank;
    todo.end_segment = segments;
    todo.first_row = row;
    todo.groups = params.groups;
    if (plan.is_screened) {
      find_frame(bank, arrays.frame, stream);
      encode(bank, arrays.frame, arrays.bank, arrays.segments, stream);
      find_segment_groups(todo, arrays.segment_groups, stream);
    }
    for (int64_t q = 0; q < params.queries; q += plan.query_chunk) {
      const Vectors queries{params.query_data + q * params.dim, false,
                            std::min(plan.query_chunk, params.queries - q), params.dim};
      todo.queries = queries;
      todo.groups = params.groups.from_query(q);
      todo.keys = arrays.keys + q;
      if (plan.is_screened) {
        const int64_t tiles = (queries.rows + kQueryTile - 1) / kQueryTile;
        const Bounds bounds{arrays.queries,
                            queries.rows,
                            tiles * kQueryTile,
                            arrays.segments,
                            segments,
                            todo.groups,
                            arrays.segment_groups,
                            arrays.frame.largest,
                            todo.keys,
                            screen_rounding(arrays.bank.padded_dim),
                            canonical_rounding(params.dim),
                            arrays.maxima,
                            arrays.counts,
                            arrays.limits};
        encode(queries, arrays.frame, arrays.queries, {nullptr, nullptr}, stream);
        screen(arrays.queries, tiles, arrays.bank, segments, {nullptr, nullptr}, arrays.maxima,
               stream);
        rescore_kept(bounds, todo, stream);
      } else {
        rescore(todo, stream);
      }
    }
  }
  offer_results(arrays.keys, params.queries, params.first_row, params.squared, params.indices,
                stream);
}

}  // namespace psvdd::cuda
