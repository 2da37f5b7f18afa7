// The clustered bank: what is computed once, before it can be searched.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <vector>

#if defined(__GLIBC__)
#include <malloc.h>
#endif

#include "clusters.h"
#include "kernels.h"
#include "parallel.h"
#include "rescore.h"

namespace psvdd::cpu {

namespace {

constexpr int64_t kRowsPerItem = 4096;
constexpr float kFarAway = 1e18f;  // coordinates of centroids that fill up a tile

}  // namespace

double RowProjector::operator()(const float* row, float* projected) {
  squared_ = 0;
  for (int64_t j = 0; j < projection_.dim; ++j) {
    centred_[j] = static_cast<double>(row[j]) - projection_.mean[j];
    squared_ += centred_[j] * centred_[j];
  }
  if (projection_.basis == nullptr) {
    std::copy(centred_.begin(), centred_.end(), sums_.begin());  // the others are zero
  } else {
    active_kernels().products(centred_.data(), projection_.basis, projection_.dim, projection_.axes,
                              sums_.data());
  }
  for (int64_t i = 0; i < projection_.axes; ++i) projected[i] = static_cast<float>(sums_[i]);
  return 0x1p-23 * projection_.stretch * std::sqrt(squared_);
}

void project(const ProjectParams& params, int num_threads) {
  const Rows rows{params.data, params.projection.dim, params.is_half};
  const int64_t items = (params.rows + kRowsPerItem - 1) / kRowsPerItem;
  parallel_for(items, num_threads, [&](int64_t item) {
    std::vector<float> row(params.projection.dim);
    RowProjector projector(params.projection);
    const int64_t end = std::min(params.rows, (item + 1) * kRowsPerItem);
    for (int64_t r = item * kRowsPerItem; r < end; ++r) {
      read_row(rows, r, row.data());
      const double error = projector(row.data(), params.projected + r * params.projection.axes);
      params.errors[r] = static_cast<float>(error * 1.001);
    }
  });
}

void pack_clusters(const PackClustersParams& params, int num_threads) {
  const ClusteredBank& bank = params.bank;
  const SearchKernels& kernels = active_kernels();
  const int64_t axes = bank.projection.axes;
  parallel_for(bank.clusters, num_threads, [&](int64_t c) {
    const int64_t begin = bank.starts[c], end = bank.starts[c + 1];
    const float* centroid = bank.centroids + c * axes;
    const auto projected = [&](int64_t r) { return params.projected + bank.ids[r] * axes; };
    float largest = 0, radius = 0;
    double slack = 0, code_slack = 0;
    for (int64_t r = begin; r < end; ++r) {
      for (int64_t i = 0; i < axes; ++i) {
        largest = std::max(largest, std::fabs(projected(r)[i] - centroid[i]));
      }
      radius = std::max(radius, params.radii[bank.ids[r]]);
    }
    const float scale = std::max(largest / kCodeLimit, 1e-30f);
    int8_t* codes = bank.codes + bank.blocks[c] * bank.packs * 64;
    int32_t* bias = bank.bias + bank.blocks[c] * kLanes;
    float* block_radius = bank.block_radius + bank.blocks[c];
    const int64_t blocks = bank.blocks[c + 1] - bank.blocks[c];
    std::fill(codes, codes + blocks * bank.packs * 64, int8_t{0});
    std::fill(bias, bias + blocks * kLanes, kNothing);
    std::fill(block_radius, block_radius + blocks, 0.0f);
    std::vector<uint8_t> code(axes);
    for (int64_t r = begin; r < end; ++r) {
      const Encoding encoding =
          encode_row(kernels, projected(r), centroid, axes, scale, code.data());
      write_code(code.data(), encoding, bank.packs, r - begin, codes, bias);
      const double error = params.errors[bank.ids[r]];
      slack = std::max(slack, error);
      code_slack = std::max(code_slack, residual_bound(encoding, axes) + error);
      float& reached = block_radius[(r - begin) / kLanes];
      reached = std::max(reached, params.radii[bank.ids[r]]);
    }
    // Rounded up where they become floats.
    bank.scales[c] = scale;
    slack += underflow_allowance(axes);
    code_slack += underflow_allowance(axes);
    bank.slack[c] = static_cast<float>(slack * 1.001);
    bank.code_slack[c] = static_cast<float>(code_slack * 1.001);
    bank.reach[c] = static_cast<float>((radius * (1 + canonical_rounding(axes)) + slack) * 1.001);
  });
}

void link_clusters(const ClusteredBank& bank, int num_threads) {
  const int64_t axes = bank.projection.axes;
  const int64_t padded = round_up(bank.clusters, kLanes);
  for (int64_t c = 0; c < padded; ++c) {
    for (int64_t i = 0; i < axes; ++i) {
      bank.centroid_tiles[(c / kLanes * axes + i) * kLanes + c % kLanes] =
          c < bank.clusters ? bank.centroids[c * axes + i] : kFarAway;
    }
  }
  const SearchKernels& kernels = active_kernels();
  const auto rounding = static_cast<float>(bound_rounding(axes));
  const auto least = static_cast<float>(underflow_allowance(axes));
  parallel_for(bank.clusters, num_threads, [&](int64_t c) {
    float* gaps = bank.gaps + c * padded;
    kernels.tile_distances(bank.centroids + c * axes, bank.centroid_tiles, axes, padded / kLanes,
                           gaps);
    for (int64_t i = 0; i < padded; ++i) gaps[i] = (std::sqrt(gaps[i]) + least) * (1 + rounding);
  });
}

void release_memory() {
#if defined(__GLIBC__)
  malloc_trim(0);
#endif
}

int64_t first_bad_row(const void* data, int64_t rows, int64_t dim, bool is_half, int num_threads) {
  // A float is finite unless all bits of its exponent are set: looked at as integers, in any order.
  const int64_t per_item = std::max<int64_t>(1, (int64_t{1} << 18) / std::max<int64_t>(dim, 1));
  const int64_t items = (rows + per_item - 1) / per_item;
  std::atomic<int64_t> first{rows};
  parallel_for(items, num_threads, [&](int64_t item) {
    if (item * per_item > first.load(std::memory_order_relaxed)) return;
    const int64_t end = std::min(rows, (item + 1) * per_item);
    for (int64_t r = item * per_item; r < end; ++r) {
      uint32_t bad = 0;
      if (is_half) {
        const auto* values = static_cast<const uint16_t*>(data) + r * dim;
        for (int64_t j = 0; j < dim; ++j) bad |= (values[j] & 0x7c00u) == 0x7c00u;
      } else {
        const auto* values = static_cast<const uint32_t*>(data) + r * dim;
        for (int64_t j = 0; j < dim; ++j) bad |= (values[j] & 0x7f800000u) == 0x7f800000u;
      }
      if (bad == 0) continue;
      int64_t known = first.load();
      while (r < known && !first.compare_exchange_weak(known, r)) {
      }
      return;
    }
  });
  return first.load() == rows ? -1 : first.load();
}

}  // namespace psvdd::cpu
