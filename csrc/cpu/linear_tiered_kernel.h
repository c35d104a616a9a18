// linear_tiered: few tokens run along the rows of the weight, many lie in the vector lanes.
#pragma once

#include "linear_tiered_lanes_kernel.h"
#include "linear_tiered_rows_kernel.h"

namespace sparsekit::SPARSEKIT_LEVEL {

void linear_tiered(const LinearTieredArgs& a, ParallelFor parallel_for) {
#if defined(SPARSEKIT_AVX512)
  // A vector of 16 columns would span two blocks.
  if (a.tokens < kLanesTokens && a.block_cols % FloatStrip::kCols) return kernels_avx2.linear_tiered(a, parallel_for);
#endif
  dispatch(a.dtype, [&]<class T>(T*) {
    if (a.tokens >= kLanesTokens)
      linear_tiered_lanes<T>(a, parallel_for);
    else
      linear_tiered_rows<T>(a, parallel_for);
  });
}

}  // namespace sparsekit::SPARSEKIT_LEVEL
