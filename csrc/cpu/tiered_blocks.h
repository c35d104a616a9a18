// The blocks of a tiered weight by their form.
#pragma once

#include "scalar.h"
#include "tiers.h"

namespace sparsekit::SPARSEKIT_LEVEL {
namespace {

// Where the blocks of each form lie among `count` neighbors of the map, as multiples of `step`, in order. Each form is
// written at every block and counted at its own, since a branch on the form would be mispredicted at every other one.
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

// The row of a position in a block, without a division.
class Places {
 public:
  explicit Places(int64_t block_cols) : inverse_(((1 << kShift) + block_cols - 1) / block_cols) {}
  int64_t row(int64_t position) const { return position * inverse_ >> kShift; }

 private:
  static constexpr int kShift = 22;  // exact for positions below 2^14 and up to 2^7 columns
  int64_t inverse_;
};

// Calls body with `positions` as a pointer to what it holds.
template <class Body>
void with_positions(const LinearTieredArgs& a, Body body) {
  if (a.block_rows * a.block_cols <= 256)
    body(static_cast<const uint8_t*>(a.positions));
  else
    body(static_cast<const int16_t*>(a.positions));
}

}  // namespace
}  // namespace sparsekit::SPARSEKIT_LEVEL
