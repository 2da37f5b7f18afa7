// The CUDA kernels on the host, for sanitizers: each against its CPU twin on awkward sizes, under
// several schedules of the threads, in buffers of the exact size.
//
//   cuda_test [rounds]     runs everything; prints what failed and exits with 1
//   cuda_test broken NAME  runs a kernel that is wrong on purpose (broken_kernels.cu); exits with 1
//                          if its result depends on the schedule

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "../../csrc/cpu/kernels.h"
#include "../../csrc/cuda/kernels.h"
#include "../../csrc/random.h"
#include "../cuda_on_host/cuda_on_host.h"
#include "broken_kernels.h"
#include "checks.h"

namespace {

using namespace psvdd;

constexpr unsigned kSchedules = 4;

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

PatchGrid random_grid() {
  PatchGrid grid;
  grid.images = integer(1, 2);
  grid.channels = integer(1, 3);
  grid.size = integer(1, 20);
  grid.stride = integer(1, grid.size);
  grid.height = grid.size + integer(0, 20);
  grid.width = grid.size + integer(0, 20);
  grid.rows = (grid.height - grid.size) / grid.stride + 1;
  grid.columns = (grid.width - grid.size) / grid.stride + 1;
  return grid;
}

void test_extract_patches() {
  const PatchGrid grid = random_grid();
  const int64_t pixels = grid.channels * grid.height * grid.width;
  const int64_t elements =
      grid.images * grid.rows * grid.columns * grid.channels * grid.size * grid.size;
  std::vector<uint8_t> images(grid.images * pixels);
  for (uint8_t& pixel : images) pixel = static_cast<uint8_t>(integer(0, 255));
  const std::vector<float> mean = hard_values(1, pixels, pixels);
  const bool normalized = integer(0, 1) == 1;
  const int64_t bytes = normalized ? 4 : 1;
  std::vector<uint8_t> on_cpu(elements * bytes), on_cuda(elements * bytes, 0xee);
  ExtractPatchesParams params{
      grid, images.data(), normalized ? mean.data() : nullptr, on_cpu.data(), 1, PixelType::kUint8};
  cpu::extract_patches(params, 1);
  params.patches = on_cuda.data();
  cuda::extract_patches(params, 0);
  EXPECT(on_cpu == on_cuda, "extract_patches: size %ld, stride %ld, %ldx%ld", long(grid.size),
         long(grid.stride), long(grid.height), long(grid.width));

  const std::vector<float> gradients = hard_values(1, elements, elements);
  std::vector<float> cpu_images(images.size()), cuda_images(images.size(), NAN);
  ExtractPatchesBackwardParams backward{grid, gradients.data(), cpu_images.data(), false};
  cpu::extract_patches_backward(backward, 1);
  backward.image_gradients = cuda_images.data();
  cuda::extract_patches_backward(backward, 0);
  EXPECT(std::memcmp(cpu_images.data(), cuda_images.data(), images.size() * 4) == 0,
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
  params.neighbours = integer(0, 1) == 1;
  params.images = integer(1, 3);
  params.channels = integer(1, 4);
  params.size = params.neighbours ? integer(32, 70) : integer(4, 40);
  if (integer(0, 1) == 1) params.size = params.size / 4 * 4;
  params.max_redraws = integer(0, 1) == 1 ? integer(1, 100) : 0;
  params.height = params.size + integer(0, 2 * params.size);
  params.width = params.size + integer(0, 2 * params.size);
  params.pairs = integer(0, 5);
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

}  // namespace

int main(int argc, char** argv) {
  if (argc == 3 && std::string(argv[1]) == "broken") return run_broken(argv[2]);
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 10;
  for (int round = 0; round < rounds; ++round) {
    cuda_on_host::set_schedule(round % kSchedules);
    test_extract_patches();
    test_score_map();
    test_normal_pair();
    test_crop_pairs();
  }
  return report();
}
