// What a dropped weight adds where an input is Inf or NaN: 0 times that is NaN, as in the dense product. Kernels that skip
// dropped weights make up for it here, once they have met such an input.
#pragma once

#include "scalar.h"

namespace sparsekit::SPARSEKIT_LEVEL {
namespace {

// x is [tokens, cols], y [tokens, rows] with tokens `stride` apart. keeps(row, col) says what was multiplied.
template <class T, class Keeps>
void multiply_dropped(const T* x, int64_t tokens, int64_t cols, T* y, int64_t rows, int64_t stride, Keeps keeps) {
  for (int64_t token = 0; token < tokens; ++token, x += cols, y += stride) {
    int64_t left = rows;  // that are not NaN
    for (int64_t col = 0; col < cols && left > 0; ++col) {
      if (all_finite(x + col, 1)) continue;
      left = 0;
      for (int64_t row = 0; row < rows; ++row) {
        if (std::isnan(to_float(y[row]))) continue;
        if (keeps(row, col))
          ++left;
        else
          y[row] = from_float<T>(std::numeric_limits<float>::quiet_NaN());
      }
    }
  }
}

}  // namespace
}  // namespace sparsekit::SPARSEKIT_LEVEL
