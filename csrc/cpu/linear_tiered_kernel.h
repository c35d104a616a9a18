// linear_tiered. For few tokens the vector lanes are columns of the weight, for many they are tokens.
#pragma once

#include "linear_tiered_lanes_kernel.h"
#include "linear_tiered_rows_kernel.h"

namespace sparsekit::SPARSEKIT_LEVEL {
namespace {

// From so many tokens on, the kernel with tokens in the lanes is used. At AVX2 and 4096x4096, 7 tokens took 0.8 of the
// time of the other kernel, 12 took 0.6; with AVX-512, whose vectors are longer, it was not measured.
#if defined(SPARSEKIT_AVX512)
constexpr int64_t kTieredLanesTokens = kLanesTokens;
#else
constexpr int64_t kTieredLanesTokens = 7;
#endif

}  // namespace

void linear_tiered(const LinearTieredArgs& a, ParallelFor parallel_for) {
#if defined(SPARSEKIT_AVX512)
  // A vector of 16 columns would span two blocks.
  if (a.tokens < kTieredLanesTokens && a.block_cols % FloatRowVector::kCols)
    return kernels_avx2.linear_tiered(a, parallel_for);
#endif
  dispatch(a.dtype, [&]<class T>(T*) {
    if (a.tokens >= kTieredLanesTokens)
      linear_tiered_lanes<T>(a, parallel_for);
    else
      linear_tiered_rows<T>(a, parallel_for);
  });
}

}  // namespace sparsekit::SPARSEKIT_LEVEL
