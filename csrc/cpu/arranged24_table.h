// One SIMD level of the kernels of arranged 2:4 weights, as simd_level_table.h is of the others.
#include "conv_row_pairs24_kernel.h"
#include "input_pairs24_kernel.h"

namespace sparsekit {

extern constexpr Arranged24Kernels SPARSEKIT_JOIN(arranged24_, SPARSEKIT_LEVEL) = {
    .simd_level = SPARSEKIT_TEXT(SPARSEKIT_LEVEL),
    .match_row_pairs = SPARSEKIT_LEVEL::match_row_pairs24,
    .arrange_row_pairs = SPARSEKIT_LEVEL::arrange_row_pairs24,
    .arrange_input_pairs = SPARSEKIT_LEVEL::arrange_input_pairs24,
    .restore_row_pairs = SPARSEKIT_LEVEL::restore_row_pairs24,
    .restore_input_pairs = SPARSEKIT_LEVEL::restore_input_pairs24,
    .linear_row_pairs = SPARSEKIT_LEVEL::linear_row_pairs24,
    .linear_input_pairs = SPARSEKIT_LEVEL::linear_input_pairs24,
    .conv2d_row_pairs = SPARSEKIT_LEVEL::conv2d_row_pairs24,
};

}  // namespace sparsekit
