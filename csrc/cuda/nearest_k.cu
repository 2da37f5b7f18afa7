// The k nearest neighbours by canonical distances (csrc/cpu/nearest.cpp), brute force.
//
// A block takes 32 queries, one per lane, and a share of the bank, eight rows to each of its four
// warps in turn. The k best rows that a warp has found for each of the queries are a list in shared
// memory. A lane knows the last neighbour of its own query's list; a row that comes before it is
// put in its place by the whole warp, one lane per neighbour. At the end the four lists of a query
// become one. Few queries make few blocks, so the bank is then cut into shares that fill the card,
// and a second kernel merges the lists of the shares.
//
// Neighbours are ordered by distance, then by number, and no two are equal; so the k first of them
// do not depend on the order in which they come, and the k first of all rows are among the k first
// of their shares.
//
// Traffic: bank rows once per 32 queries (from the second-level cache), lists of 12 k bytes once
// per query and share. Bound by the fp32 units, as the distances are (rescore.cu); a list of random
// rows takes in about k (1 + ln(rows / k)) of them.

#include "nearest_k.h"

#include "canonical.h"
#include "nearest_plan.h"
#include "ptx.h"
#include "warp.h"

namespace psvdd::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = kWarp * kWarps;
constexpr int64_t kLeastShareRows = 128;
constexpr int64_t kNeighbourBytes = sizeof(float) + sizeof(int64_t);
constexpr int64_t kMostShared = 99 * 1024;  // of a block, on sm_86, 89 and 120

static_assert(kMostNeighbours <= kWarp, "a list has a lane for each neighbour");
static_assert(kWarp * (kWarps * kMostNeighbours * kNeighbourBytes +
                       pitch_of(kMostStagedDims, true) * sizeof(float)) <=
                  kMostShared,
              "the lists and the queries of a block are in shared memory together");

// A row that a query may have among its nearest.
struct Neighbour {
  uint32_t squared;  // the bits of the squared distance, which are in order as it is not negative
  int64_t id;

  __device__ bool before(const Neighbour& other) const {
    return squared < other.squared || (squared == other.squared && id < other.id);
  }
  __device__ bool operator==(const Neighbour& other) const {
    return squared == other.squared && id == other.id;
  }
  // That of a lane.
  __device__ Neighbour from(int lane) const {
    return {__shfl_sync(kAllLanes, squared, lane), __shfl_sync(kAllLanes, id, lane)};
  }
};

// Comes after all rows, also those at infinity or, from vectors that hold NaN, at NaN.
__device__ Neighbour no_neighbour() { return {~uint32_t{0}, kNoRow}; }

// Neighbours of queries in memory, as NearestParams has them. Of a list, lane i takes entry i.
struct Lists {
  float* squared;  // [lists, k]
  int64_t* ids;    // [lists, k]
  int k;

  __device__ Neighbour entry(int64_t list, int i) const {
    const int64_t id = ids[list * k + i];
    if (id == kNoRow) return no_neighbour();
    return {__float_as_uint(squared[list * k + i]), id};
  }
  __device__ Neighbour load(int64_t list, int lane) const {
    return lane < k ? entry(list, lane) : no_neighbour();
  }
  __device__ void store(int64_t list, int lane, const Neighbour& own) const {
    if (lane >= k) return;
    squared[list * k + lane] = own.id == kNoRow ? INFINITY : __uint_as_float(own.squared);
    ids[list * k + lane] = own.id;
  }
};

// Puts a neighbour, the same in all lanes, into a list that the lanes hold in ascending order,
// unless it is there.
__device__ void insert(const Neighbour& other, int lane, Neighbour* own) {
  const int place = __popc(__ballot_sync(kAllLanes, own->before(other)));
  if (__ballot_sync(kAllLanes, *own == other) != 0) return;
  const Neighbour previous{__shfl_up_sync(kAllLanes, own->squared, 1),
                           __shfl_up_sync(kAllLanes, own->id, 1)};
  if (lane > place) *own = previous;
  if (lane == place) *own = other;
}

// Puts the k neighbours of one list, held by the lanes, into another.
__device__ void merge(const Neighbour& theirs, int k, int lane, Neighbour* own) {
  for (int i = 0; i < k; ++i) {
    const Neighbour other = theirs.from(i);
    if (!other.before(own->from(k - 1))) return;
    insert(other, lane, own);
  }
}

__device__ bool is_excluded(const Groups& groups, int64_t query, int64_t number) {
  return groups.query_groups != nullptr &&
         groups.query_groups[query] == groups.bank_groups[number / groups.rows_per_group];
}

// A block per 32 queries (along x) and share of the bank (along y). shares: null where there is one
// share, which improves the result; else the lists of all shares, [shares, queries, k], each of the
// rows that are better than what the result has already.
template <typename Stored, bool kWhole>
__global__ void __launch_bounds__(kThreads, 2)
    list_neighbours(NearestParams params, Lists shares, int64_t share_rows, bool staged) {
  const int k = params.k;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int64_t first = blockIdx.x * int64_t{kWarp};
  const int count = static_cast<int>(min(params.queries - first, int64_t{kWarp}));
  const int64_t query = lane < count ? first + lane : first;
  const Lists result{params.squared, params.indices, k};

  // Lists [kWarps, kWarp, k], behind them the queries.
  auto* all_ids = reinterpret_cast<int64_t*>(shared_memory());
  auto* all_squared = reinterpret_cast<float*>(all_ids + kWarps * kWarp * k);
  auto* queries = all_squared + kWarps * kWarp * k;
  const Lists lists{all_squared, all_ids, k};
  const int own_lists = warp * kWarp;  // number of the warp's first
  for (int q = 0; q < count; ++q) lists.store(own_lists + q, lane, no_neighbour());
  // What a row must come before to be listed.
  Neighbour last = result.entry(query, k - 1);

  const float* vector = params.query_data + query * params.dim;
  if (staged) {
    vector = stage_queries<kWhole, kWarps>(params.query_data, query, params.dim, queries);
  }
  const int64_t begin = blockIdx.y * share_rows;
  const int64_t end = min(begin + share_rows, params.bank_rows);
  for (int64_t row = begin + warp * kRowsAtOnce; row < end; row += kWarps * kRowsAtOnce) {
    float squared[kRowsAtOnce];
    canonical_squares<kWhole>(vector, static_cast<const Stored*>(params.bank_data), row, end,
                              params.dim, squared);
#pragma unroll
    for (int i = 0; i < kRowsAtOnce; ++i) {
      Neighbour found{__float_as_uint(squared[i]), kNoRow};
      bool wanted = false;
      if (found.squared <= last.squared && lane < count && row + i < end) {
        const int64_t number = params.ids != nullptr ? params.ids[row + i] : row + i;
        found.id = params.ids != nullptr ? number : params.first_row + number;
        wanted = found.before(last) && !is_excluded(params.groups, query, number);
      }
      for (unsigned left = __ballot_sync(kAllLanes, wanted); left != 0; left &= left - 1) {
        const int q = __ffs(static_cast<int>(left)) - 1;
        Neighbour own = lists.load(own_lists + q, lane);
        insert(found.from(q), lane, &own);
        lists.store(own_lists + q, lane, own);
        const Neighbour now_last = own.from(k - 1);
        if (lane == q && now_last.before(last)) last = now_last;
      }
    }
  }

  __syncthreads();
  for (int q = warp; q < count; q += kWarps) {
    const bool alone = shares.ids == nullptr;
    Neighbour own = alone ? result.load(first + q, lane) : no_neighbour();
    for (int w = 0; w < kWarps; ++w) merge(lists.load(w * kWarp + q, lane), k, lane, &own);
    if (alone) {
      result.store(first + q, lane, own);
    } else {
      shares.store(blockIdx.y * params.queries + first + q, lane, own);
    }
  }
}

// A warp per query: improves the result by the lists of all shares, [shares, queries, k]. It looks
// at the first entries of 32 lists at once and then only at lists that have something to give.
__global__ void merge_shares(Lists shares, int64_t num_shares, Lists result, int64_t queries) {
  const int k = result.k;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  for (int64_t q = first_element() / kWarp; q < queries; q += element_step() / kWarp) {
    Neighbour own = result.load(q, lane);
    for (int64_t s = 0; s < num_shares; s += kWarp) {
      const Neighbour head =
          s + lane < num_shares ? shares.entry((s + lane) * queries + q, 0) : no_neighbour();
      const bool may_give = head.before(own.from(k - 1));
      for (unsigned left = __ballot_sync(kAllLanes, may_give); left != 0; left &= left - 1) {
        const int i = __ffs(static_cast<int>(left)) - 1;
        if (!head.from(i).before(own.from(k - 1))) continue;
        merge(shares.load((s + i) * queries + q, lane), k, lane, &own);
      }
    }
    result.store(q, lane, own);
  }
}

// How the bank is cut into shares: two waves of blocks, if there are rows and memory for that.
struct SharePlan {
  int64_t shares;
  int64_t rows;  // of a share

  SharePlan(int64_t queries, int64_t bank_rows, int k, int64_t limit) {
    const int64_t tiles = (queries + kWarp - 1) / kWarp;
    const int64_t wanted = (4 * int64_t{multiprocessors()} + tiles - 1) / tiles;
    const int64_t that_fit = limit / (queries * k * kNeighbourBytes);
    const int64_t most = std::min<int64_t>({bank_rows / kLeastShareRows, that_fit, 65535});
    const int64_t cut_into = std::clamp<int64_t>(wanted, 1, std::max<int64_t>(most, 1));
    rows = round_up((bank_rows + cut_into - 1) / cut_into, kWarps * kRowsAtOnce);
    shares = (bank_rows + rows - 1) / rows;
  }
};

// The lists of all shares; none where there is one share.
Lists take_lists(const SharePlan& plan, int64_t queries, int k, Workspace* workspace) {
  if (plan.shares == 1) return {nullptr, nullptr, k};
  const int64_t entries = plan.shares * queries * k;
  auto* ids = workspace->take<int64_t>(entries);
  return {workspace->take<float>(entries), ids, k};
}

template <typename Stored>
void launch_lists(const NearestParams& params, const Lists& lists, const SharePlan& plan,
                  std::uintptr_t stream) {
  const bool whole =
      reads_whole_fours(params.query_data, params.bank_data, params.bank_is_half, params.dim);
  const size_t staged = staged_bytes(params.dim, whole);
  const auto tiles = static_cast<unsigned>((params.queries + kWarp - 1) / kWarp);
  launch(whole ? PSVDD_KERNEL(list_neighbours<Stored, true>)
               : PSVDD_KERNEL(list_neighbours<Stored, false>),
         {dim3(tiles, static_cast<unsigned>(plan.shares)), kThreads,
          kWarps * kWarp * params.k * kNeighbourBytes + staged},
         stream, params, lists, plan.rows, staged > 0);
}

}  // namespace

int64_t k_nearest_workspace(int64_t queries, int64_t rows, int k, int64_t limit) {
  if (queries == 0) return 0;
  Workspace workspace(nullptr);
  take_lists(SharePlan(queries, rows, k, limit), queries, k, &workspace);
  return workspace.bytes();
}

void k_nearest(const NearestParams& params, std::uintptr_t stream) {
  if (params.queries == 0) return;
  const SharePlan plan(params.queries, params.bank_rows, params.k, params.workspace_limit);
  Workspace workspace(params.workspace);
  const Lists lists = take_lists(plan, params.queries, params.k, &workspace);
  if (params.bank_is_half) {
    launch_lists<Half>(params, lists, plan, stream);
  } else {
    launch_lists<float>(params, lists, plan, stream);
  }
  if (plan.shares == 1) return;
  const Lists result{params.squared, params.indices, params.k};
  launch(PSVDD_KERNEL(merge_shares), {blocks_for(params.queries * kWarp), kThreadsPerBlock}, stream,
         lists, plan.shares, result, params.queries);
}

}  // namespace psvdd::cuda
