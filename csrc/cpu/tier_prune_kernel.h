// Tiers: which entries of a strip of blocks stay, as bits; then mask, pruned copy and column sums, while the strip is
// in the caches.
#pragma once

#include "apply_bits.h"
#include "block_scores_kernel.h"
#include "block_topk_kernel.h"
#include "nm_kernel.h"
#include "tiers.h"

namespace sparsekit::SPARSEKIT_LEVEL {
namespace {

// Bits [at, at + count) of 64-bit words: set, or taken from others.
inline void set_bits(uint64_t* words, int64_t at, int64_t count) {
  for (int64_t i = at, next; i < at + count; i = next) {
    next = std::min(at + count, (i / 64 + 1) * 64);
    words[i / 64] |= low_bits(next - i) << i % 64;
  }
}
inline void copy_bits(const uint32_t* from, int64_t first, uint64_t* words, int64_t at, int64_t count) {
  for (int64_t done = 0, some; done < count; done += some) {
    const int64_t source = first + done, target = at + done;
    some = std::min({count - done, 32 - source % 32, 64 - target % 64});
    words[target / 64] |= (uint64_t{from[source / 32]} >> source % 32 & low_bits(some)) << target % 64;
  }
}

struct TierScratch {
  int64_t pitch, blocks;  // room for the keys of a block, and blocks side by side
  std::unique_ptr<int32_t[]> keys, kth;
  std::unique_ptr<uint32_t[]> topk;             // which keys stay, of the top-k blocks one after the other
  std::unique_ptr<int64_t[]> block;             // which block each of those is
  std::unique_ptr<uint64_t[]> dense, two, kept;  // a bit for each column of the strip: of its tier; of one row
  StripTotals totals;

  explicit TierScratch(const TierPruneArgs& a)
      : pitch(BlockKeys::padded(std::min(a.block_rows, a.rows) * std::min(a.block_cols, a.cols))),
        blocks(std::max<int64_t>(1, kStripEntries / pitch)),
        keys(new int32_t[blocks * pitch]),
        kth(new int32_t[blocks]),
        topk(new uint32_t[blocks * pitch / 32]),
        block(new int64_t[blocks]),
        totals(blocks * a.block_cols) {
    const int64_t words = (blocks * std::min(a.block_cols, a.cols) + 63) / 64;
    for (auto* bits : {&dense, &two, &kept}) bits->reset(new uint64_t[words]);
  }
};

template <class T>
void load_keys(const T* weight, const float* scale, int32_t* keys, int64_t cols) {
  int64_t i = 0;
#if defined(SPARSEKIT_AVX2) || defined(SPARSEKIT_AVX512)
  for (; scale && i + Keys32::kLanes <= cols; i += Keys32::kLanes)
    store(keys + i, magnitude_keys(weight + i, scale + i).lanes, false);
#endif
  for (; i < cols; ++i) keys[i] = scale ? magnitude_key(to_float(weight[i]) * scale[i]) : magnitude_key(weight[i]);
}

// Finds what the top-k blocks of a strip keep; returns how many there are.
template <class T, int64_t kCols>
int64_t choose_topk(const TierPruneArgs& a, const BlockStrip& strip, const uint8_t* tiers, const TierScratch& s) {
  int64_t found = 0;
  for (int64_t block = 0; block < strip.blocks(a.block_cols); ++block)
    if (tiers[block] > kSparse24) s.block[found++] = block;
  const auto keys_of = [&](int64_t i) {
    const int64_t cols = std::min(a.block_cols, strip.cols - s.block[i] * a.block_cols);
    return BlockKeys{s.keys.get() + i * s.pitch, strip.rows * cols};
  };
  for (int64_t i = 0; i < found; ++i) {
    const int64_t left = s.block[i] * a.block_cols, cols = std::min(a.block_cols, strip.cols - left);
    int32_t* keys = s.keys.get() + i * s.pitch;
    for (int64_t row = 0; row < strip.rows; ++row, keys += cols) {
      const T* weight = static_cast<const T*>(a.weight) + (strip.top + row) * a.weight_stride + strip.left + left;
      if (a.scale)
        load_keys(weight, a.scale + strip.left + left, keys, cols);
      else if (cols == kCols)
        load_keys<kCols>(weight, keys, cols);
      else
        load_keys<0>(weight, keys, cols);
    }
    std::fill(keys, s.keys.get() + i * s.pitch + keys_of(i).end(), -1);
  }
  kth_of_blocks(keys_of, found, a.k, s.kth.get());
  for (int64_t i = 0; i < found; ++i) keep_largest(keys_of(i), a.k, s.kth[i], s.topk.get() + i * s.pitch / 32);
  return found;
}

// What a strip keeps of one row, into s.kept.
template <class T, int64_t kCols>
void keep_row(const TierPruneArgs& a, const BlockStrip& strip, int64_t row, int64_t topk, const TierScratch& s) {
  const T* weight = static_cast<const T*>(a.weight) + (strip.top + row) * a.weight_stride + strip.left;
  const float* scale = a.scale ? a.scale + strip.left : nullptr;
  for (int64_t word = 0; word * 64 < strip.cols; ++word) {
    s.kept[word] = s.dense[word];
    if (!s.two[word]) continue;
    const int64_t i = word * 64, cols = std::min<int64_t>(64, strip.cols - i);
    const auto kept = [&]<bool kScaled>(std::bool_constant<kScaled>) {
      const float* from = kScaled ? scale + i : nullptr;
      return cols == 64 ? kept24<kScaled>(weight + i, from) : kept24<kScaled>(weight + i, from, cols);
    };
    s.kept[word] |= s.two[word] & (scale ? kept(std::true_type{}) : kept(std::false_type{}));
  }
  for (int64_t i = 0; i < topk; ++i) {
    const uint32_t* bits = s.topk.get() + i * s.pitch / 32;
    const int64_t left = s.block[i] * a.block_cols, cols = std::min(a.block_cols, strip.cols - left);
    if (kCols == 16 && cols == 16)
      s.kept[left / 64] |= uint64_t{bits[row / 2] >> row % 2 * 16 & 0xffff} << left % 64;
    else
      copy_bits(bits, row * cols, s.kept.get(), left, cols);
  }
}

template <class T, int64_t kCols>
void tier_strip(const TierPruneArgs& a, const BlockStrip& strip, TierScratch& s) {
  const int64_t wide = (a.cols + a.block_cols - 1) / a.block_cols;
  const int64_t first = strip.top / a.block_rows * wide + strip.left / a.block_cols;
  const uint8_t* tiers = a.tiers + first;
  const int64_t blocks = strip.blocks(a.block_cols), words = (strip.cols + 63) / 64;
  std::fill_n(s.dense.get(), words, 0);
  std::fill_n(s.two.get(), words, 0);
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t left = block * a.block_cols, cols = std::min(a.block_cols, strip.cols - left);
    if (tiers[block] == kDense) set_bits(s.dense.get(), left, cols);
    if (tiers[block] == kSparse24) set_bits(s.two.get(), left, cols);
  }
  const int64_t topk = choose_topk<T, kCols>(a, strip, tiers, s);
  s.totals.clear(strip.cols, blocks * a.block_cols);
  for (int64_t row = 0; row < strip.rows; ++row) {
    keep_row<T, kCols>(a, strip, row, topk, s);
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
    for_strips(a, begin, end, scratch.blocks, [&](const BlockStrip& strip) {
      if (a.block_cols == 16)
        tier_strip<T, 16>(a, strip, scratch);
      else
        tier_strip<T, 0>(a, strip, scratch);
    });
  });
  if (a.stream) fence();
}

}  // namespace sparsekit::SPARSEKIT_LEVEL
