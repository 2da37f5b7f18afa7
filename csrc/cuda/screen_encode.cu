// Rounds vectors to float16 about the bank's centre, with a bound on what rounding each one cost.
//
// A warp takes a row, its lanes neighbouring coordinates. Traffic: a bank's vectors are read twice
// (once for their range), and half as many bytes are written. Bound by memory.

#include "../portable.h"
#include "kernels.h"
#include "ptx.h"
#include "screen.h"
#include "warp.h"

namespace psvdd::cuda {
namespace {

constexpr int64_t kCentreRows = 64;  // any centre will do; the mean of some rows is near the others
constexpr float kLargestHalf = 65504.0f;

static_assert(kSegmentRows % kWarpsPerBlock == 0,
              "each warp takes the same number of rows of a segment");

__device__ float coordinate(const Vectors& vectors, int64_t row, int64_t j) {
  const int64_t element = row * vectors.dim + j;
  if (vectors.is_half) return to_float(static_cast<const Half*>(vectors.data)[element]);
  return static_cast<const float*>(vectors.data)[element];
}

// A thread per coordinate.
__global__ void find_centre(Vectors bank, Frame frame) {
  for (int64_t j = first_element(); j < bank.dim; j += element_step()) {
    const int64_t step = bank.rows < kCentreRows ? 1 : bank.rows / kCentreRows;
    const int64_t count = (bank.rows + step - 1) / step;
    float sum = 0.0f;
    for (int64_t row = 0; row < bank.rows; row += step) {
      sum += coordinate(bank, row, j) / static_cast<float>(count);
    }
    frame.centre[j] = sum;
    if (j == 0) *frame.largest = 0.0f;
  }
}

// A warp per row, and on to the next.
__global__ void find_largest(Vectors bank, Frame frame) {
  const int64_t warps = element_step() / kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  unsigned largest = 0;  // as bits: those of non-negative floats are ordered alike, NaN above all
  for (int64_t row = first_element() / kWarp; row < bank.rows; row += warps) {
    for (int64_t j = lane; j < bank.dim; j += kWarp) {
      const unsigned size = __float_as_uint(fabsf(coordinate(bank, row, j) - frame.centre[j]));
      largest = size > largest ? size : largest;
    }
  }
  largest = warp_max(largest);
  if (lane == 0) atomicMax(reinterpret_cast<unsigned*>(frame.largest), largest);
}

// A block per segment.
__global__ void encode_segment(Vectors vectors, Frame frame, Codes codes, Segments segments) {
  auto* segment_norms = reinterpret_cast<float*>(shared_memory());  // [kWarpsPerBlock]
  float* segment_errors = segment_norms + kWarpsPerBlock;           // [kWarpsPerBlock]
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const float scale = frame_scale(*frame.largest);
  const int64_t begin = vectors.begin(blockIdx.x), end = vectors.end(blockIdx.x);
  float largest_norm = 0.0f, largest_error = 0.0f;
  for (int r = warp; r < kSegmentRows; r += kWarpsPerBlock) {
    const int64_t row = static_cast<int64_t>(blockIdx.x) * kSegmentRows + r;  // of the codes
    const bool is_padding = begin + r >= end;
    // Sums of squares over the lane's coordinates: of the code, of what rounding took, of the
    // vector.
    float square = 0.0f, residual = 0.0f, size = 0.0f;
    for (int64_t j = lane; j < codes.padded_dim; j += kWarp) {
      uint16_t bits = 0;
      if (j < vectors.dim && !is_padding && scale != 0.0f) {
        const float t = (coordinate(vectors, begin + r, j) - frame.centre[j]) * scale;
        bits = half_bits(fminf(fmaxf(t, -kLargestHalf), kLargestHalf));
        const float code = to_float(Half{bits});
        const float rest = t - code;
        square += code * code;
        residual += rest * rest;
        size += t * t;
      }
      codes.halves[row * codes.padded_dim + j] = bits;
    }
    square = warp_sum(square);
    residual = warp_sum(residual);
    size = warp_sum(size);
    // The first term is what rounding to float16 took, rounded up; the second allows for the
    // rounding of x - centre, the third for squares that underflow.
    float error = sqrtf(residual) * (kRoundUp + canonical_rounding(vectors.dim)) +
                  0x1p-22f * sqrtf(size) + 0x1p-60f;
    if (scale == 0.0f) error = INFINITY;  // not encoded: nothing is known about the row
    if (is_padding) error = 0.0f;
    if (lane == 0) {
      codes.squares[row] = is_padding ? INFINITY : square;
      codes.errors[row] = error;
    }
    const float norm = sqrtf(square) * (kRoundUp + canonical_rounding(vectors.dim));
    largest_norm = fmaxf(largest_norm, norm);
    largest_error = error > largest_error || error != error ? error : largest_error;  // NaN stays
  }
  if (segments.norms == nullptr) return;
  if (lane == 0) {
    segment_norms[warp] = largest_norm;
    segment_errors[warp] = largest_error;
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int w = 1; w < kWarpsPerBlock; ++w) {
    const float error = segment_errors[w];
    largest_norm = fmaxf(largest_norm, segment_norms[w]);
    largest_error = error > largest_error || error != error ? error : largest_error;
  }
  segments.norms[blockIdx.x] = largest_norm;
  segments.errors[blockIdx.x] = largest_error;
}

}  // namespace

void find_frame(const Vectors& bank, const Frame& frame, std::uintptr_t stream) {
  const auto blocks = [](int64_t threads, int64_t most) {
    return dim3(
        static_cast<unsigned>(std::min((threads + kThreadsPerBlock - 1) / kThreadsPerBlock, most)));
  };
  launch(PSVDD_KERNEL(find_centre), {blocks(bank.dim, kMaxBlocks), kThreadsPerBlock}, stream, bank,
         frame);
  launch(PSVDD_KERNEL(find_largest),
         {blocks(bank.rows * kWarp, 8 * multiprocessors()), kThreadsPerBlock}, stream, bank, frame);
}

void encode(const Vectors& vectors, const Frame& frame, const Codes& codes,
            const Segments& segments, std::uintptr_t stream) {
  const dim3 blocks(static_cast<unsigned>(vectors.segments()));
  launch(PSVDD_KERNEL(encode_segment),
         {blocks, kThreadsPerBlock, 2 * kWarpsPerBlock * sizeof(float)}, stream, vectors, frame,
         codes, segments);
}

}  // namespace psvdd::cuda
