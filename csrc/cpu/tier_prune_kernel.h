// Prunes the blocks of a strip by their tiers: finds the kept entries as bits, then writes the mask, the pruned copy
// and the column sums while the strip is in the caches.
#pragma once

#include "apply_bits.h"
#include "block_scores_kernel.h"
#include "nm_kernel.h"
#include "strip_topk.h"
#include "tiers.h"

namespace sparsekit::SPARSEKIT_LEVEL {
namespace {

// Sets bits [at, at + count).
inline void fill_bits(uint64_t* words, int64_t at, int64_t count) {
  for (int64_t i = at, next; i < at + count; i = next) {
    next = std::min(at + count, (i / 64 + 1) * 64);
    words[i / 64] |= low_bits(next - i) << i % 64;
  }
}

struct TierScratch {
  StripTopk topk;
  std::unique_ptr<uint64_t[]> dense, sparse24;  // a bit for each column of the strip: whether its block is of this tier
  std::unique_ptr<uint64_t[]> kept;             // the same: whether one row keeps it
  StripTotals totals;

  explicit TierScratch(const TierPruneArgs& a)
      : topk({a.weight, a.weight_stride, a.scale, a.rows, a.cols, a.block_rows, a.block_cols, a.k}),
        totals(topk.blocks() * a.block_cols) {
    const int64_t words = (topk.blocks() * std::min(a.block_cols, a.cols) + 63) / 64;
    for (auto* bits : {&dense, &sparse24, &kept}) bits->reset(new uint64_t[words]);
  }
};

// Writes what a row of a strip keeps into s.kept.
template <class T, int64_t kCols>
void keep_row(const TierPruneArgs& a, const BlockStrip& strip, int64_t row, const TierScratch& s) {
  const T* weight = static_cast<const T*>(a.weight) + (strip.top + row) * a.weight_stride + strip.left;
  const float* scale = a.scale ? a.scale + strip.left : nullptr;
  for (int64_t word = 0; word * 64 < strip.cols; ++word) {
    s.kept[word] = s.dense[word];
    if (!s.sparse24[word]) continue;
    const int64_t i = word * 64, cols = std::min<int64_t>(64, strip.cols - i);
    const auto kept = [&]<bool kScaled>(std::bool_constant<kScaled>) {
      const float* from = kScaled ? scale + i : nullptr;
      return cols == 64 ? kept24<kScaled>(weight + i, from) : kept24<kScaled>(weight + i, from, cols);
    };
    s.kept[word] |= s.sparse24[word] & (scale ? kept(std::true_type{}) : kept(std::false_type{}));
  }
  s.topk.add_kept_bits<kCols>(strip, row, s.kept.get());
}

template <class T, int64_t kCols>
void tier_strip(const TierPruneArgs& a, const BlockStrip& strip, TierScratch& s) {
  const int64_t blocks_across = (a.cols + a.block_cols - 1) / a.block_cols;
  const int64_t first = strip.top / a.block_rows * blocks_across + strip.left / a.block_cols;
  const uint8_t* tiers = a.tiers + first;
  const int64_t blocks = strip.blocks(a.block_cols), words = (strip.cols + 63) / 64;
  std::fill_n(s.dense.get(), words, 0);
  std::fill_n(s.sparse24.get(), words, 0);
  s.topk.clear();
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t left = block * a.block_cols, cols = std::min(a.block_cols, strip.cols - left);
    if (tiers[block] == kDense) fill_bits(s.dense.get(), left, cols);
    if (tiers[block] == kSparse24) fill_bits(s.sparse24.get(), left, cols);
    if (tiers[block] > kSparse24) s.topk.add(block);
  }
  s.topk.choose<T, kCols>(strip, a.nested);
  s.totals.clear(strip.cols, blocks * a.block_cols);
  for (int64_t row = 0; row < strip.rows; ++row) {
    keep_row<T, kCols>(a, strip, row, s);
    const int64_t at = (strip.top + row) * a.cols + strip.left;
    const T* weight = static_cast<const T*>(a.weight) + (strip.top + row) * a.weight_stride + strip.left;
    T* pruned = static_cast<T*>(a.pruned) + at;
    bool* mask = a.mask + at;
    const bool stream = a.stream && aligned(pruned) && aligned(mask);
    apply_bits(weight, s.kept.get(), a.score_scale ? a.score_scale + strip.left : nullptr,
               {pruned, mask, s.totals.sums(), strip.cols, stream});
  }
  s.totals.score(strip, a.block_rows, a.block_cols, a.scores + first);
}

}  // namespace

void tier_prune(const TierPruneArgs& a, int64_t begin, int64_t end) {
  dispatch(a.dtype, [&]<class T>(T*) {
    TierScratch scratch(a);
    for_strips(a, begin, end, scratch.topk.blocks(), [&](const BlockStrip& strip) {
      if (a.block_cols == 16)
        tier_strip<T, 16>(a, strip, scratch);
      else
        tier_strip<T, 0>(a, strip, scratch);
    });
  });
  if (a.stream) fence();
}

}  // namespace sparsekit::SPARSEKIT_LEVEL
