// Block scores. The order of the additions is part of the definition: first the rows, one after the other, then the
// columns, the second half to the first until one is left.
#pragma once

#include "block_strips.h"

namespace sparsekit::SPARSEKIT_LEVEL {
namespace {

// Returns `from` where the compiler converts it well by itself. Else converts it into `to`, and returns that.
inline const float* as_floats(const float* from, float*, int64_t) { return from; }
inline const BF16* as_floats(const BF16* from, float*, int64_t) { return from; }
inline const float* as_floats(const F16* from, float* to, int64_t count) {
  int64_t i = 0;
#if defined(SPARSEKIT_AVX512)
  for (; i + 16 <= count; i += 16) _mm512_storeu_ps(to + i, load_floats(from + i));
#elif defined(SPARSEKIT_AVX2)
  for (; i + 8 <= count; i += 8) _mm256_storeu_ps(to + i, load_floats(from + i));
#endif
  for (; i < count; ++i) to[i] = to_float(from[i]);
  return to;
}

// Adds the scores of one row to `total`. The mask clears bits, since to choose by a bool would be a branch per entry.
template <bool kScaled, bool kMasked, class T>
void add_row(const T* weight, const float* scale, const bool* mask, float* __restrict total, int64_t cols) {
  for (int64_t i = 0; i < cols; ++i) {
    float score = std::fabs(to_float(weight[i]));
    if constexpr (kScaled) score *= scale[i];
    if constexpr (kMasked) score = std::bit_cast<float>(std::bit_cast<int32_t>(score) & -static_cast<int32_t>(is_set(mask, i)));
    total[i] += score;
  }
}

template <class T>
void add_row(const T* weight, const float* scale, const bool* mask, float* total, int64_t cols) {
  if (scale)
    mask ? add_row<true, true>(weight, scale, mask, total, cols) : add_row<true, false>(weight, scale, mask, total, cols);
  else
    mask ? add_row<false, true>(weight, scale, mask, total, cols)
         : add_row<false, false>(weight, scale, mask, total, cols);
}

// Adds the right half of every block's columns to the left half. kHalf is the number of columns of a half if it is
// known when compiling, else 0. `width` may be less than two halves: columns without a partner then get a zero.
template <int64_t kHalf>
void fold(const float* __restrict from, float* __restrict to, int64_t blocks, int64_t width, int64_t half) {
  if constexpr (kHalf > 0) half = kHalf, width = 2 * kHalf;
  for (int64_t block = 0; block < blocks; ++block, from += width, to += half) {
    for (int64_t i = 0; i < width - half; ++i) to[i] = from[i] + from[half + i];
    for (int64_t i = width - half; i < half; ++i) to[i] = from[i] + 0.0f;
  }
}

// Sums every `width` columns of `total` into `scores`; `spare` is as large as `total`.
inline void fold_blocks(float* total, float* spare, int64_t blocks, int64_t width, float* scores) {
  float* from = total;
  float* to = spare;
  while (width > 1) {
    const int64_t half = static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(width))) / 2;
    switch (width) {
      case 16:
        fold<8>(from, to, blocks, width, half);
        break;
      case 8:
        fold<4>(from, to, blocks, width, half);
        break;
      case 4:
        fold<2>(from, to, blocks, width, half);
        break;
      case 2:
        fold<1>(from, to, blocks, width, half);
        break;
      default:
        fold<0>(from, to, blocks, width, half);
    }
    std::swap(from, to);
    width = half;
  }
  std::copy_n(from, blocks, scores);
}

// The sums of the columns of a strip of blocks, with room to add them up to scores.
class StripTotals {
 public:
  explicit StripTotals(int64_t width) : width_(width), sums_(new float[2 * width]) {}

  float* sums() { return sums_.get(); }

  // Begins a strip of `cols` columns; `width` is that of its blocks if all were whole.
  void clear(int64_t cols, int64_t width) {
    std::fill_n(sums(), cols, -0.0f);  // -0.0 + x is x, even where x is -0.0
    std::fill(sums() + cols, sums() + width, 0.0f);
  }

  void score(const BlockStrip& strip, int64_t block_rows, int64_t block_cols, float* scores) {
    if (strip.rows < block_rows)  // rows of zeros below the edge turn -0.0 to 0.0
      for (int64_t i = 0; i < strip.cols; ++i) sums_[i] += 0.0f;
    fold_blocks(sums(), sums() + width_, strip.blocks(block_cols), block_cols, scores);
  }

 private:
  int64_t width_;
  std::unique_ptr<float[]> sums_;
};

// Adds the scores of one row of a strip to `total`, part by part, and fetches the same part of the next row into the
// second-level cache: a matrix that lies in memory takes a third longer if that is left to the hardware.
template <class T>
void add_strip_row(const BlockScoresArgs& a, const BlockStrip& strip, int64_t row, float* total) {
  constexpr int64_t kPart = 512;
  const T* weight = static_cast<const T*>(a.weight) + row * a.weight_stride + strip.left;
  float floats[kPart];
  for (int64_t i = 0; i < strip.cols; i += kPart) {
    const int64_t cols = std::min(kPart, strip.cols - i), col = strip.left + i;
    for (int64_t j = 0; j < cols; j += 64 / sizeof(T)) __builtin_prefetch(weight + a.weight_stride + i + j, 0, 2);
    add_row(as_floats(weight + i, floats, cols), a.scale ? a.scale + col : nullptr,
            a.mask ? a.mask + row * a.cols + col : nullptr, total + i, cols);
  }
}

}  // namespace

void block_scores(const BlockScoresArgs& a, int64_t begin, int64_t end) {
  const int64_t blocks_across = (a.cols + a.block_cols - 1) / a.block_cols;
  const int64_t blocks = std::min(blocks_across, std::max<int64_t>(1, kStripEntries / a.block_cols));
  const int64_t width = blocks * a.block_cols;
  StripTotals totals(width);
  dispatch(a.dtype, [&]<class T>(T*) {
    for_strips(a, begin, end, blocks, [&](const BlockStrip& strip) {
      totals.clear(strip.cols, strip.blocks(a.block_cols) * a.block_cols);
      for (int64_t row = strip.top; row < strip.top + strip.rows; ++row)
        add_strip_row<T>(a, strip, row, totals.sums());
      totals.score(strip, a.block_rows, a.block_cols,
                   a.scores + strip.top / a.block_rows * blocks_across + strip.left / a.block_cols);
    });
  });
}

}  // namespace sparsekit::SPARSEKIT_LEVEL
