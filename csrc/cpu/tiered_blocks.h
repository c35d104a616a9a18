// The blocks of a tiered weight by their form.
#pragma once

#include "elements.h"
#include "tiers.h"

namespace sparsekit::SPARSEKIT_LEVEL {
namespace {

// Lists the indices, times `step`, of the blocks of each form among `count` blocks of the tier map. Every index is
// written to all three lists, but only the list of its form moves on: a branch on the form would often be mispredicted.
inline void list_tiers(const uint8_t* tiers, int64_t count, int32_t step, int32_t* const (&lists)[kTiers],
                       int64_t (&counts)[kTiers]) {
  int64_t dense = 0, sparse24 = 0, topk = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int32_t at = static_cast<int32_t>(i) * step;
    lists[kDense][dense] = lists[kSparse24][sparse24] = lists[kTopk][topk] = at;
    dense += tiers[i] == kDense;
    sparse24 += tiers[i] == kSparse24;
    topk += tiers[i] == kTopk;
  }
  counts[kDense] = dense, counts[kSparse24] = sparse24, counts[kTopk] = topk;
}

// Limits the counts to what `starts` says a row of blocks has, so that a tier map that contradicts it never makes a
// kernel read beyond what is stored.
inline void limit_counts(const LinearTieredArgs& a, int64_t block_row, const int32_t* first, int64_t (&counts)[kTiers]) {
  const int32_t* end = a.starts + kTiers * (block_row + 1);
  for (int tier = 0; tier < kTiers; ++tier) counts[tier] = std::min<int64_t>(counts[tier], end[tier] - first[tier]);
}

// Positions in a block: limits one to the last entry, and finds its row without a division.
class BlockPositions {
 public:
  BlockPositions(int64_t block_rows, int64_t block_cols)
      : last_(block_rows * block_cols - 1), inverse_(((1 << kShift) + block_cols - 1) / block_cols) {}
  template <class Position>
  int64_t inside(Position position) const {
    return std::min<int64_t>(static_cast<std::make_unsigned_t<Position>>(position), last_);
  }
  int64_t row(int64_t position) const { return position * inverse_ >> kShift; }

 private:
  static constexpr int kShift = 22;  // exact for positions below 2^14 and up to 2^7 columns
  int64_t last_, inverse_;
};

// Calls body with `positions` as a pointer to its element type.
template <class Body>
void with_positions(const LinearTieredArgs& a, Body body) {
  if (a.block_rows * a.block_cols <= 256)
    body(static_cast<const uint8_t*>(a.positions));
  else
    body(static_cast<const int16_t*>(a.positions));
}

// Whether an entry of the weight is one of those that its block stores.
inline bool stores(const LinearTieredArgs& a, int64_t row, int64_t col) {
  const int64_t blocks = (a.cols + a.block_cols - 1) / a.block_cols, size = a.block_rows * a.block_cols;
  const int64_t block_row = row / a.block_rows, block = col / a.block_cols;
  const int64_t position = row % a.block_rows * a.block_cols + col % a.block_cols;
  const uint8_t* tiers = a.tiers + block_row * blocks;
  if (tiers[block] != kSparse24 && tiers[block] != kTopk) return tiers[block] == kDense;
  const int64_t i = a.starts[kTiers * block_row + tiers[block]] + std::count(tiers, tiers + block, tiers[block]);
  if (i >= a.starts[kTiers * (block_row + 1) + tiers[block]]) return false;
  if (tiers[block] == kSparse24) return a.bitmask[(i * size + position) / 8] >> position % 8 & 1;
  bool found = false;
  with_positions(a, [&](const auto* positions) {
    found = std::find(positions + i * a.k, positions + (i + 1) * a.k, position) != positions + (i + 1) * a.k;
  });
  return found;
}

}  // namespace
}  // namespace sparsekit::SPARSEKIT_LEVEL
