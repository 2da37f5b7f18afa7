// The CUDA kernels on the host, for sanitizers: each against its CPU twin on awkward sizes, under
// several schedules of the threads, in buffers of the exact size.
//
//   cuda_test [rounds]     runs everything; prints what failed and exits with 1
//   cuda_test broken NAME  runs a kernel that is wrong on purpose (broken_kernels.cu); exits with 1
//                          if its result depends on the schedule

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <set>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "../../csrc/cpu/kernels.h"
#include "../../csrc/cuda/kernels.h"
#include "../../csrc/cuda/nearest_plan.h"
#include "../../csrc/cuda/ptx.h"
#include "../../csrc/cuda/screen.h"
#include "../../csrc/portable.h"
#include "../../csrc/random.h"
#include "../cuda_on_host/cuda_on_host.h"
#include "broken_kernels.h"
#include "checks.h"

namespace {

using namespace psvdd;

constexpr unsigned kSchedules = 4;
constexpr int kSlower = 5;  // one round in so many for what takes long; no multiple of kSchedules

int run_broken(const std::string& name) {
  constexpr unsigned kThreads = 64;
  std::vector<float> first;
  bool same = true;
  for (unsigned schedule = 0; schedule < kSchedules; ++schedule) {
    cuda_on_host::set_schedule(schedule);
    std::vector<float> out(kThreads, 0.0f);
    cuda::run_broken_kernel(name, out.data(), kThreads);
    if (schedule == 0) first = out;
    same = same && std::memcmp(first.data(), out.data(), kThreads * sizeof(float)) == 0;
  }
  std::printf(same ? "the same under all schedules\n" : "depends on the schedule\n");
  return same ? 0 : 1;
}

PatchGrid grid_of(int64_t images, int64_t channels, int64_t height, int64_t width, int64_t size,
                  int64_t stride) {
  return {
      images, channels, height, width, (height - size) / stride + 1, (width - size) / stride + 1,
      size,   stride};
}

PatchGrid random_grid() {
  const int64_t size = integer(0, 2) > 0 ? integer(1, 20) : 16 * integer(1, 2);
  return grid_of(integer(1, 2), integer(1, 3), size + integer(0, 20), size + integer(0, 20), size,
                 integer(1, size));
}

// Some rows of the bank, changed a little or much.
std::vector<float> hard_values_near(const std::vector<float>& bank, int64_t count, int64_t dim) {
  std::vector<float> values(count * dim);
  const double change = std::exp2(uniform(-30, 2));
  for (int64_t q = 0; q < count; ++q) {
    const int64_t row = integer(0, static_cast<int64_t>(bank.size()) / dim - 1);
    for (int64_t j = 0; j < dim; ++j) {
      const double value = bank[row * dim + j];
      values[q * dim + j] = static_cast<float>(value * (1 + change * uniform(-1, 1)));
    }
  }
  return values;
}

struct CodesOnHost {
  int64_t padded_dim;
  std::vector<uint16_t> halves;
  std::vector<float> squares, errors;

  CodesOnHost(int64_t rows, int64_t padded_dim)
      : padded_dim(padded_dim), halves(rows * padded_dim), squares(rows), errors(rows) {}
  cuda::Codes codes() { return {padded_dim, halves.data(), squares.data(), errors.data()}; }
  long double value(int64_t row, int64_t j) const {
    return to_float(Half{halves[row * padded_dim + j]});
  }
};

// Random bytes at any address that suits the elements, so that a read past their end is noticed.
class Elements {
 public:
  Elements(int64_t count, int64_t element_size) : offset_(integer(0, 16) * element_size) {
    bytes_.resize(offset_ + count * element_size);
    for (uint8_t& byte : bytes_) byte = static_cast<uint8_t>(integer(0, 255));
    bytes_.shrink_to_fit();
  }
  uint8_t* data() { return bytes_.data() + offset_; }
  bool operator==(const Elements& other) const {
    return std::equal(bytes_.begin() + offset_, bytes_.end(), other.bytes_.begin() + other.offset_,
                      other.bytes_.end());
  }

 private:
  int64_t offset_;
  std::vector<uint8_t> bytes_;
};

void test_extract_patches(const PatchGrid& grid) {
  const int64_t pixels = grid.channels * grid.height * grid.width;
  const int64_t elements =
      grid.images * grid.rows * grid.columns * grid.channels * grid.size * grid.size;
  const bool normalized = integer(0, 1) == 1;
  const int type = static_cast<int>(integer(0, 2));
  const int64_t pixel_bytes =
      int64_t{1} << (normalized ? type : static_cast<int>(integer(0, 3)));  // as PixelType has them
  Elements images(grid.images * pixels, pixel_bytes);
  const std::vector<float> mean = hard_values(1, pixels, pixels);
  if (normalized && type > 0) {  // not what no image holds: infinities, NaN
    for (int64_t p = 0; p < grid.images * pixels; ++p) {
      images.data()[(p + 1) * pixel_bytes - 1] &= 0x3f;
    }
  }
  Elements on_cpu(elements, normalized ? 4 : pixel_bytes);
  Elements on_cuda(elements, normalized ? 4 : pixel_bytes);
  ExtractPatchesParams params{grid,          images.data(), normalized ? mean.data() : nullptr,
                              on_cpu.data(), pixel_bytes,   static_cast<PixelType>(type)};
  cpu::extract_patches(params, 1);
  params.patches = on_cuda.data();
  cuda::extract_patches(params, 0);
  EXPECT(on_cpu == on_cuda, "extract_patches: size %ld, stride %ld, %ldx%ld, %ld bytes, type %d",
         long(grid.size), long(grid.stride), long(grid.height), long(grid.width), long(pixel_bytes),
         normalized ? type : -1);
}

void test_extract_patches_backward(const PatchGrid& grid) {
  const int64_t pixels = grid.images * grid.channels * grid.height * grid.width;
  const int64_t elements =
      grid.images * grid.rows * grid.columns * grid.channels * grid.size * grid.size;
  const std::vector<float> gradients = hard_values(1, elements, elements);
  std::vector<float> on_cpu(pixels), on_cuda(pixels, NAN);
  ExtractPatchesBackwardParams params{grid, gradients.data(), on_cpu.data(), false};
  cpu::extract_patches_backward(params, 1);
  params.image_gradients = on_cuda.data();
  cuda::extract_patches_backward(params, 0);
  EXPECT(std::memcmp(on_cpu.data(), on_cuda.data(), pixels * 4) == 0,
         "extract_patches_backward: size %ld, stride %ld", long(grid.size), long(grid.stride));
}

void test_score_map() {
  PatchGrid grid = random_grid();
  grid.channels = 1;
  const int64_t cells = grid.images * grid.rows * grid.columns;
  const std::vector<float> distances = hard_values(1, cells, cells);
  const int64_t pixels = grid.images * grid.height * grid.width;
  std::vector<double> row_sums(grid.images * grid.rows * grid.width);
  std::vector<float> on_cpu(pixels), on_cuda(pixels, NAN);
  ScoreMapParams params{grid, distances.data(), row_sums.data(), on_cpu.data()};
  cpu::score_map(params, 1);
  params.maps = on_cuda.data();
  cuda::score_map(params, 0);
  EXPECT(std::memcmp(on_cpu.data(), on_cuda.data(), pixels * 4) == 0,
         "score_map: size %ld, stride %ld", long(grid.size), long(grid.stride));
}

// The screen against exact arithmetic: errors of codes and rounding of the products are within what
// is claimed for them, for every query and segment.
void test_screen() {
  const int64_t dim = integer(1, 90), rows = integer(1, 300), count = integer(1, 20);
  const std::vector<float> bank = hard_values(rows, dim, dim);
  const std::vector<float> queries = hard_values_near(bank, count, dim);
  const int64_t padded = cuda::padded_dim(dim);
  const int64_t segments = (rows + cuda::kSegmentRows - 1) / cuda::kSegmentRows;
  std::vector<float> centre(dim), largest(1);
  const cuda::Frame frame{centre.data(), largest.data()};
  CodesOnHost bank_codes(segments * cuda::kSegmentRows, padded);
  CodesOnHost query_codes(cuda::kQueryTile, padded);
  std::vector<float> norms(segments), errors(segments), maxima(segments * cuda::kQueryTile, NAN);
  const cuda::Vectors bank_vectors{bank.data(), false, rows, dim};
  cuda::find_frame(bank_vectors, frame, 0);
  cuda::encode(bank_vectors, frame, bank_codes.codes(), {norms.data(), errors.data()}, 0);
  cuda::encode({queries.data(), false, count, dim}, frame, query_codes.codes(), {nullptr, nullptr},
               0);
  cuda::screen(query_codes.codes(), 1, bank_codes.codes(), segments, {nullptr, nullptr},
               maxima.data(), 0);
  const double scale = cuda::frame_scale(largest[0]);
  const auto check_codes = [&](const CodesOnHost& codes, const std::vector<float>& vectors,
                               int64_t number) {
    for (int64_t r = 0; r < number; ++r) {
      long double error = 0, square = 0;
      for (int64_t j = 0; j < dim; ++j) {
        const long double code = codes.value(r, j);
        const long double rest =
            (static_cast<long double>(vectors[r * dim + j]) - centre[j]) * scale - code;
        error += rest * rest;
        square += code * code;
      }
      EXPECT(std::sqrt(error) <= codes.errors[r], "error %g of row %ld, claimed %g",
             double(std::sqrt(error)), long(r), codes.errors[r]);
      EXPECT(std::fabs(square - codes.squares[r]) <= 1e-5L * square, "square of row %ld", long(r));
    }
  };
  if (scale == 0) return;
  check_codes(bank_codes, bank, rows);
  for (int64_t r = 0; r < rows; ++r) {  // nor is more claimed than twice what rounding may do
    const double most = 0x1p-10 * std::sqrt(bank_codes.squares[r]) + dim * 0x1p-24;
    EXPECT(bank_codes.errors[r] <= most, "error of row %ld: %g of at most %g", long(r),
           bank_codes.errors[r], most);
  }
  check_codes(query_codes, queries, count);
  for (int64_t q = 0; q < count; ++q) {
    for (int64_t s = 0; s < segments; ++s) {
      long double best = -INFINITY;
      for (int64_t r = s * cuda::kSegmentRows; r < std::min(rows, (s + 1) * cuda::kSegmentRows);
           ++r) {
        long double sum = 0;
        for (int64_t j = 0; j < dim; ++j) {
          const long double b = bank_codes.value(r, j);
          sum += b * (query_codes.value(q, j) - b / 2);
        }
        best = std::max(best, sum);
      }
      const double sizes = std::sqrt(query_codes.squares[q]) + norms[s];
      const double allowed = cuda::screen_rounding(padded) * sizes * sizes;
      const float found = maxima[s * cuda::kQueryTile + q];
      EXPECT(std::fabs(found - best) <= allowed, "dim %ld: %g for %g, allowed %g", long(dim), found,
             double(best), allowed);
    }
  }
}

// Vectors of a bank in either type of element; float16 rounds them.
struct Stored {
  std::vector<float> values;
  std::vector<uint16_t> halves;  // empty: float32

  Stored(std::vector<float> given, bool is_half) : values(std::move(given)) {
    if (!is_half) return;
    for (float& value : values) {
      halves.push_back(cuda::half_bits(value));
      value = to_float(Half{halves.back()});
    }
  }
  bool is_half() const { return !halves.empty(); }
  const void* data() const {
    return is_half() ? static_cast<const void*>(halves.data()) : values.data();
  }
};

// Up to four groups at random, mostly row by row.
struct RandomGroups {
  std::vector<int64_t> of_queries, of_bank;
  int64_t rows_per_group;

  RandomGroups(int64_t queries, int64_t rows)
      : of_queries(queries), rows_per_group(integer(0, 3) == 0 ? integer(1, 200) : 1) {
    of_bank.resize((rows + rows_per_group - 1) / rows_per_group);
    const int64_t last = integer(0, 3);
    for (int64_t& group : of_queries) group = integer(0, last);
    for (int64_t& group : of_bank) group = integer(0, last);
  }
  Groups groups() const { return {of_queries.data(), of_bank.data(), rows_per_group}; }
};

using Found = std::pair<std::vector<float>, std::vector<int64_t>>;  // distances and rows

NearestParams nearest_params(const std::vector<float>& queries, const Stored& bank, int64_t dim) {
  NearestParams params{};
  params.queries = static_cast<int64_t>(queries.size()) / dim;
  params.bank_rows = static_cast<int64_t>(bank.values.size()) / dim;
  params.dim = dim;
  params.query_data = queries.data();
  params.bank_data = bank.data();
  params.bank_is_half = bank.is_half();
  params.groups.rows_per_group = 1;
  params.workspace_limit = 1 << 30;
  return params;
}

// Nothing found yet: what a search starts from.
Found nothing_for(NearestParams* params) {
  params->k = std::max(params->k, 1);
  Found found(std::vector<float>(params->queries * params->k, INFINITY),
              std::vector<int64_t>(params->queries * params->k, kNoRow));
  params->squared = found.first.data();
  params->indices = found.second.data();
  return found;
}

Found nearest_on_cpu(NearestParams params) {
  Found found = nothing_for(&params);
  cpu::nearest(params, 1);
  cpu::finish_search({static_cast<int64_t>(found.first.size()), params.squared, params.indices}, 1);
  return found;
}

// `kept`: where not null, the pairs of a query and a segment that the screen left, of the last
// chunk.
Found nearest_on_cuda(NearestParams params, int64_t* kept = nullptr) {
  const bool has_groups = params.groups.query_groups != nullptr;
  std::vector<unsigned char> workspace(
      cuda::nearest_workspace(params.queries, params.bank_rows, params.dim, params.method,
                              has_groups, std::max(params.k, 1), params.workspace_limit) +
      256);
  void* start = workspace.data();
  size_t space = workspace.size();
  params.workspace = std::align(256, space - 256, start, space);
  Found found = nothing_for(&params);
  cuda::nearest(params, 0);
  cuda::finish_search({static_cast<int64_t>(found.first.size()), params.squared, params.indices},
                      0);
  if (kept != nullptr) {
    const cuda::Plan plan(params.queries, params.bank_rows, params.dim, params.method,
                          params.workspace_limit);
    cuda::Workspace parts(params.workspace);
    const cuda::Arrays arrays(plan, params.queries, params.dim, has_groups, &parts);
    *kept = std::accumulate(arrays.counts, arrays.counts + plan.segments, int64_t{0});
  }
  return found;
}

void test_nearest(int64_t dim) {
  const int64_t rows = integer(1, 600), count = integer(1, 40);
  const Stored bank(hard_values(rows, dim, dim), integer(0, 3) == 0);
  const std::vector<float> queries = hard_values_near(bank.values, count, dim);
  const RandomGroups groups(count, rows);
  NearestParams params = nearest_params(queries, bank, dim);
  if (integer(0, 1) == 1) params.workspace_limit = 1;  // the smallest chunks
  if (integer(0, 1) == 1) params.groups = groups.groups();
  const Found expected = nearest_on_cpu(params);
  for (const SearchMethod method : {SearchMethod::kPlain, SearchMethod::kScreened}) {
    params.method = method;
    EXPECT(nearest_on_cuda(params) == expected,
           "nearest: %ld queries, %ld rows, dim %ld, method %d", long(count), long(rows), long(dim),
           static_cast<int>(method));
  }
}

// k neighbours from a start with anything in it: nothing, some of the rows themselves, or others at
// the same distances.
void test_k_nearest(int64_t most_queries) {
  const int64_t rows = integer(0, 2) > 0 ? integer(250, 400) : integer(1, 60);
  const int64_t count = integer(1, most_queries);
  const int most = integer(0, 3) == 0 ? kMostNeighbours : 9;
  const int64_t dim = integer(0, 5) == 0 ? integer(380, 400) : integer(1, 80);  // staged up to 384
  const Stored bank(hard_values(rows, dim, dim), integer(0, 3) == 0);
  const std::vector<float> queries = hard_values_near(bank.values, count, dim);
  const RandomGroups groups(count, 2 * rows);
  NearestParams params = nearest_params(queries, bank, dim);
  if (integer(0, 1) == 1) params.groups = groups.groups();
  const bool has_ids = integer(0, 1) == 1;
  params.k = static_cast<int>(integer(has_ids ? 1 : 2, most));
  std::vector<int64_t> ids(2 * rows);
  std::iota(ids.begin(), ids.end(), int64_t{0});
  std::shuffle(ids.begin(), ids.end(), random_bits);
  ids.resize(rows);
  if (has_ids) {
    params.ids = ids.data();
    if (params.groups.query_groups == nullptr) {
      for (int64_t& id : ids) id = kNoRow - 1 - id;
    }
  } else {
    params.first_row = rows + (integer(0, 1) == 1 ? int64_t{1} << 40 : 0);
  }

  Found start = nothing_for(&params);
  if (integer(0, 2) > 0) {
    NearestParams first_part = params;
    first_part.bank_rows = integer(1, rows);
    if (!has_ids) first_part.first_row += rows * integer(-1, 1);
    cpu::nearest(first_part, 1);
  }
  Found expected = start, found = start;
  params.squared = expected.first.data();
  params.indices = expected.second.data();
  cpu::nearest(params, 1);

  constexpr int64_t kLimits[] = {1, 20'000, 1 << 30};
  params.workspace_limit = kLimits[integer(0, 2)];
  const int64_t bytes = cuda::nearest_workspace(count, rows, dim, params.method,
                                                params.groups.query_groups != nullptr, params.k,
                                                params.workspace_limit);
  EXPECT(params.k == 1 || bytes < params.workspace_limit + 512, "%ld bytes for a limit of %ld",
         long(bytes), long(params.workspace_limit));
  std::vector<float4> workspace(bytes / 16);
  params.workspace = workspace.data();
  params.squared = found.first.data();
  params.indices = found.second.data();
  cuda::nearest(params, 0);
  EXPECT(found == expected, "%d neighbours: %ld queries, %ld rows, dim %ld, %ld bytes", params.k,
         long(count), long(rows), long(dim), long(bytes));
}

// Of rows far apart, the screen leaves each query only the segment that its nearest row is in. With
// groups the same, if they tell segments apart; if they do not, a part; of its own group nothing.
void test_the_screen_drops_work() {
  constexpr int64_t kDim = 16, kSegments = 16, kRows = kSegments * cuda::kSegmentRows, kCount = 40;
  std::normal_distribution<float> normal;
  std::vector<float> rows(kRows * kDim), queries;
  for (float& value : rows) value = normal(random_bits);
  const Stored bank(rows, false);
  std::vector<int64_t> in_order(kRows), at_random(kRows), one(kRows), first(kCount);
  for (int64_t r = 0; r < kRows; ++r) {
    in_order[r] = r / (4 * cuda::kSegmentRows);
    at_random[r] = integer(0, 63);
  }
  for (int64_t q = 0; q < kCount; ++q) {
    first[q] = integer(0, kRows - 1);
    for (int64_t j = 0; j < kDim; ++j) {
      queries.push_back(rows[first[q] * kDim + j] + 1e-3f * normal(random_bits));
    }
  }
  NearestParams params = nearest_params(queries, bank, kDim);
  params.method = SearchMethod::kScreened;
  const auto kept = [&](const std::vector<int64_t>* bank_groups) {
    std::vector<int64_t> query_groups;
    if (bank_groups != nullptr) {
      for (const int64_t row : first) query_groups.push_back((*bank_groups)[row]);
      params.groups = {query_groups.data(), bank_groups->data(), 1};
    }
    int64_t pairs = 0;
    EXPECT(nearest_on_cuda(params, &pairs) == nearest_on_cpu(params), "rows far apart");
    return long(pairs);
  };
  const long all = kCount * kSegments;
  const long alone = kept(nullptr), ordered = kept(&in_order), mixed = kept(&at_random);
  EXPECT(kCount <= alone && alone <= kCount * 11 / 10, "%ld pairs of %ld", alone, all);
  EXPECT(kCount <= ordered && ordered <= kCount * 11 / 10, "%ld pairs of %ld", ordered, all);
  EXPECT(kCount <= mixed && mixed <= all * 6 / 10, "%ld pairs of %ld", mixed, all);
  EXPECT(kept(&one) == 0, "of one group");
}

void test_few_queries_are_not_screened() {
  const auto is_screened = [](int64_t queries) {
    return cuda::Plan(queries, 1 << 20, 64, SearchMethod::kAuto, 1 << 30).is_screened;
  };
  EXPECT(!is_screened(32) && is_screened(33), "the choice of a method");
}

// The normal numbers against float64, at random and near the places where quarters of a turn meet.
void test_normal_pair() {
  constexpr double kTurn = 6.283185307179586;
  const auto word = [](bool anywhere) {
    return anywhere ? static_cast<uint32_t>(random_bits())
                    : static_cast<uint32_t>(integer(0, 64) * (int64_t{1} << 26) + integer(-2, 2));
  };
  double worst = 0.0;
  for (int i = 0; i < 2000; ++i) {
    const uint32_t radius = word(i % 2 == 0), turn = word(i % 3 == 0);
    const double r = std::sqrt(-2 * std::log(((radius >> 8) + 1.0) * 0x1p-24));
    const double t = kTurn * (turn * 0x1p-32);
    const double expected[2] = {r * std::cos(t), r * std::sin(t)};
    const Normals found = normal_pair(radius, turn);
    for (int k = 0; k < 2; ++k) {
      // Where the expected number is 0 but for the rounding of t, it can be no smaller than that.
      const double size = std::fmax(std::fabs(expected[k]), 1e-8);
      worst = std::fmax(worst, std::fabs(found.value[k] - expected[k]) / size);
    }
  }
  EXPECT(worst <= 1e-6, "normal_pair: off by %.3g of the value", worst);
}

void test_crop_pairs() {
  CropPairsParams params{};
  constexpr int64_t kSmallest[] = {4, 32, 1};  // of each kind
  const int64_t kind = integer(0, 2);
  params.kind = static_cast<PairKind>(kind);
  params.images = integer(1, 3);
  params.channels = integer(1, 4);
  params.size = kSmallest[kind] + integer(0, 38);
  if (integer(0, 1) == 1) params.size = (params.size + 3) / 4 * 4;
  params.max_redraws = integer(0, 1) == 1 ? integer(1, 100) : 0;
  params.height = params.size + integer(0, 2 * params.size);
  params.width = params.size + integer(0, 2 * params.size);
  params.pairs = integer(0, 5);
  params.first_pair = integer(0, UINT32_MAX - params.pairs);
  params.seed = random_bits();
  params.step = static_cast<uint32_t>(random_bits());
  params.colour_shift = static_cast<float>(uniform(0, 1));
  params.pixel_noise = static_cast<float>(uniform(0, 1));
  const int64_t plane = params.height * params.width;
  std::vector<uint8_t> pixels(params.images * params.channels * plane);
  for (uint8_t& pixel : pixels) pixel = static_cast<uint8_t>(integer(0, 255));
  const std::vector<float> mean = hard_values(params.channels, plane, plane);
  std::vector<int64_t> image_of(params.pairs);
  for (int64_t& image : image_of) image = integer(-1, params.images);  // also out of range
  params.pixels = pixels.data();
  params.mean = mean.data();
  params.image_of = image_of.data();

  struct Found {
    std::vector<float> patches;
    std::vector<int64_t> corners, labels;
  };
  const auto buffers = [&params] {
    return Found{
        std::vector<float>(2 * params.pairs * params.channels * params.size * params.size, NAN),
        std::vector<int64_t>(4 * params.pairs, -1), std::vector<int64_t>(params.pairs, -1)};
  };
  const auto use = [&params](Found& found) {
    params.patches = found.patches.data();
    params.corners = found.corners.data();
    params.labels = found.labels.data();
  };
  Found on_cpu = buffers(), on_cuda = buffers();
  use(on_cpu);
  cpu::crop_pairs(params, static_cast<int>(integer(1, 3)));
  use(on_cuda);
  cuda::crop_pairs(params, 0);
  EXPECT(on_cpu.corners == on_cuda.corners && on_cpu.labels == on_cuda.labels,
         "crop_pairs: places of size %ld in %ldx%ld", long(params.size), long(params.width),
         long(params.height));
  EXPECT(params.pairs == 0 || std::memcmp(on_cpu.patches.data(), on_cuda.patches.data(),
                                          on_cpu.patches.size() * sizeof(float)) == 0,
         "crop_pairs: pixels of size %ld in %ldx%ld", long(params.size), long(params.width),
         long(params.height));
}

// Vectors in the order of their nearest centroids, then of the distance to it.
struct InOrder {
  std::vector<int64_t> order, own;
  std::vector<float> vectors, radii;

  InOrder(const std::vector<float>& given, const std::vector<float>& centroids, int64_t dim) {
    const Found found = nearest_on_cpu(nearest_params(given, Stored(centroids, false), dim));
    order.resize(found.first.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
      return std::pair(found.second[a], found.first[a]) <
             std::pair(found.second[b], found.first[b]);
    });
    for (const int64_t r : order) {
      vectors.insert(vectors.end(), given.begin() + r * dim, given.begin() + (r + 1) * dim);
      own.push_back(found.second[r]);
      radii.push_back(found.first[r]);
    }
  }
};

// The centroids [., dim] that are some row's nearest.
std::vector<float> used_centroids(const std::vector<float>& rows, const std::vector<float>& all,
                                  int64_t dim) {
  const InOrder bank(rows, all, dim);
  std::vector<float> used;
  for (int64_t c = 0; c < static_cast<int64_t>(all.size()) / dim; ++c) {
    if (std::binary_search(bank.own.begin(), bank.own.end(), c)) {
      used.insert(used.end(), all.begin() + c * dim, all.begin() + (c + 1) * dim);
    }
  }
  return used;
}

// Rows of a clustered bank; the first `clusters` will be its centroids.
std::vector<float> rows_for_clusters(int64_t rows, int64_t clusters, int64_t dim, bool is_half) {
  std::vector<float> values = hard_values(rows, dim, dim);
  const int64_t kind = integer(0, 5);
  if (kind == 0) {  // the rows of a cluster are all equal
    for (int64_t i = clusters * dim; i < rows * dim; ++i) values[i] = values[i - clusters * dim];
  } else if (kind == 1 && !is_half) {  // too large for codes: their scale is 0
    float largest = 0;
    for (const float value : values) largest = std::fmax(largest, std::fabs(value));
    for (float& value : values) value = value / largest * 1e16f;
  }
  return values;
}

// A clustered bank about some of its own rows, as patchsvdd_fast/search/gpu_clusters.py makes it.
void test_nearest_in_segments() {
  const int64_t dim = integer(1, 80), rows = integer(1, 700), count = integer(1, 300);
  const bool is_half = integer(0, 2) == 0;
  const int64_t most_clusters = integer(1, std::min<int64_t>(rows, 6));
  const Stored given(rows_for_clusters(rows, most_clusters, dim, is_half), is_half);
  const std::vector<float> given_queries = hard_values_near(given.values, count, dim);
  const std::vector<float> some(given.values.begin(), given.values.begin() + most_clusters * dim);
  const std::vector<float> centroids = used_centroids(given.values, some, dim);
  const auto clusters = static_cast<int64_t>(centroids.size()) / dim;
  const InOrder bank(given.values, centroids, dim), queries(given_queries, centroids, dim);
  const Stored stored(bank.vectors, is_half);

  std::vector<int64_t> segment_starts, own_starts;
  std::vector<int32_t> segment_clusters, cluster_segments;
  std::vector<float> least_radius, largest_radius, gaps;
  int64_t row = 0;
  for (int64_t c = 0; c < clusters; ++c) {
    const auto is_of_cluster = [&] { return row < rows && bank.own[row] == c; };
    cluster_segments.push_back(static_cast<int32_t>(segment_clusters.size()));
    own_starts.push_back(std::lower_bound(queries.own.begin(), queries.own.end(), c) -
                         queries.own.begin());
    while (is_of_cluster()) {
      segment_starts.push_back(row);
      segment_clusters.push_back(static_cast<int32_t>(c));
      least_radius.push_back(bank.radii[row]);
      for (int i = 0; i < cuda::kSegmentRows && is_of_cluster(); ++i) ++row;
      largest_radius.push_back(bank.radii[row - 1]);
    }
    for (int64_t other = 0; other < clusters; ++other) {
      const float* points = centroids.data();
      const long double gap = true_distance(points + c * dim, points + other * dim, dim);
      gaps.push_back(static_cast<float>(gap * (1 + 1e-6L) + 1e-30L));
    }
  }
  segment_starts.push_back(rows);
  own_starts.push_back(count);
  const auto segments = static_cast<int64_t>(segment_clusters.size());
  cluster_segments.push_back(static_cast<int32_t>(segments));

  std::vector<float> centre(dim), largest(1), norms(segments), errors(segments);
  CodesOnHost codes(segments * cuda::kSegmentRows, cuda::padded_dim(dim));
  std::vector<float> distances(count, INFINITY);
  std::vector<int64_t> indices(count, kNoRow);
  SegmentedNearestParams params{};
  params.bank = {rows,
                 dim,
                 clusters,
                 segments,
                 stored.data(),
                 is_half,
                 bank.order.data(),
                 segment_starts.data(),
                 segment_clusters.data(),
                 cluster_segments.data(),
                 least_radius.data(),
                 largest_radius.data(),
                 centroids.data(),
                 gaps.data(),
                 centre.data(),
                 largest.data(),
                 codes.halves.data(),
                 codes.squares.data(),
                 codes.errors.data(),
                 norms.data(),
                 errors.data()};
  // Groups are of the queries and rows as given; the search takes those of its queries in order.
  NearestParams plain = nearest_params(given_queries, given, dim);
  const RandomGroups groups(count, rows);
  std::vector<int64_t> sorted_groups;
  for (const int64_t number : queries.order) sorted_groups.push_back(groups.of_queries[number]);
  params.groups.rows_per_group = 1;
  if (integer(0, 1) == 1) {
    plain.groups = params.groups = groups.groups();
    params.groups.query_groups = sorted_groups.data();
  }
  params.queries = count;
  params.query_data = queries.vectors.data();
  params.own = queries.own.data();
  params.own_starts = own_starts.data();
  params.squared = distances.data();
  params.indices = indices.data();
  params.workspace_limit = integer(0, 1) == 1 ? 1 : 1 << 30;
  cuda::encode_segments(params.bank, 0);
  std::vector<float4> workspace(
      cuda::nearest_in_segments_workspace(params.bank, count, params.workspace_limit) / 16);
  params.workspace = workspace.data();
  cuda::nearest_in_segments(params, 0);
  cuda::finish_search({count, params.squared, params.indices}, 0);
  const Found expected = nearest_on_cpu(plain);
  for (int64_t q = 0; q < count; ++q) {
    const int64_t number = queries.order[q];
    EXPECT(distances[q] == expected.first[number] && indices[q] == expected.second[number],
           "in segments: %ld for %ld (%ld rows, dim %ld)", long(indices[q]),
           long(expected.second[number]), long(rows), long(dim));
  }
}

// A launch needs a kernel with a name; a function alone does not compile.
template <typename Launched, typename = void>
constexpr bool can_launch = false;
template <typename Launched>
constexpr bool can_launch<Launched, std::void_t<decltype(cuda::launch(
                                        std::declval<Launched>(), std::declval<cuda::Launch>(),
                                        std::declval<std::uintptr_t>(), std::declval<float*>()))>> =
    true;
static_assert(can_launch<cuda::Kernel<float*>>);
static_assert(!can_launch<void (*)(float*)>);

// Adds what the launches of a test are called in their errors: the test is run with its first
// launch refused, then with its second, until none is left to refuse.
void add_launches(void (*test)(), std::set<std::string>* names) {
  const std::string complaint = ": invalid argument";
  const std::mt19937_64 start = random_bits;
  for (int launches = 0;; ++launches) {
    random_bits = start;  // so that the test does the same each time
    cuda_on_host::refuse_launch(launches);
    try {
      test();
      break;
    } catch (const std::runtime_error& error) {
      const std::string what = error.what();
      const size_t colon = what.find(complaint);
      EXPECT(colon != std::string::npos && colon + complaint.size() == what.size(), "%s",
             what.c_str());
      names->insert(what.substr(0, colon));
    }
  }
  cuda_on_host::refuse_launch(-1);
}

void test_a_refused_launch_is_reported_under_its_kernels_name() {
  random_bits.seed(1);  // the same in any number of rounds
  const auto in_order = [](const std::set<std::string>& names) {
    std::string joined;
    for (const std::string& name : names) joined += (joined.empty() ? "" : " ") + name;
    return joined;
  };
  const auto expect_launches = [&](void (*test)(), const std::string& expected) {
    std::set<std::string> names;
    add_launches(test, &names);
    EXPECT(in_order(names) == expected, "%s", in_order(names).c_str());
  };
  expect_launches([] { test_extract_patches(random_grid()); }, "extract_tiles");
  expect_launches([] { test_extract_patches_backward(random_grid()); }, "gather_gradients");
  expect_launches(test_score_map, "average_columns sum_rows");
  expect_launches(test_crop_pairs, "crop_planes");

  // The searches draw at random whether there are groups, or shares to merge, which take kernels of
  // their own.
  const auto expect_launches_in_time = [&](std::vector<void (*)()> tests, const char* expected) {
    std::set<std::string> found;
    for (int round = 0; round < 20 && in_order(found) != expected; ++round) {
      for (void (*test)() : tests) add_launches(test, &found);
    }
    EXPECT(in_order(found) == expected, "%s", in_order(found).c_str());
  };
  expect_launches_in_time({[] { test_k_nearest(3); }}, "list_neighbours merge_shares");
  expect_launches_in_time(
      {[] { test_nearest(20); }, [] { test_nearest(70); }, test_nearest_in_segments},
      "clear_counts clear_each clear_visits encode_segment find_centre find_groups find_largest "
      "find_visits finish_each keep_queries limit_by_keys list_for_other_clusters lower_limits "
      "measure_centroids offer_each rescore_segment screen_narrow screen_wide");
}

}  // namespace

int main(int argc, char** argv) {
  if (argc == 3 && std::string(argv[1]) == "broken") return run_broken(argv[2]);
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 10;
  for (int round = 0; round < rounds; ++round) {
    cuda_on_host::set_schedule(round % kSchedules);
    test_extract_patches(random_grid());
    test_extract_patches_backward(random_grid());
    test_score_map();
    test_normal_pair();
    test_crop_pairs();
    if (round % kSlower == 0) {
      test_screen();
      test_nearest(integer(1, 80));
      test_k_nearest(40);
      test_nearest_in_segments();
    }
  }
  // So many rows of patches that a block takes several, not all of them as many.
  test_extract_patches(grid_of(2, 3, 1024, 4, 2, 1));
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
  // What is launched: sanitizers would take minutes for it, and see nothing that is not in the
  // above.
  test_the_screen_drops_work();
  test_few_queries_are_not_screened();
  test_a_refused_launch_is_reported_under_its_kernels_name();
#endif
  return report();
}
