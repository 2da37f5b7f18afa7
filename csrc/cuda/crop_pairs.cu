// Random pairs of patches for training: cut out, normalised and, unless they are neighbours,
// shifted in colour and covered with noise, in one launch.
//
// A block makes one channel of one patch. Its first thread draws where the pair lies and shares it;
// then every thread makes four pixels of a row at a time, from the four words of one Philox call,
// and writes them as 16 bytes where the size is a multiple of four. Traffic is 4 bytes written and
// 5 read per pixel, the reads mostly from the second-level cache; the arithmetic, some 60
// instructions a pixel, takes about as long. Both are microseconds, so launching it matters as
// much.

#include <cstdint>

#include "../crop_pairs.h"
#include "kernels.h"
#include "launch.h"
#include "ptx.h"

namespace psvdd::cuda {
namespace {

// Where the block's plane is and what is drawn for it; also writes the patch's corner and label.
__device__ PatchPlane prepare_plane(const CropPairsParams& params, int64_t plane) {
  const int64_t channel = plane % params.channels;
  const int64_t patch = plane / params.channels;
  const int64_t pair = patch % params.pairs, which = patch / params.pairs;
  const PairPlace place = place_pair(params, pair);
  if (channel == 0) {
    params.corners[2 * patch] = corner_of(place, which).top;
    params.corners[2 * patch + 1] = corner_of(place, which).left;
    if (which == 0) params.labels[pair] = place.label;
  }
  return patch_plane(params, pair, which, place, channel);
}

// kWhole: all pixels of a row come in whole fours, each of which begins at a multiple of 16 bytes.
template <bool kWhole>
__global__ void crop_planes(CropPairsParams params) {
  auto* shared = reinterpret_cast<PatchPlane*>(shared_memory());
  if (threadIdx.x == 0) *shared = prepare_plane(params, blockIdx.x);
  __syncthreads();
  const PatchPlane plane = *shared;

  const auto size = static_cast<uint32_t>(params.size);
  const uint32_t quads_per_row = (size + 3) / 4;
  const RandomKey key = random_key(params.seed);
  for (uint32_t quad = threadIdx.x; quad < size * quads_per_row; quad += blockDim.x) {
    const uint32_t y = quad / quads_per_row, x = 4 * (quad % quads_per_row);
    const uint32_t count = kWhole || size - x >= 4 ? 4 : size - x;
    const uint8_t* pixels = plane.pixels + y * params.width + x;
    const float* mean = plane.mean + y * params.width + x;
    float* out = plane.out + static_cast<int64_t>(y) * size + x;
    float values[4];
#pragma unroll
    for (uint32_t i = 0; i < 4; ++i) {
      values[i] = i < count ? normalized(pixels[i], mean[i]) : 0.0f;
    }
    if (is_perturbed(params)) {
      RandomWords counter = plane.noise;
      counter.word[0] += quad;
      const RandomWords words = random_words(key, counter);
#pragma unroll
      for (uint32_t i = 0; i < 4; i += 2) {
        const Normals noise = normal_pair(words.word[i], words.word[i + 1]);
        values[i] = values[i] + plane.shift + params.pixel_noise * noise.value[0];
        values[i + 1] = values[i + 1] + plane.shift + params.pixel_noise * noise.value[1];
      }
    }
    if (kWhole) {
      *reinterpret_cast<float4*>(out) = float4{values[0], values[1], values[2], values[3]};
    } else {
#pragma unroll
      for (uint32_t i = 0; i < 4; ++i) {
        if (i < count) out[i] = values[i];
      }
    }
  }
}

}  // namespace

void crop_pairs(const CropPairsParams& params, std::uintptr_t stream) {
  const int64_t planes = 2 * params.pairs * params.channels;
  if (planes == 0) return;
  const bool whole =
      params.size % 4 == 0 && reinterpret_cast<std::uintptr_t>(params.patches) % 16 == 0;
  const dim3 grid(static_cast<unsigned>(planes));
  launch(whole ? PSVDD_KERNEL(crop_planes<true>) : PSVDD_KERNEL(crop_planes<false>),
         {grid, kThreadsPerBlock, sizeof(PatchPlane)}, stream, params);
}

}  // namespace psvdd::cuda
