// The score that every block would keep in each tier, in one pass.
#pragma once

#include "block_scores_kernel.h"
#include "float_lanes.h"
#include "nm_kernel.h"
#include "strip_topk.h"
#include "tiers.h"

namespace sparsekit::SPARSEKIT_LEVEL {
namespace {

// One row of a strip. All pointers are to its first column.
template <class T>
struct TierRow {
  const T* weight;
  const float *scale, *score_scale;
  const uint64_t* topk;  // bits
  int64_t cols;
};

template <bool kSquared, class T>
void add_tiers(const TierRow<T>& row, float* dense, float* sparse24, float* topk) {
  int64_t i = 0;
#if !defined(SPARSEKIT_SCALAR)
  const auto add_at = [&]<int lane>(std::integral_constant<int, lane>) {
    const int64_t at = i + lane;
    const Keep32 kept = nm_keep<4>(magnitude_keys(row.weight + at, row.scale + at), 2);
    Floats score = magnitudes<true>(row.weight + at, row.score_scale + at);
    if constexpr (kSquared) score = multiply_add(score, score, zeros());
    store_lanes(dense + at, add(load_lanes(dense + at), score));
    add_kept(score, kept, sparse24 + at);
    add_kept(score, keep_bits<float, lane>(row.topk[i / 64]), topk + at);
  };
  for (; i + 64 <= row.cols; i += 64) {
    for (int line = 0; line < static_cast<int>(sizeof(T)); ++line)
      __builtin_prefetch(row.weight + i + row.cols + line * 64 / sizeof(T), 0, 2);  // the next strip
    [&]<int... j>(std::integer_sequence<int, j...>) {
      (add_at(std::integral_constant<int, j * kLanes>{}), ...);
    }(std::make_integer_sequence<int, 64 / kLanes>());
  }
#endif
  for (; i < row.cols; i += 64) {
    const int64_t cols = std::min<int64_t>(64, row.cols - i);
    const uint64_t kept = cols == 64 ? kept24<true>(row.weight + i, row.scale + i)
                                     : kept24<true>(row.weight + i, row.scale + i, cols);
    for (int64_t j = 0; j < cols; ++j) {
      float score = std::fabs(to_float(row.weight[i + j])) * row.score_scale[i + j];
      if constexpr (kSquared) score *= score;
      dense[i + j] += score;
      sparse24[i + j] += kept >> j & 1 ? score : 0.0f;
      topk[i + j] += row.topk[i / 64] >> j & 1 ? score : 0.0f;
    }
  }
}

struct TierScoresScratch {
  StripTopk topk;
  int64_t width;
  std::unique_ptr<float[]> ones;  // stands in for a scale that is not given
  std::unique_ptr<uint64_t[]> kept;
  StripTotals totals[kTiers];

  explicit TierScoresScratch(const TierScoresArgs& a)
      : topk({a.weight, a.weight_stride, a.scale, a.rows, a.cols, a.block_rows, a.block_cols, a.k}),
        width(topk.blocks() * a.block_cols),
        ones(new float[width]),
        kept(new uint64_t[(width + 63) / 64]),
        totals{StripTotals(width), StripTotals(width), StripTotals(width)} {
    std::fill_n(ones.get(), width, 1.0f);
  }
};

template <class T, int64_t kCols>
void score_strip(const TierScoresArgs& a, const BlockStrip& strip, TierScoresScratch& s) {
  const int64_t blocks_across = (a.cols + a.block_cols - 1) / a.block_cols, blocks = strip.blocks(a.block_cols);
  s.topk.clear();
  for (int64_t block = 0; a.k > 0 && block < blocks; ++block) s.topk.add(block);
  s.topk.choose<T, kCols>(strip, false);
  for (StripTotals& totals : s.totals) totals.clear(strip.cols, blocks * a.block_cols);
  const auto add_to = a.squared ? add_tiers<true, T> : add_tiers<false, T>;
  for (int64_t row = 0; row < strip.rows; ++row) {
    std::fill_n(s.kept.get(), (strip.cols + 63) / 64, 0);
    s.topk.add_kept_bits<kCols>(strip, row, s.kept.get());
    const TierRow<T> from{static_cast<const T*>(a.weight) + (strip.top + row) * a.weight_stride + strip.left,
                          a.scale ? a.scale + strip.left : s.ones.get(),
                          a.score_scale ? a.score_scale + strip.left : s.ones.get(), s.kept.get(), strip.cols};
    add_to(from, s.totals[kDense].sums(), s.totals[kSparse24].sums(), s.totals[kTopk].sums());
  }
  float* scores = a.scores + strip.top / a.block_rows * blocks_across + strip.left / a.block_cols;
  for (StripTotals& totals : s.totals) {
    totals.score(strip, a.block_rows, a.block_cols, scores);
    scores += (a.rows + a.block_rows - 1) / a.block_rows * blocks_across;
  }
}

}  // namespace

void tier_scores(const TierScoresArgs& a, int64_t begin, int64_t end) {
  dispatch(a.dtype, [&]<class T>(T*) {
    TierScoresScratch scratch(a);
    for_strips(a, begin, end, scratch.topk.blocks(), [&](const BlockStrip& strip) {
      if (a.block_cols == 16)
        score_strip<T, 16>(a, strip, scratch);
      else
        score_strip<T, 0>(a, strip, scratch);
    });
  });
}

}  // namespace sparsekit::SPARSEKIT_LEVEL
