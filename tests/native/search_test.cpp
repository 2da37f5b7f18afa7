// Tests of the CPU search that need its insides or a sanitizer: each bound against true distances,
// and whole searches against a plain loop. Prints what failed and exits with 1.
//
//   search_test [rounds]

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <utility>
#include <vector>

#include "../../csrc/cpu/clusters.h"
#include "../../csrc/cpu/kernels.h"
#include "../../csrc/cpu/matches.h"
#include "../../csrc/cpu/rescore.h"
#include "checks.h"
#include "kernel_checks.h"

namespace {

using namespace psvdd;
using namespace psvdd::cpu;

// The nearest row of each query, by brute force.
void nearest_one(NearestParams params, float* distances, int64_t* indices, int threads) {
  std::fill_n(distances, params.queries, INFINITY);
  std::fill_n(indices, params.queries, kNoRow);
  params.k = 1;
  params.squared = distances;
  params.indices = indices;
  nearest(params, threads);
  finish_search({params.queries, distances, indices}, threads);
}

// A clustered bank made here, with all its arrays.
struct TestBank {
  int64_t dim, rows, clusters, axes, packs;
  std::vector<float> values, mean, basis, centroids, projected, errors, radii, data;
  std::vector<int64_t> ids, starts, blocks;
  std::vector<int8_t> codes;
  std::vector<int32_t> bias;
  std::vector<float> block_radius, scales, slack, code_slack, reach, tiles, gaps;
  ClusteredBank bank;

  TestBank(int64_t dim_, int64_t rows_, int64_t clusters_, int threads)
      : dim(dim_), rows(rows_), clusters(std::min(clusters_, rows_)) {
    values = hard_values(rows, dim, dim);
    mean.assign(values.begin(), values.begin() + dim);
    const bool project_them = dim > 20 && integer(0, 1);
    axes = project_them ? 16 : round_up(dim, kLanes);
    packs = project_them ? 4 : (dim + 3) / 4;
    double stretch = 1;
    if (project_them) {  // 16 coordinates of 20 or more, slightly lengthened
      basis.assign(dim * axes, 0.0f);
      for (int64_t i = 0; i < axes; ++i) basis[(i + dim - axes) * axes + i] = 1.0000001f;
      stretch = 1.000001;
    }
    const Projection projection{dim, axes, mean.data(), project_them ? basis.data() : nullptr,
                                stretch};
    projected.resize(rows * axes);
    errors.resize(rows);
    project({projection, rows, values.data(), false, projected.data(), errors.data()}, threads);
    for (int64_t c = 0; c < clusters; ++c) {
      const int64_t r = integer(0, rows - 1);
      centroids.insert(centroids.end(), projected.begin() + r * axes,
                       projected.begin() + (r + 1) * axes);
    }
    radii.resize(rows);
    std::vector<int64_t> nearest_centroid(rows);
    NearestParams params{};
    params.queries = rows;
    params.bank_rows = clusters;
    params.dim = axes;
    params.query_data = projected.data();
    params.bank_data = centroids.data();
    nearest_one(params, radii.data(), nearest_centroid.data(), threads);
    // Clusters in order, empty ones dropped, rows by radius.
    std::vector<float> used;
    starts = {0};
    blocks = {0};
    for (int64_t c = 0; c < clusters; ++c) {
      std::vector<int64_t> members;
      for (int64_t r = 0; r < rows; ++r) {
        if (nearest_centroid[r] == c) members.push_back(r);
      }
      if (members.empty()) continue;
      std::sort(members.begin(), members.end(),
                [&](int64_t a, int64_t b) { return radii[a] < radii[b]; });
      ids.insert(ids.end(), members.begin(), members.end());
      starts.push_back(static_cast<int64_t>(ids.size()));
      blocks.push_back(blocks.back() + (static_cast<int64_t>(members.size()) + 15) / 16);
      used.insert(used.end(), centroids.begin() + c * axes, centroids.begin() + (c + 1) * axes);
    }
    centroids = used;
    clusters = static_cast<int64_t>(starts.size()) - 1;
    for (int64_t id : ids) {
      data.insert(data.end(), values.begin() + id * dim, values.begin() + (id + 1) * dim);
    }
    const int64_t padded = round_up(clusters, kLanes);
    codes.resize(blocks.back() * packs * 64);
    bias.resize(blocks.back() * kLanes);
    block_radius.resize(blocks.back());
    for (auto* array : {&scales, &slack, &code_slack, &reach}) array->resize(clusters);
    tiles.resize(padded * axes);
    gaps.resize(clusters * padded);
    bank = {projection,       rows,          clusters,     packs,
            data.data(),      false,         ids.data(),   starts.data(),
            blocks.data(),    codes.data(),  bias.data(),  block_radius.data(),
            centroids.data(), scales.data(), slack.data(), code_slack.data(),
            reach.data(),     tiles.data(),  gaps.data()};
    link_clusters(bank, threads);
    pack_clusters({bank, projected.data(), errors.data(), radii.data()}, threads);
  }
};

// A cluster is kept, and a row's block not skipped, under a limit that is just the row's distance.
void test_cluster_bounds() {
  const TestBank made(integer(1, 40), integer(1, 200), integer(1, 40), 1);
  const ClusteredBank& bank = made.bank;
  const SearchKernels& kernels = active_kernels();
  const int64_t padded = round_up(bank.clusters, kLanes);
  std::vector<float> point(made.axes), squared(padded);
  RowProjector projector(made.bank.projection);
  std::vector<int32_t> kept(padded + kLanes);
  for (int query = 0; query < 20; ++query) {
    std::vector<float> vector(made.values.begin() + integer(0, made.rows - 1) * made.dim,
                              made.values.end());
    vector.resize(made.dim);
    const double nudge = std::exp2(uniform(-20, 1)) * bank.reach[integer(0, bank.clusters - 1)];
    for (float& value : vector) value += static_cast<float>(nudge * uniform(-1, 1));
    const double error = projector(vector.data(), point.data());
    const int64_t own = kernels.tile_distances(point.data(), bank.centroid_tiles, made.axes,
                                               padded / kLanes, squared.data());
    for (int64_t c = 0; c < bank.clusters; ++c) {
      EXPECT(own < bank.clusters && squared[own] <= squared[c], "not the nearest centroid");
      for (int64_t r = bank.starts[c]; r < bank.starts[c + 1]; ++r) {
        const long double distance =
            true_distance(vector.data(), made.data.data() + r * made.dim, made.dim);
        const auto limit = static_cast<float>(
            (just_above(distance) * bank.projection.stretch + error) * (1 + 1e-6));
        const ClusterBounds bounds = {
            bank.reach,   bank.slack, bank.gaps + own * padded,
            squared[own], limit,      static_cast<float>(bound_rounding(made.axes))};
        const int64_t count =
            kernels.keep_clusters(bounds, squared.data(), bank.clusters, kept.data());
        EXPECT(std::find(kept.begin(), kept.begin() + count, c) != kept.begin() + count,
               "%s: cluster %ld of %ld ruled out", kernels.name, long(c), long(bank.clusters));
        const int64_t first = bank.blocks[c];
        const BlockRange range = blocks_within(
            kernels, bank.block_radius + first, bank.blocks[c + 1] - first, squared[c],
            static_cast<double>(limit) + bank.slack[c], bound_rounding(made.axes));
        const int64_t block = (r - bank.starts[c]) / kLanes;
        EXPECT(range.begin <= block && block < range.end, "block %ld not in [%ld, %ld)",
               long(block), long(range.begin), long(range.end));
      }
    }
  }
}

// Codes made here, of vectors [rows, dim] in blocks of `block_rows`.
struct TestCodes {
  std::vector<int8_t> codes;
  std::vector<int32_t> bias;
  std::vector<float> centres, scales, slack;
  CodedRows bank;

  TestCodes(const std::vector<float>& values, int64_t dim, int64_t block_rows, int threads) {
    const auto rows = static_cast<int64_t>(values.size()) / dim;
    const int64_t padded_rows = round_up(rows, kTileRows);
    const int64_t blocks = (rows + block_rows - 1) / block_rows;
    codes.resize(padded_rows * ((dim + 3) / 4 * 4));
    bias.resize(padded_rows);
    centres.resize(blocks * round_up(dim, kLanes));
    scales.resize(blocks);
    slack.resize(blocks);
    bank = {rows,
            dim,
            values.data(),
            false,
            {block_rows, codes.data(), bias.data(), centres.data(), scales.data(), slack.data()},
            {},
            {}};
    encode_rows(bank, threads);
  }
};

// A map to the first coordinates, at most 63, and the images of the rows of a bank.
struct TestLeading {
  std::vector<float> mean, basis, images, errors;
  LeadingAxes map;

  TestLeading(const std::vector<float>& values, int64_t dim, int threads)
      : mean(dim), basis(dim * 64) {
    const auto rows = static_cast<int64_t>(values.size()) / dim;
    for (float& value : mean) value = static_cast<float>(uniform(-1, 1));
    for (int64_t j = 0; j < std::min<int64_t>(dim, integer(1, 63)); ++j) basis[j * 64 + j] = 1;
    images.resize(rows * 64);
    errors.resize(rows);
    map = {{dim, 64, mean.data(), basis.data(), 1 + kLeadingExcess}, 0};
    leading_images({map, rows, values.data(), false, images.data(), errors.data()}, threads);
    map.error = *std::max_element(errors.begin(), errors.end());
  }
};

// Whole searches, plain, with codes and clustered, for one and several neighbours, in one part and
// two, with and without groups, against a sort of all rows.
void test_searches(int threads) {
  const TestBank made(integer(1, 40), integer(1, 400), integer(1, 40), threads);
  const int64_t queries = integer(0, 3) ? integer(1, 100) : integer(300, 900);
  std::vector<float> vectors;
  for (int64_t q = 0; q < queries; ++q) {
    const int64_t r = integer(0, made.rows - 1);
    for (int64_t j = 0; j < made.dim; ++j) {
      const float value = made.values[r * made.dim + j];
      vectors.push_back(q % 3 ? value * static_cast<float>(uniform(0.999, 1.001)) : value);
    }
  }
  std::vector<int64_t> bank_groups(made.rows), query_groups(queries);
  for (int64_t& group : bank_groups) group = integer(0, 2);
  for (int64_t& group : query_groups) group = integer(0, 3);
  for (const bool grouped : {false, true}) {
    Groups groups{nullptr, nullptr, 1};
    if (grouped) groups = {query_groups.data(), bank_groups.data(), 1};
    const int k = integer(0, 1) ? 1 : static_cast<int>(integer(2, kMostNeighbours));
    // Nothing yet, or the first rows, as if they were in another part of the bank.
    const int64_t given = integer(0, 2) ? 0 : integer(0, made.rows - 1);
    std::vector<float> squared(queries * k, INFINITY);
    std::vector<int64_t> indices(queries * k, kNoRow);
    NearestParams params{};
    params.queries = queries;
    params.bank_rows = made.rows;
    params.dim = made.dim;
    params.query_data = vectors.data();
    params.bank_data = made.values.data();
    params.groups = groups;
    params.k = k;
    params.squared = squared.data();
    params.indices = indices.data();
    params.method = static_cast<SearchMethod>(integer(0, 2));
    if (given > 0) {
      params.bank_rows = given;
      nearest(params, threads);
    }
    std::vector<float> clustered_squared = squared, coded_squared = squared;
    std::vector<int64_t> clustered_indices = indices, coded_indices = indices;
    params.bank_rows = made.rows - given;
    params.bank_data = made.values.data() + given * made.dim;
    params.first_row = given;
    if (grouped) params.groups.bank_groups += given;
    nearest(params, threads);
    const int64_t block_rows = kTileRows * integer(1, 8);
    TestCodes coded(made.values, made.dim, block_rows, threads);
    const TestLeading leading(made.values, made.dim, threads);
    const TestCodes leading_codes(leading.images, 64, block_rows, threads);
    if (integer(0, 1)) {
      coded.bank.leading_axes = leading.map;
      coded.bank.leading = leading_codes.bank.codes;
    }
    nearest_in_codes({coded.bank, params.method, groups, queries, vectors.data(), k,
                      coded_squared.data(), coded_indices.data()},
                     threads);
    int64_t scanned = 0;
    nearest_in_clusters({made.bank, groups, queries, vectors.data(), k, clustered_squared.data(),
                         clustered_indices.data(), &scanned},
                        threads);
    for (int64_t q = 0; q < queries; ++q) {
      std::vector<std::pair<float, int64_t>> all;
      for (int64_t r = 0; r < made.rows; ++r) {
        if (grouped && query_groups[q] == bank_groups[r]) continue;
        float distance;
        portable_kernels().squared_distances({made.values.data(), made.dim, false},
                                             vectors.data() + q * made.dim, &r, 1, &distance);
        all.emplace_back(distance, r);
      }
      std::sort(all.begin(), all.end());
      all.resize(k, {INFINITY, kNoRow});
      for (int i = 0; i < k; ++i) {
        const auto [distance, index] = all[i];
        const int64_t at = q * k + i;
        EXPECT(squared[at] == distance && indices[at] == index, "plain: %ld for %ld, of %d",
               long(indices[at]), long(index), k);
        EXPECT(coded_squared[at] == distance && coded_indices[at] == index,
               "codes: %ld for %ld, of %d", long(coded_indices[at]), long(index), k);
        EXPECT(clustered_squared[at] == distance && clustered_indices[at] == index,
               "clustered: %ld for %ld, of %d", long(clustered_indices[at]), long(index), k);
      }
    }
  }
}

// All rows within a limit, plain, with codes and clustered, against a loop over all rows.
void test_within(int threads) {
  const TestBank made(integer(1, 40), integer(1, 400), integer(1, 40), threads);
  const int64_t queries = integer(0, 3) ? integer(1, 40) : 300;
  std::vector<float> vectors, limits;
  std::vector<std::vector<std::pair<float, int64_t>>> expected(queries);
  std::vector<int64_t> bank_groups(made.rows), query_groups(queries);
  for (int64_t& group : bank_groups) group = integer(0, 2);
  for (int64_t& group : query_groups) group = integer(0, 3);
  Groups groups{nullptr, nullptr, 1};
  if (integer(0, 1)) groups = {query_groups.data(), bank_groups.data(), 1};
  int64_t most = 0;
  for (int64_t q = 0; q < queries; ++q) {
    const float* row = made.values.data() + integer(0, made.rows - 1) * made.dim;
    for (int64_t j = 0; j < made.dim; ++j) {
      vectors.push_back(q % 3 ? row[j] * static_cast<float>(uniform(0.999, 1.001)) : row[j]);
    }
    std::vector<float> squared(made.rows);
    for (int64_t r = 0; r < made.rows; ++r) {
      portable_kernels().squared_distances({made.values.data(), made.dim, false},
                                           vectors.data() + q * made.dim, &r, 1, &squared[r]);
    }
    const float limit = squared[integer(0, made.rows - 1)];
    limits.push_back(integer(0, 3) ? limit : std::nextafter(limit, 0.0f));
    for (int64_t r = 0; r < made.rows; ++r) {
      const bool excluded = groups.query_groups != nullptr && query_groups[q] == bank_groups[r];
      if (squared[r] <= limits[q] && !excluded) expected[q].emplace_back(squared[r], r);
    }
    std::sort(expected[q].begin(), expected[q].end());
    most += static_cast<int64_t>(expected[q].size());
  }
  const std::vector<float> before = limits;
  const auto method = static_cast<SearchMethod>(integer(0, 2));
  const int64_t block_rows = kTileRows * integer(1, 8);
  TestCodes coded(made.values, made.dim, block_rows, threads);
  const TestLeading leading(made.values, made.dim, threads);
  const TestCodes leading_codes(leading.images, 64, block_rows, threads);
  if (integer(0, 1)) {
    coded.bank.leading_axes = leading.map;
    coded.bank.leading = leading_codes.bank.codes;
  }
  for (int way = 0; way < 3; ++way) {
    Matches matches(most);
    if (way == 0) {
      NearestParams params{};
      params.queries = queries;
      params.bank_rows = made.rows;
      params.dim = made.dim;
      params.query_data = vectors.data();
      params.bank_data = made.values.data();
      params.groups = groups;
      params.k = 1;
      params.squared = limits.data();
      params.method = method;
      within(params, &matches, threads);
    } else if (way == 1) {
      nearest_in_codes(
          {coded.bank, method, groups, queries, vectors.data(), 1, limits.data(), nullptr}, threads,
          &matches);
    } else {
      int64_t scanned = 0;
      nearest_in_clusters(
          {made.bank, groups, queries, vectors.data(), 1, limits.data(), nullptr, &scanned},
          threads, &matches);
    }
    EXPECT(limits == before, "limits have changed, way %d", way);
    std::vector<int64_t> starts(queries + 1), ids(matches.total());
    std::vector<float> squared(ids.size());
    matches.take(queries, starts.data(), squared.data(), ids.data(), threads);
    for (int64_t q = 0; q < queries; ++q) {
      std::vector<std::pair<float, int64_t>> found;
      for (int64_t i = starts[q]; i < starts[q + 1]; ++i) found.emplace_back(squared[i], ids[i]);
      EXPECT(found == expected[q], "way %d: %ld rows for %ld", way, long(found.size()),
             long(expected[q].size()));
    }
  }
}

// Coresets with and without a screen, against the plain selection; some have so many rows that
// these wait for whole groups of centres and are brought up to date in batches.
void test_coresets(int threads) {
  const TestBank made(integer(1, 40), integer(0, 7) ? integer(1, 200) : 900, 1, threads);
  std::vector<float> projected(made.rows * made.axes), errors(made.rows);
  project(
      {made.bank.projection, made.rows, made.values.data(), false, projected.data(), errors.data()},
      threads);
  float largest = 0;
  for (const float value : projected) largest = std::max(largest, std::fabs(value));
  const int64_t count = integer(0, 1) ? made.rows : integer(1, made.rows);
  std::vector<int64_t> expected(count), chosen(count);
  std::vector<float> expected_distances(count), distances(count);
  float expected_radius = -1, radius = -1;
  CoresetParams params{};
  params.rows = made.rows;
  params.dim = made.dim;
  params.count = count;
  params.first = integer(0, made.rows - 1);
  params.data = made.values.data();
  params.method = SearchMethod::kPlain;
  params.chosen = expected.data();
  params.distances = expected_distances.data();
  params.radius = &expected_radius;
  coreset(params, threads);
  params.method = SearchMethod::kAuto;
  params.chosen = chosen.data();
  params.distances = distances.data();
  params.radius = &radius;
  params.errors = errors.data();
  params.axes = made.axes;
  params.stretch = made.bank.projection.stretch;
  // Also with scales that clip many rows or waste the codes.
  params.scale =
      static_cast<float>(std::max(largest / kCodeLimit * std::exp2(uniform(-3, 2)), 1e-30));
  for (const float* screen :
       {static_cast<const float*>(nullptr), std::as_const(projected).data()}) {
    params.projected = screen;
    coreset(params, threads);
    EXPECT(chosen == expected && distances == expected_distances && radius == expected_radius,
           "%ld of %ld rows, screened: %d", long(count), long(made.rows), screen != nullptr);
  }
}

}  // namespace

int main(int argc, char** argv) {
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 20;
  std::vector<const SearchKernels*> sets = {&software_tile_kernels()};
  for (const std::string& name : instruction_sets()) {
    set_instruction_set(name);
    sets.push_back(&active_kernels());
  }
  for (const SearchKernels* set : sets) {
    set_active_kernels(*set);
    for (int round = 0; round < rounds; ++round) {
      test_winning_distance();
      test_screen();
      test_batches();
      test_distance_tiles();
      test_cluster_bounds();
      test_searches(1 + round % 4);
      test_within(1 + round % 4);
      test_coresets(1 + round % 4);
    }
  }
  return report();
}
