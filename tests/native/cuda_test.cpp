// The CUDA kernels on the host, for sanitizers: each against its CPU twin on awkward sizes, under
// several schedules of the threads, in buffers of the exact size.
//
//   cuda_test [rounds]     runs everything; prints what failed and exits with 1
//   cuda_test broken NAME  runs a kernel that is wrong on purpose (broken_kernels.cu); exits with 1
//                          if its result depends on the schedule

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "../../csrc/cpu/kernels.h"
#include "../../csrc/cuda/kernels.h"
#include "../../csrc/cuda/screen.h"
#include "../../csrc/portable.h"
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

void test_nearest() {
  const int64_t dim = integer(1, 80), rows = integer(1, 600), count = integer(1, 40);
  const std::vector<float> bank = hard_values(rows, dim, dim);
  const std::vector<float> queries = hard_values_near(bank, count, dim);
  const bool has_groups = integer(0, 1) == 1;
  const int64_t per_group = integer(1, 200);
  std::vector<int64_t> query_groups(count), bank_groups((rows + per_group - 1) / per_group);
  for (int64_t& group : query_groups) group = integer(0, 3);
  for (int64_t& group : bank_groups) group = integer(0, 3);
  NearestParams params{};
  params.queries = count;
  params.bank_rows = rows;
  params.dim = dim;
  params.query_data = queries.data();
  params.bank_data = bank.data();
  params.groups.rows_per_group = per_group;
  params.workspace_limit = integer(0, 1) == 1 ? 1 : 1 << 30;  // the smallest chunks, or only one
  if (has_groups) {
    params.groups.query_groups = query_groups.data();
    params.groups.bank_groups = bank_groups.data();
  }
  const auto search = [&](void (*nearest)(const NearestParams&)) {
    std::pair<std::vector<float>, std::vector<int64_t>> found(count, count);
    params.distances = found.first.data();
    params.indices = found.second.data();
    nearest(params);
    return found;
  };
  const auto expected = search([](const NearestParams& p) { cpu::nearest(p, 1); });
  for (const SearchMethod method : {SearchMethod::kPlain, SearchMethod::kScreened}) {
    params.method = method;
    std::vector<unsigned char> workspace(
        cuda::nearest_workspace(count, rows, dim, method, has_groups, params.workspace_limit) +
        256);
    void* start = workspace.data();
    size_t space = workspace.size();
    params.workspace = std::align(256, space - 256, start, space);
    const auto found = search([](const NearestParams& p) { cuda::nearest(p, 0); });
    EXPECT(found.first == expected.first && found.second == expected.second,
           "nearest: %ld queries, %ld rows, dim %ld, method %d", long(count), long(rows), long(dim),
           static_cast<int>(method));
  }
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
    if (round % kSlower == 0) {
      test_screen();
      test_nearest();
    }
  }
  // So many rows of patches that a block takes several, not all of them as many.
  test_extract_patches(grid_of(2, 3, 1024, 4, 2, 1));
  return report();
}
