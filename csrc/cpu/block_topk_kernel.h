// The top k of every block.
#pragma once

#include "strip_topk.h"

namespace sparsekit::SPARSEKIT_LEVEL {
namespace {

// Stores a bit for each of `cols` columns as bytes.
inline void store_bits(const uint64_t* bits, bool* mask, int64_t cols) {
  int64_t i = 0;
#if !defined(SPARSEKIT_SCALAR)
  for (; i + 64 <= cols; i += 64) store_mask64(mask + i, bits[i / 64], false);
#endif
  for (; i < cols; ++i) mask[i] = bits[i / 64] >> i % 64 & 1;
}

// Copies the bits of one row of `blocks` blocks of 16 columns, all of which are top-k blocks.
inline void copy_rows16(const StripTopk& topk, int64_t row, int64_t blocks, uint64_t* kept) {
  for (int64_t block = 0; block < blocks; block += 4) {
    uint64_t bits = 0;
    for (int64_t i = 0; i < std::min<int64_t>(4, blocks - block); ++i)
      bits |= uint64_t{topk.kept_bits(block + i)[row / 2] >> row % 2 * 16 & 0xffff} << 16 * i;
    kept[block / 4] = bits;
  }
}

template <class T, int64_t kCols>
void topk_strip(const BlockTopkArgs& a, const BlockStrip& strip, StripTopk& topk, uint64_t* kept) {
  topk.clear();
  for (int64_t block = 0; block < strip.blocks(a.block_cols); ++block) topk.add(block);
  topk.choose<T, kCols>(strip, false);
  bool* mask = a.mask + strip.top * a.cols + strip.left;
  for (int64_t row = 0; row < strip.rows; ++row, mask += a.cols) {
    if (kCols == 16 && strip.cols % 16 == 0) {
      copy_rows16(topk, row, strip.cols / 16, kept);
    } else {
      std::fill_n(kept, (strip.cols + 63) / 64, 0);
      topk.add_kept_bits<kCols>(strip, row, kept);
    }
    store_bits(kept, mask, strip.cols);
  }
}

}  // namespace

void block_topk(const BlockTopkArgs& a, int64_t begin, int64_t end) {
  dispatch(a.dtype, [&]<class T>(T*) {
    StripTopk topk({a.score, a.score_stride, nullptr, a.rows, a.cols, a.block_rows, a.block_cols, a.k});
    const std::unique_ptr<uint64_t[]> kept(new uint64_t[(topk.blocks() * std::min(a.block_cols, a.cols) + 63) / 64]);
    for_strips(a, begin, end, topk.blocks(), [&](const BlockStrip& strip) {
      if (a.block_cols == 16)
        topk_strip<T, 16>(a, strip, topk, kept.get());
      else
        topk_strip<T, 0>(a, strip, topk, kept.get());
    });
  });
}

}  // namespace sparsekit::SPARSEKIT_LEVEL
