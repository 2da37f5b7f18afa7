// Exact nearest neighbour in a clustered bank on the GPU, the twin of
// csrc/cpu/nearest_in_clusters.cpp.
//
// Queries come sorted by their nearest centroid (their own), and centroids are numbered so that
// neighbours are near: queries that share a list (visit_tile) want much the same clusters.
//   1. rescore  every query canonically against its own cluster, which gives a good limit;
//   2. measure  the distances of all queries to all centroids, in fp32 from differences;
//   3. others   queries whose own cluster holds only rows that they may not match are rescored
//               against the nearest cluster that holds others, to have a limit, too;
//   4. visits   per list, the segments that may hold something nearer for any of its queries: not
//               ruled out by the cluster's radius, the half-plane between the centroids, or the
//               ring of distances to the centroid that the segment's rows lie in;
//   5. screen, bound, keep, rescore as in nearest.cu, only where there are visits.
// docs/design/gpu-search.md has the bounds of step 4, docs/design/cpu-search.md their proofs.
// On real embeddings, a query alone wants 1 to 2 % of the bank, 64 together 11 to 14 %.

#include "bounds.h"
#include "kernels.h"
#include "nearest_plan.h"
#include "ptx.h"
#include "warp.h"

namespace psvdd::cuda {
namespace {

constexpr int kCentroidsAtOnce = 8;
// Below the least distance, squares have lost too much to rule anything out; beyond the largest
// limit, distances might have overflowed.
constexpr float kLeastDistance = 0x1p-50f;
constexpr float kLargestLimit = 1e17f;

// What the choice of segments to visit is made from, for one chunk of queries.
struct Pruning {
  SegmentedBank bank;
  Vectors queries;
  const int64_t* own;  // [queries], the nearest centroid of each
  const Key* keys;     // [queries], what has been found so far
  Groups groups;       // query_groups counts from the first query of the chunk
  SegmentGroups segment_groups;
  float rounding;   // relative error allowed for in distances, several times what it can be
  float canonical;  // canonical_rounding
  int64_t padded_queries;
  float* to_centroids;         // [C, padded_queries]
  int visit_tile;              // queries that share a list
  int32_t* lists;              // [padded_queries / visit_tile, S], segments to visit
  int32_t* counts;             // [padded_queries / visit_tile], of segments in each list
  unsigned long long* visits;  // SegmentedNearestParams::visits
};

// The distances of all queries to all centroids. A warp takes eight centroids at a time, its lanes
// 32 queries: [C, padded_queries] is written in whole lines. Bound by the fp32 units.
__global__ void measure_centroids(Pruning params) {
  const int64_t dim = params.bank.dim;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t warp = blockIdx.y * int64_t{kWarpsPerBlock} + threadIdx.x / kWarp;
  const int64_t query = blockIdx.x * int64_t{kWarp} + lane;
  const int64_t last_query = params.queries.rows - 1;
  const float* vector = static_cast<const float*>(params.queries.data) +
                        (query < last_query ? query : last_query) * dim;
  const int64_t step = int64_t{gridDim.y} * kWarpsPerBlock * kCentroidsAtOnce;
  for (int64_t first = warp * kCentroidsAtOnce; first < params.bank.clusters; first += step) {
    const float* centroids[kCentroidsAtOnce];
    float sums[kCentroidsAtOnce];
#pragma unroll
    for (int i = 0; i < kCentroidsAtOnce; ++i) {
      const int64_t last = params.bank.clusters - 1;
      centroids[i] = params.bank.centroids + (first + i < last ? first + i : last) * dim;
      sums[i] = 0.0f;
    }
    for (int64_t j = 0; j < dim; ++j) {
      const float q = vector[j];
#pragma unroll
      for (int i = 0; i < kCentroidsAtOnce; ++i) {
        const float difference = q - centroids[i][j];
        sums[i] = fmaf(difference, difference, sums[i]);
      }
    }
#pragma unroll
    for (int i = 0; i < kCentroidsAtOnce; ++i) {
      if (first + i < params.bank.clusters) {
        params.to_centroids[(first + i) * params.padded_queries + query] = sqrtf(sums[i]);
      }
    }
  }
}

// Whether cluster c holds rows of another group.
__device__ bool holds_other_groups(const Pruning& params, int64_t c, int64_t group) {
  for (int s = params.bank.cluster_segments[c]; s < params.bank.cluster_segments[c + 1]; ++s) {
    if (!params.segment_groups.holds_only(s, group)) return true;
  }
  return false;
}

// A thread per query: one that has found nothing is listed for the segments of the nearest cluster
// with rows of another group. lists: [S, padded_queries]; counts: [S], how many each has; they
// start at 0.
__global__ void list_for_other_clusters(Pruning params, int32_t* lists, int32_t* counts) {
  for (int64_t q = first_element(); q < params.queries.rows; q += element_step()) {
    if (params.keys[q] != kNothingYet) continue;
    const int64_t group = params.groups.query_groups[q];
    int64_t nearest = -1;
    float least = INFINITY;
    for (int64_t c = 0; c < params.bank.clusters; ++c) {
      const float distance = params.to_centroids[c * params.padded_queries + q];
      if ((nearest < 0 || distance < least) && holds_other_groups(params, c, group)) {
        nearest = c;
        least = distance;
      }
    }
    if (nearest < 0) continue;  // the bank holds only its own group
    const int32_t* segments = params.bank.cluster_segments + nearest;
    for (int64_t s = segments[0]; s < segments[1]; ++s) {
      if (params.segment_groups.holds_only(s, group)) continue;
      lists[s * params.padded_queries + atomicAdd(counts + s, 1)] = static_cast<int32_t>(q);
    }
  }
}

__global__ void clear_counts(int32_t* counts, int64_t count) {
  for (int64_t s = first_element(); s < count; s += element_step()) counts[s] = 0;
}

// What a lane knows of one query of the tile.
struct TileQuery {
  float limit;  // distance beyond which nothing wins; negative: no query, or no row to find
  float own_distance;
  int own;  // the nearest centroid
};

// Whether cluster c may hold something within the query's limit.
__device__ bool cluster_may_win(const Pruning& params, const TileQuery& query, int64_t c,
                                float distance) {
  if (!(query.limit < kLargestLimit)) return true;
  const float low = distance * (1.0f - params.rounding);
  if (!(low > kLeastDistance)) return true;
  const float radius = params.bank.largest_radius[params.bank.cluster_segments[c + 1] - 1];
  const float grown_radius = radius * (1.0f + params.rounding);
  if (low > (query.limit + grown_radius) * kRoundUp) return false;
  // Rows are nearer to c than to the query's own centroid, but for the rounding of the assignment.
  const float own = query.own_distance * (1.0f + params.rounding);
  const float behind = low * low - own * own - 4.0f * params.rounding * grown_radius * grown_radius;
  const float gap = params.bank.gaps[query.own * params.bank.clusters + c];
  return !(behind > 2.0f * gap * query.limit * kRoundUp);
}

// Whether the segment may, whose rows all lie in a ring about their centroid: by the triangle
// inequality none is nearer than the query is to the ring.
__device__ bool segment_may_win(const Pruning& params, const TileQuery& query, int64_t segment,
                                float distance) {
  if (!(query.limit < kLargestLimit)) return true;
  const float low = distance * (1.0f - params.rounding);
  if (!(low > kLeastDistance)) return true;
  const float outer = params.bank.largest_radius[segment] * (1.0f + params.rounding);
  const float inner = params.bank.least_radius[segment] * (1.0f - params.rounding);
  const float high = distance * (1.0f + params.rounding);
  const float limit = query.limit * kRoundUp;
  return !(low - outer > limit || inner - high > limit);
}

// Fills in the lists of segments to visit. A block takes a tile of queries and a share of the
// clusters (shares are numbered along y); each of its warps takes clusters of its own and looks at
// the tile's queries 32 at a time, for each segment until one of them wants it.
__global__ void find_visits(Pruning params) {
  auto* shared = reinterpret_cast<TileQuery*>(shared_memory());  // [visit_tile]
  const int64_t tile_start = blockIdx.x * int64_t{params.visit_tile};
  const int rounds = params.visit_tile / kWarp;  // a warp looks at 32 of the queries in each
  if (static_cast<int>(threadIdx.x) < params.visit_tile) {
    const int64_t q = tile_start + threadIdx.x;
    TileQuery query{-1.0f, 0.0f, 0};
    if (q < params.queries.rows && params.keys[q] != kNothingYet) {
      const float squared = squared_of(params.keys[q]);
      query.limit = sqrtf(squared) * (kRoundUp + 4.0f * params.canonical) +
                    0x1p-69f * sqrtf(static_cast<float>(params.bank.dim + 16));
      if (!(squared < INFINITY)) query.limit = INFINITY;
      query.own = static_cast<int>(params.own[q]);
      query.own_distance = params.to_centroids[query.own * params.padded_queries + q];
    }
    shared[threadIdx.x] = query;
  }
  __syncthreads();
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t step = int64_t{gridDim.y} * kWarpsPerBlock;
  for (int64_t c = blockIdx.y * int64_t{kWarpsPerBlock} + threadIdx.x / kWarp;
       c < params.bank.clusters; c += step) {
    const float* distances = params.to_centroids + c * params.padded_queries + tile_start;
    unsigned wanting = 0;  // of this lane's queries, those that may want the cluster: a bit a round
    for (int round = 0; round < rounds; ++round) {
      const TileQuery query = shared[round * kWarp + lane];
      const bool wants = !(query.limit < 0.0f) && query.own != c &&
                         cluster_may_win(params, query, c, distances[round * kWarp + lane]);
      wanting |= wants ? 1u << round : 0u;
    }
    if (__ballot_sync(kAllLanes, wanting != 0) == 0) continue;
    for (int s = params.bank.cluster_segments[c]; s < params.bank.cluster_segments[c + 1]; ++s) {
      bool wants = false;
      for (int round = 0; round < rounds && !wants; ++round) {
        if ((wanting >> round & 1u) == 0) continue;
        wants = segment_may_win(params, shared[round * kWarp + lane], s,
                                distances[round * kWarp + lane]);
      }
      if (__ballot_sync(kAllLanes, wants) == 0 || lane != 0) continue;
      const int position = atomicAdd(params.counts + blockIdx.x, 1);
      params.lists[blockIdx.x * params.bank.segments + position] = s;
      if (params.visits != nullptr) atomicAdd(params.visits, 1ull);
    }
  }
}

// Before anything is visited: maxima that rule out every segment, and empty lists.
__global__ void clear_visits(Pruning params, float* maxima, int64_t count) {
  for (int64_t e = first_element(); e < count; e += element_step()) {
    maxima[e] = -INFINITY;
    if (e < params.padded_queries / params.visit_tile) params.counts[e] = 0;
  }
}

// How a search is cut so that its scratch stays near a limit, in bytes.
struct SegmentPlan {
  int64_t query_chunk;  // queries

  SegmentPlan(const SegmentedBank& bank, int64_t queries, int64_t limit) {
    const int64_t bytes = (bank.segments + bank.clusters) * 4 + padded_dim(bank.dim) * 2;
    query_chunk = chunk_of(queries, limit / bytes);
  }
};

// The scratch arrays of a search.
struct SegmentArrays {
  Key* keys;  // [queries]
  Codes queries;
  SegmentGroups segment_groups;
  float* maxima;          // [S, query chunk]; becomes lists, as in nearest_plan.h
  float* to_centroids;    // [C, query chunk]
  int32_t* visit_lists;   // [lists, S]
  int32_t* visit_counts;  // [lists]
  int32_t* counts;        // [S], of the queries in each of those lists
  unsigned* limits;       // [query chunk], upper bounds on distances, as the bits of floats

  SegmentArrays(const SegmentPlan& plan, const SegmentedBank& bank, int64_t num_queries,
                Workspace* workspace) {
    const int64_t chunk = plan.query_chunk;
    keys = workspace->take<Key>(num_queries);
    queries = take_codes(workspace, chunk, padded_dim(bank.dim));
    segment_groups = {workspace->take<int64_t>(2 * bank.segments)};
    maxima = workspace->take<float>(bank.segments * chunk);
    to_centroids = workspace->take<float>(bank.clusters * chunk);
    const int64_t lists = chunk / visit_tile(bank.dim);
    visit_lists = workspace->take<int32_t>(lists * bank.segments);
    visit_counts = workspace->take<int32_t>(lists);
    counts = workspace->take<int32_t>(bank.segments);
    limits = workspace->take<unsigned>(chunk);
  }
};

Vectors rows_of(const SegmentedBank& bank) {
  return {bank.data, bank.is_half, bank.rows, bank.dim, bank.segment_starts, bank.segments};
}

Codes codes_of(const SegmentedBank& bank) {
  return {padded_dim(bank.dim), bank.halves, bank.squares, bank.errors};
}

// Step 3. The lists lie where the maxima will.
void rescore_in_other_clusters(const Pruning& pruning, const SegmentArrays& arrays, Rescore pairs,
                               std::uintptr_t stream) {
  auto* lists = reinterpret_cast<int32_t*>(arrays.maxima);
  launch_elements(PSVDD_KERNEL(clear_counts), arrays.counts, pruning.bank.segments, stream);
  launch(PSVDD_KERNEL(list_for_other_clusters), {blocks_for(pairs.queries.rows), kThreadsPerBlock},
         stream, pruning, lists, arrays.counts);
  pairs.lists = lists;
  pairs.counts = arrays.counts;
  pairs.list_pitch = pruning.padded_queries;
  rescore(pairs, stream);
}

}  // namespace

void encode_segments(const SegmentedBank& bank, std::uintptr_t stream) {
  const Frame frame{bank.centre, bank.largest};
  find_frame(rows_of(bank), frame, stream);
  encode(rows_of(bank), frame, codes_of(bank), {bank.segment_norms, bank.segment_errors}, stream);
}

int64_t nearest_in_segments_workspace(const SegmentedBank& bank, int64_t queries, int64_t limit) {
  Workspace workspace(nullptr);
  SegmentArrays(SegmentPlan(bank, queries, limit), bank, queries, &workspace);
  return workspace.bytes();
}

void nearest_in_segments(const SegmentedNearestParams& params, std::uintptr_t stream) {
  if (params.queries == 0) return;
  const SegmentedBank& bank = params.bank;
  check_rows(bank.rows);
  const SegmentPlan plan(bank, params.queries, params.workspace_limit);
  Workspace workspace(params.workspace);
  const SegmentArrays arrays(plan, bank, params.queries, &workspace);
  const bool is_screened = has_tensor_cores();
  const Frame frame{bank.centre, bank.largest};

  Rescore of_bank{};
  of_bank.bank = rows_of(bank);
  of_bank.end_segment = bank.segments;
  of_bank.ids = bank.ids;
  of_bank.groups = params.groups;
  if (is_screened) find_segment_groups(of_bank, arrays.segment_groups, stream);

  clear_keys(arrays.keys, params.queries, stream);
  for (int64_t q = 0; q < params.queries; q += plan.query_chunk) {
    const int64_t count = std::min(plan.query_chunk, params.queries - q);
    const int64_t tiles = (count + kQueryTile - 1) / kQueryTile;
    const Vectors queries{params.query_data + q * bank.dim, false, count, bank.dim};
    Rescore todo = of_bank;
    todo.queries = queries;
    todo.groups = params.groups.from_query(q);
    todo.keys = arrays.keys + q;
    if (!is_screened) {
      rescore(todo, stream);
      continue;
    }
    Rescore in_own = todo;
    in_own.segment_clusters = bank.segment_clusters;
    in_own.own_starts = params.own_starts;
    in_own.first_query = q;
    rescore(in_own, stream);

    const float rounding = static_cast<float>(bank.dim + 16) * 0x1p-22f;
    const Pruning pruning{bank,
                          queries,
                          params.own + q,
                          todo.keys,
                          todo.groups,
                          arrays.segment_groups,
                          rounding,
                          canonical_rounding(bank.dim),
                          tiles * kQueryTile,
                          arrays.to_centroids,
                          static_cast<int>(visit_tile(bank.dim)),
                          arrays.visit_lists,
                          arrays.visit_counts,
                          reinterpret_cast<unsigned long long*>(params.visits)};
    const auto shares = [&](int64_t blocks, int64_t clusters_per_block) {
      const int64_t wanted = (8 * multiprocessors() + blocks - 1) / blocks;
      const int64_t most = (bank.clusters + clusters_per_block - 1) / clusters_per_block;
      return static_cast<unsigned>(std::clamp<int64_t>(wanted, 1, std::min<int64_t>(most, 65535)));
    };
    const int64_t warps = tiles * kQueryTile / kWarp;  // of queries
    const int64_t lists = tiles * kQueryTile / pruning.visit_tile;
    launch(PSVDD_KERNEL(measure_centroids),
           {dim3(static_cast<unsigned>(warps), shares(warps, kWarpsPerBlock * kCentroidsAtOnce)),
            kThreadsPerBlock},
           stream, pruning);
    if (params.groups.query_groups != nullptr) {
      rescore_in_other_clusters(pruning, arrays, todo, stream);
    }
    const int64_t maxima = bank.segments * tiles * kQueryTile;
    launch(PSVDD_KERNEL(clear_visits), {blocks_for(maxima), kThreadsPerBlock}, stream, pruning,
           arrays.maxima, maxima);
    launch(PSVDD_KERNEL(find_visits),
           {dim3(static_cast<unsigned>(lists), shares(lists, kWarpsPerBlock)), kThreadsPerBlock,
            pruning.visit_tile * sizeof(TileQuery)},
           stream, pruning);

    encode(queries, frame, arrays.queries, {nullptr, nullptr}, stream);
    screen(arrays.queries, tiles, codes_of(bank), bank.segments,
           {arrays.visit_lists, arrays.visit_counts}, arrays.maxima, stream);
    const Bounds bounds{arrays.queries,
                        count,
                        tiles * kQueryTile,
                        {bank.segment_norms, bank.segment_errors},
                        bank.segments,
                        todo.groups,
                        arrays.segment_groups,
                        bank.largest,
                        todo.keys,
                        screen_rounding(arrays.queries.padded_dim),
                        canonical_rounding(bank.dim),
                        arrays.maxima,
                        arrays.counts,
                        arrays.limits};
    rescore_kept(bounds, todo, stream);
  }
  offer_results(arrays.keys, params.queries, 0, params.squared, params.indices, stream);
}

}  // namespace psvdd::cuda
