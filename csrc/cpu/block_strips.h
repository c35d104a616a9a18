// Strips: neighboring blocks of a row of blocks, as many as fit the first-level cache.
#pragma once

#include "lanes.h"

namespace sparsekit::SPARSEKIT_LEVEL {
namespace {

constexpr int64_t kStripEntries = 4096;  // 16 KB of floats or keys, half the cache

// A strip: all its blocks are whole, except at the edges of the matrix.
struct BlockStrip {
  int64_t top, rows, left, cols;

  int64_t blocks(int64_t block_cols) const { return (cols + block_cols - 1) / block_cols; }
};

// Walks the block rows [begin, end) in strips of `blocks` blocks.
template <class Args, class Body>
void for_strips(const Args& a, int64_t begin, int64_t end, int64_t blocks, Body body) {
  const int64_t width = std::min(blocks, (a.cols + a.block_cols - 1) / a.block_cols) * a.block_cols;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t top = row * a.block_rows, rows = std::min(a.block_rows, a.rows - top);
    for (int64_t left = 0; left < a.cols; left += width)
      body(BlockStrip{top, rows, left, std::min(width, a.cols - left)});
  }
}

}  // namespace
}  // namespace sparsekit::SPARSEKIT_LEVEL
