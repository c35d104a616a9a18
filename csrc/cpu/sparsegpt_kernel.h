// SparseGPT's inner loop over consecutive columns: a row at a time, which stays in the L1 cache.
#pragma once

#include "elements.h"

namespace sparsekit::SPARSEKIT_LEVEL {
namespace {

inline void sparsegpt(const SparsegptArgs& args, int64_t begin, int64_t end) {
  const int64_t cols = args.cols;
  for (int64_t row = begin; row < end; ++row) {
    float* updated = args.pruned + row * cols;
    float* error = args.error + row * cols;
    bool* keep = args.mask + row * cols;
    std::copy_n(args.weight + row * cols, cols, updated);
    if (args.given != nullptr)
      for (int64_t col = 0; col < cols; ++col) keep[col] = is_set(args.given, row * cols + col);
    for (int64_t col = 0; col < cols; ++col) {
      if (args.given == nullptr && col % args.m == 0) {
        if (col + args.m <= cols) {
          int32_t keys[32];
          for (int i = 0; i < args.m; ++i)
            keys[i] = magnitude_key(updated[col + i] / args.factor[(col + i) * (cols + 1)]);
          keep_first(keys, keep + col, args.n, args.m);
        } else {
          std::fill(keep + col, keep + cols, true);
        }
      }
      error[col] = 0;
      if (keep[col]) continue;
      const float* later = args.factor + col * cols;
      error[col] = updated[col] / later[col];
      for (int64_t i = col; i < cols; ++i) updated[i] -= error[col] * later[i];
    }
    for (int64_t col = 0; col < cols; ++col)
      if (!keep[col]) updated[col] = 0;
  }
}

}  // namespace
}  // namespace sparsekit::SPARSEKIT_LEVEL
