// Transposable 2:4 masks: the best of the 90 patterns of every 4x4 tile, one tile to a lane.
//
// Once rows 0 and 1 are chosen, there are one, two or six ways to complete the pattern with rows 2 and 3. Rounding
// never reverses the order of two sums, so the best total comes from the best completion: 36 totals are compared
// instead of 90, in the order of the patterns. Which completion reached the total first is found afterwards.
#pragma once

#include "nm_kernel.h"
#include "tiles4x4.h"

namespace sparsekit::SPARSEKIT_LEVEL {
namespace {

// The pairs of columns that a row can keep, as bits, in lexicographic order; pair 5 - i is the complement of pair i.
constexpr int kPairs[6] = {0b0011, 0b0101, 0b1001, 0b0110, 0b1010, 0b1100};

// The pairs that rows 2 and 3 keep in the first pattern whose rows 0 and 1 keep the pairs p and q. Where p and q share
// one column, there is one other such pattern, which has the two exchanged.
struct LowerRows {
  int row2, row3;
};
constexpr LowerRows lower_rows(int p, int q) {
  for (int row2 = 0; row2 < 6; ++row2)
    for (int row3 = 0; row3 < 6; ++row3)
      if ((kPairs[row2] & kPairs[row3]) == (15 & ~(kPairs[p] | kPairs[q])) &&
          (kPairs[row2] | kPairs[row3]) == (15 & ~(kPairs[p] & kPairs[q])))
        return {row2, row3};
  return {};
}

// The sum of the magnitudes of each pair of columns in each row, as the bits of a float.
using RowSums = TileInts[4][6];

// The pattern of rows 0 and 1 with the first completion, four bits a row; rows 0 and 1 alone where they are
// complements.
constexpr int kept_bits(int p, int q) {
  const LowerRows lower = lower_rows(p, q);
  return kPairs[p] | kPairs[q] << 4 | (q == 5 - p ? 0 : kPairs[lower.row2] << 8 | kPairs[lower.row3] << 12);
}

struct BestPattern {
  TileInts total;
  TileInts first;  // the total with the first completion; that of rows 0 and 1 alone where they are complements
  TileInts kept;
};

template <int p, int q>
void consider(const RowSums& sums, const TileInts& any_complements, BestPattern& best) {
  constexpr bool kComplements = q == 5 - p;
  constexpr LowerRows kLower = lower_rows(p, q);
  const TileInts top = plus(sums[0][p], sums[1][q]), bottom = plus(sums[2][kLower.row2], sums[3][kLower.row3]);
  TileInts best_bottom = kComplements ? any_complements : bottom;
  if constexpr (!kComplements && p != q) best_bottom = larger(bottom, plus(sums[2][kLower.row3], sums[3][kLower.row2]));
  const TileInts total = plus(top, best_bottom), better = total > best.total;
  best.total = larger(total, best.total);
  best.first = better ? (kComplements ? top : plus(top, bottom)) : best.first;
  best.kept = better ? TileInts{} + kept_bits(p, q) : best.kept;
}

// The bits of the best pattern of every tile, row 0 in the lowest four.
inline TileInts best_pattern(const RowSums& sums) {
  TileInts complements[6], any_complements{};
  for (int pair = 0; pair < 6; ++pair) {
    complements[pair] = plus(sums[2][pair], sums[3][5 - pair]);
    any_complements = larger(any_complements, complements[pair]);
  }
  BestPattern best{TileInts{} - 1, {}, {}};
  [&]<int... i>(std::integer_sequence<int, i...>) {
    (consider<i / 6, i % 6>(sums, any_complements, best), ...);
  }(std::make_integer_sequence<int, 36>());
  TileInts below{};
  for (int pair = 5; pair >= 0; --pair)
    below = plus(best.first, complements[pair]) == best.total
                ? TileInts{} + (kPairs[pair] << 8 | kPairs[5 - pair] << 12)
                : below;
  const TileInts exchanged = (best.kept & 0xff) | (best.kept & 0xf00) << 4 | (best.kept & 0xf000) >> 4;
  const TileInts completed = best.first < best.total ? exchanged : best.kept;
  return best.kept < 0x100 ? best.kept | below : completed;
}

// Writes the mask of 4 rows of 4 * kLanes columns, one tile to a lane.
template <class T>
void mask_tiles(const T* score, int64_t stride, bool* mask, int64_t mask_stride, bool stream) {
  RowSums sums;
  for (int row = 0; row < 4; ++row) {
    TileInts magnitude[4];
    load_tiles(score + row * stride, magnitude);
    int pair = 0;
    for (int lower = 0; lower < 4; ++lower)
      for (int upper = lower + 1; upper < 4; ++upper)
        sums[row][pair++] = plus(magnitude[lower], magnitude[upper]);
  }
  const TileInts kept = best_pattern(sums);
  for (int row = 0; row < 4; ++row) store_tiles(mask + row * mask_stride, kept >> 4 * row & 15, stream);
}

}  // namespace

void transposable(const TransposableArgs& a, int64_t begin, int64_t end) {
  constexpr int64_t kTileCols = 4 * kLanes;
  const int64_t full = a.cols / 4 * 4, whole = full / kTileCols * kTileCols, rest = full - whole;
  dispatch(a.dtype, [&]<class T>(T*) {
    for (int64_t top = 4 * begin; top < std::min(4 * end, a.rows); top += 4) {
      const T* score = static_cast<const T*>(a.score) + top * a.score_stride;
      bool* mask = a.mask + top * a.cols;
      if (a.rows - top < 4) {
        for (int64_t row = 0; row < a.rows - top; ++row)
          nm_row<T>({score + row * a.score_stride, nullptr, nullptr, mask + row * a.cols, nullptr, false, false},
                    a.cols, 2, 4);
        break;
      }
      const bool stream = a.stream && aligned(mask) && a.cols % 64 == 0;
      for (int64_t i = 0; i < whole; i += kTileCols) mask_tiles(score + i, a.score_stride, mask + i, a.cols, stream);
      if (rest > 0) {
        T padded[4 * kTileCols] = {};
        alignas(64) bool tiles[4 * kTileCols];
        for (int row = 0; row < 4; ++row)
          std::copy_n(score + row * a.score_stride + whole, rest, padded + row * kTileCols);
        mask_tiles(padded, kTileCols, tiles, kTileCols, false);
        for (int row = 0; row < 4; ++row) std::copy_n(tiles + row * kTileCols, rest, mask + row * a.cols + whole);
      }
      for (int64_t i = full; i < a.cols; ++i) {
        const T column[4] = {score[i], score[a.score_stride + i], score[2 * a.score_stride + i],
                             score[3 * a.score_stride + i]};
        const uint64_t kept = kept24<false>(column, nullptr, 4);
        for (int row = 0; row < 4; ++row) mask[row * a.cols + i] = kept >> row & 1;
      }
    }
  });
  if (a.stream) fence();
}

}  // namespace sparsekit::SPARSEKIT_LEVEL
