// Random pairs of patches for training: where they lie and which random numbers they get. CPU and
// CUDA share this code, so that both draw the same pairs (docs/design/training.md).
//
// Every random number is a function of the seed and of a counter of four words: an index, what the
// number is for (with the patch size), the pair, and the step. So no pair depends on which others
// are drawn, or on the order.
#pragma once

#include <cstdint>

#include "params.h"
#include "portable.h"
#include "random.h"

namespace psvdd {

// What a random number is for. The patch size is in the same word of the counter, so that pairs of
// two sizes that are drawn in one step differ.
enum PairPurpose : uint32_t {
  kPositionPlace = 0,   // index: 2 times the redraws so far; and that plus 1
  kNeighbourPlace = 1,  // index: 0
  kColourShift = 2,     // plus 1 for the second patch; index: the channel
  kPixelNoise = 4,      // plus 1 for the second patch; index: of four pixels side by side
  kViewPlace = 6,       // index: 0
};

PSVDD_HOST_DEVICE inline RandomWords pair_counter(const CropPairsParams& params, int64_t pair,
                                                  uint32_t purpose, int64_t index) {
  return {{static_cast<uint32_t>(index), static_cast<uint32_t>(params.size) << 3 | purpose,
           static_cast<uint32_t>(params.first_pair + pair), params.step}};
}

PSVDD_HOST_DEVICE inline RandomWords pair_words(const CropPairsParams& params, int64_t pair,
                                                uint32_t purpose, int64_t index) {
  return random_words(random_key(params.seed), pair_counter(params, pair, purpose, index));
}

struct Corner {
  int64_t top, left;  // pixels
};

struct PairPlace {
  Corner first, second;
  int64_t label;
};

PSVDD_HOST_DEVICE inline Corner corner_of(const PairPlace& place, int64_t which) {
  return which == 0 ? place.first : place.second;
}

PSVDD_HOST_DEVICE inline int64_t clipped(int64_t value, int64_t limit) {
  return value < 0 ? 0 : value < limit ? value : limit;
}

// The corner of a patch that is anywhere in the image.
PSVDD_HOST_DEVICE inline Corner corner_anywhere(const CropPairsParams& params,
                                                const RandomWords& words) {
  return {uniform_below(words.word[0], params.height - params.size + 1),
          uniform_below(words.word[1], params.width - params.size + 1)};
}

// The first patch is anywhere; the second up to K/32 pixels away along each axis, not in its place.
PSVDD_HOST_DEVICE inline PairPlace place_neighbours(const CropPairsParams& params, int64_t pair) {
  const Corner limit = {params.height - params.size, params.width - params.size};
  const int64_t reach = params.size / 32, side = 2 * reach + 1;
  const RandomWords words = pair_words(params, pair, kNeighbourPlace, 0);
  const Corner first = corner_anywhere(params, words);
  // One number for both axes; skipping the middle one leaves out (0, 0).
  int64_t cell = uniform_below(words.word[2], side * side - 1);
  cell += cell >= side * side / 2 ? 1 : 0;
  const Corner second = {clipped(first.top + cell / side - reach, limit.top),
                         clipped(first.left + cell % side - reach, limit.left)};
  return {first, second, 0};
}

// The first patch is anywhere; the second in one of eight directions, per axis 3K/4 to K - 1 pixels
// away, then clipped to the image. Labels count the directions row by row, from above left to below
// right.
PSVDD_HOST_DEVICE inline PairPlace place_positions(const CropPairsParams& params, int64_t pair) {
  const Corner limit = {params.height - params.size, params.width - params.size};
  const int64_t nearest = 3 * params.size / 4, jitter = params.size / 4;
  for (int64_t redraw = 0;; ++redraw) {
    const RandomWords place = pair_words(params, pair, kPositionPlace, 2 * redraw);
    const RandomWords offset = pair_words(params, pair, kPositionPlace, 2 * redraw + 1);
    const Corner first = corner_anywhere(params, place);
    const int64_t label = uniform_below(offset.word[0], 8);
    const int64_t cell = label + (label >= 4 ? 1 : 0);  // of a 3x3 neighbourhood
    const Corner second = {
        first.top + (cell / 3 - 1) * (nearest + uniform_below(offset.word[1], jitter)),
        first.left + (cell % 3 - 1) * (nearest + uniform_below(offset.word[2], jitter))};
    const Corner inside = {clipped(second.top, limit.top), clipped(second.left, limit.left)};
    const bool fits = inside.top == second.top && inside.left == second.left;
    if (fits || redraw >= params.max_redraws) return {first, inside, label};
  }
}

// Both patches are in one place, anywhere.
PSVDD_HOST_DEVICE inline PairPlace place_views(const CropPairsParams& params, int64_t pair) {
  const Corner both = corner_anywhere(params, pair_words(params, pair, kViewPlace, 0));
  return {both, both, 0};
}

PSVDD_HOST_DEVICE inline PairPlace place_pair(const CropPairsParams& params, int64_t pair) {
  if (params.kind == PairKind::kNeighbour) return place_neighbours(params, pair);
  if (params.kind == PairKind::kView) return place_views(params, pair);
  return place_positions(params, pair);
}

// Whether the patches are shifted in colour and covered with noise.
PSVDD_HOST_DEVICE inline bool is_perturbed(const CropPairsParams& params) {
  return params.kind != PairKind::kNeighbour;
}

// One channel of one patch: where its pixels are, and what is drawn for it.
struct PatchPlane {
  const uint8_t* pixels;  // the upper left one, rows params.width apart
  const float* mean;      // the same
  float* out;             // [K, K]
  float shift;            // added to every pixel
  RandomWords noise;      // the counter of its first four pixels; word 0 counts on from there
};

// Of patch `which`, 0 or 1, of a pair.
PSVDD_HOST_DEVICE inline PatchPlane patch_plane(const CropPairsParams& params, int64_t pair,
                                                int64_t which, const PairPlace& place,
                                                int64_t channel) {
  const Corner corner = corner_of(place, which);
  const int64_t in_image = (channel * params.height + corner.top) * params.width + corner.left;
  const int64_t image = clipped(params.image_of[pair], params.images - 1);
  const int64_t plane = (which * params.pairs + pair) * params.channels + channel;
  const int64_t quads = params.size * ((params.size + 3) / 4);
  const auto patch = static_cast<uint32_t>(which);
  float shift = 0.0f;
  if (is_perturbed(params)) {
    const RandomWords words = pair_words(params, pair, kColourShift + patch, channel);
    shift = params.colour_shift * normal_pair(words.word[0], words.word[1]).value[0];
  }
  return {params.pixels + image * params.channels * params.height * params.width + in_image,
          params.mean + in_image, params.patches + plane * params.size * params.size, shift,
          pair_counter(params, pair, kPixelNoise + patch, channel * quads)};
}

PSVDD_HOST_DEVICE inline float normalized(uint8_t pixel, float mean) {
  return (to_float(pixel) - mean) / 255.0f;
}

}  // namespace psvdd
