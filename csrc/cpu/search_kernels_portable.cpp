// The search kernels for any processor.

#include <cmath>

#include "../portable.h"
#include "screen_batch.h"
#include "search_kernels.h"
#include "search_kernels_generic.h"

namespace psvdd::cpu {

const SearchKernels& portable_kernels() {
  static const SearchKernels kernels = {"portable",
                                        1,
                                        generic_squared_distances,
                                        generic_distance_tile,
                                        generic_products,
                                        generic_encode,
                                        generic_largest_difference,
                                        generic_screen_tile,
                                        screen_batch_by_tiles<generic_screen_tile>,
                                        generic_screen_blocks,
                                        screen_masked_by_blocks<generic_screen_block>,
                                        generic_closest_codes,
                                        generic_tile_distances,
                                        generic_keep_clusters,
                                        generic_count_below};
  return kernels;
}

}  // namespace psvdd::cpu
