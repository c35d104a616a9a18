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

// Stores 16 bits as bytes for each of `rows` rows.
inline void store_rows16(const uint32_t* bits, int64_t rows, bool* mask, int64_t stride) {
  for (int64_t row = 0; row < rows; row += 2, mask += 2 * stride) {
#if defined(SPARSEKIT_AVX2) || defined(SPARSEKIT_AVX512)
    const __m256i both = mask_bytes(bits[row / 2]);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(mask), _mm256_castsi256_si128(both));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(mask + stride), _mm256_extracti128_si256(both, 1));
#else
    for (int i = 0; i < 32; ++i) mask[i / 16 * stride + i % 16] = bits[row / 2] >> i & 1;
#endif
  }
}

template <class T, int64_t kCols>
void topk_strip(const BlockTopkArgs& a, const BlockStrip& strip, StripTopk& topk, uint64_t* kept) {
  topk.clear();
  for (int64_t block = 0; block < strip.blocks(a.block_cols); ++block) topk.add(block);
  topk.choose<T, kCols>(strip, false);
  bool* mask = a.mask + strip.top * a.cols + strip.left;
  if (kCols == 16 && strip.cols % 16 == 0 && strip.rows % 2 == 0) {
    for (int64_t block = 0; block < strip.cols / 16; ++block)
      store_rows16(topk.kept_bits(block), strip.rows, mask + block * 16, a.cols);
    return;
  }
  for (int64_t row = 0; row < strip.rows; ++row, mask += a.cols) {
    std::fill_n(kept, (strip.cols + 63) / 64, 0);
    topk.add_kept_bits<kCols>(strip, row, kept);
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
