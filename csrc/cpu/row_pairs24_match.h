// match_row_pairs24: finds, for every tile of 48 inputs, the pairs of rows that keep the most inputs in common.
#pragma once

#include "arranged24.h"

namespace sparsekit::SPARSEKIT_LEVEL {
namespace {

constexpr int64_t kPairInputs = 48;  // of a tile: 24 KB of 8 vectors of AVX-512, three quarters of an L1 cache
constexpr int kMostRows = 256;       // of a block

// The rows of a block while they are being matched. A free row has a bit that no input has, so that a row which is taken
// shares nothing, and a free one at least this bit.
class RowMatching {
 public:
  RowMatching(const uint64_t* kept, int rows) : rows_(rows) {
    for (int row = 0; row < rows; ++row) kept_[row] = kept[row] | kFree;
    for (int row = 0; row < rows; ++row) find_partner(row, kMostInputs);
  }

  // Writes the first row, the second row and how many inputs they share, rounded down to an even number, of each pair:
  // the pair that shares the most first, of those the one with the lowest first row, then the lowest second row.
  void write(int16_t* pairs, int inputs) {
    for (int most = inputs; most >= 0; --most)
      for (int row = 0; row < rows_; ++row) {
        while (kept_[row] && shared_[row] == most && !kept_[partner_[row]]) find_partner(row, most);
        if (!kept_[row] || shared_[row] != most) continue;
        pairs = write_pair(pairs, row, partner_[row], most);
        kept_[row] = kept_[partner_[row]] = 0;
      }
    for (int row = 0; row < rows_; ++row)  // an odd row is alone: its partner is no row
      if (kept_[row]) pairs = write_pair(pairs, row, rows_, std::popcount(kept_[row]) - 1);
  }

 private:
  static constexpr uint64_t kFree = uint64_t{1} << 63;
  static constexpr int kMostInputs = kPairInputs;

  static int16_t* write_pair(int16_t* to, int first, int second, int shared) {
    *to++ = static_cast<int16_t>(first);
    *to++ = static_cast<int16_t>(second);
    *to++ = static_cast<int16_t>(shared / 2 * 2);
    return to;
  }

  // The best partner among the free rows after this one, which shares at most `most`: as rows are taken, it only falls.
  void find_partner(int row, int most) {
    int best = 0;  // the shared inputs times 256, and a number that is larger for lower rows
    for (int other = row + 1; other < rows_; ++other) {
      const int shared = static_cast<int>(std::popcount(kept_[row] & kept_[other]));
      best = std::max(best, shared << 8 | (kMostRows - 1 - other));
      if (shared > most) break;  // no row after it is better
    }
    shared_[row] = static_cast<int16_t>((best >> 8) - 1);  // -1: none is free
    partner_[row] = static_cast<int16_t>(kMostRows - 1 - (best & 255));
  }

  int rows_;
  uint64_t kept_[kMostRows];
  int16_t shared_[kMostRows], partner_[kMostRows];
};

}  // namespace

// Blocks of rows [begin, end).
void match_row_pairs24(const MatchRowPairs24Args& a, int64_t begin, int64_t end) {
  const RowBlocks blocks(a.rows);
  const int64_t bytes = (a.cols + 7) / 8, tiles = LanesPlan::ceil_div(a.cols, kPairInputs);
  for (int64_t block = begin; block < end; ++block)
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int rows = static_cast<int>(blocks.size(block));
      const int64_t col = tile * kPairInputs, inputs = std::min(kPairInputs, a.cols - col);
      uint64_t kept[kMostRows];
      for (int row = 0; row < rows; ++row)
        kept[row] = kept_bits(a.bitmask + (block * blocks.height + row) * bytes, col, inputs);
      int16_t* pairs = a.pairs + (block * tiles + tile) * (blocks.height / 2) * 3;
      std::fill_n(pairs, blocks.height / 2 * 3, int16_t{0});
      RowMatching(kept, rows).write(pairs, static_cast<int>(inputs));
    }
}

}  // namespace sparsekit::SPARSEKIT_LEVEL
