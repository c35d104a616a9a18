// tile24: brings a quantized 2:4 weight into the tiles that linear24q_int8 reads, in the layout of ops/tiled24.py.
#pragma once

#include "dequantize24.h"
#include "lanes.h"
#include "tile_lanes.h"

namespace sparsekit::SPARSEKIT_LEVEL {
namespace {

// Which two of four entries are kept, as two bytes, for both halves of a byte of the bitmask; 0 and 1 where not two are.
constexpr std::array<uint32_t, 256> kKeptEntries = [] {
  std::array<uint32_t, 256> entries{};
  for (unsigned byte = 0; byte < 256; ++byte)
    for (int half = 0; half < 2; ++half) {
      const unsigned bits = byte >> 4 * half & 15;
      const bool two = std::popcount(bits) == 2;
      const int first = two ? std::countr_zero(bits) : 0, second = two ? std::bit_width(bits) - 1 : 1;
      entries[byte] |= static_cast<uint32_t>(first | second << 8) << 16 * half;
    }
  return entries;
}();

// The part of a row that lies in one tile: 16 times four columns, with padding at the end of a group.
template <QuantType type>
struct RowOfTile {
  static constexpr int kCodes = kTileCols / 2, kZeroCode = type == QuantType::Nf4 ? 7 : 0;
  uint8_t bits[kTileCols / 8] = {};
  uint8_t codes[type == QuantType::Int8 ? kCodes : kCodes / 2];

  RowOfTile() { std::memset(codes, kZeroCode * (type == QuantType::Int8 ? 1 : 0x11), sizeof codes); }

  // `values` are stored from `codes_from` on, those of the first `fours` times four columns at places of the bitmask.
  void read(const uint8_t* bits_from, int64_t fours, const uint8_t* codes_from, int64_t values) {
    std::copy_n(bits_from, (fours + 1) / 2, bits);
    if (fours % 2) bits[fours / 2] &= 15;
    std::copy_n(codes_from, type == QuantType::Int8 ? values : values / 2, codes);
    if (type != QuantType::Int8 && values % 2)
      codes[values / 2] = static_cast<uint8_t>((codes_from[values / 2] & 15) | kZeroCode << 4);
  }

  void write(uint8_t* tile, int stored) const {
    uint64_t index = 0;
    for (int step = 0; step < kSteps; ++step) {
      const uint64_t entries = kKeptEntries[bits[2 * step]] | uint64_t{kKeptEntries[bits[2 * step + 1]]} << 32;
      index |= entries << 2 * step;
    }
    store_bytes(tile + kIndexAt + 8 * stored, index, 8);
    for (int step = 0; step < kSteps; ++step) {
      if constexpr (type == QuantType::Int8) {
        std::memcpy(tile + kCodesAt + 64 * step + 8 * stored, codes + 8 * step, 8);
        continue;
      }
      uint8_t* to = tile + kCodesAt + 64 * (step / 2) + 8 * stored;  // odd steps are the high bits of even ones
      for (int i = 0; i < 8; ++i) {
        const int code = codes[4 * step + i / 2] >> i % 2 * 4 & 15;
        to[i] = static_cast<uint8_t>(step % 2 ? to[i] | code << 4 : code);
      }
    }
  }
};

template <QuantType type>
void tile_blocks(const Tile24Args& a, int64_t begin, int64_t end) {
  const int64_t kept = 2 * (a.cols / 4) + a.cols % 4, groups = (a.cols + a.group - 1) / a.group;
  const int64_t stored_bytes = type == QuantType::Int8 ? kept : (kept + 1) / 2, mask_bytes = (a.cols + 7) / 8;
  uint8_t* tile = a.tiles + begin * a.tiles_of_row * tile_bytes(type);
  for (int64_t block = begin; block < end; ++block)
    for (int64_t g = 0; g < groups; ++g) {
      const ValueRange range(g, a.cols, a.group);
      const int64_t fours_end = std::min((g + 1) * a.group, a.cols) / 4;
      for (int64_t value = range.begin; value < range.end; value += kTileCols / 2, tile += tile_bytes(type))
        for (int stored = 0; stored < kTileRows; ++stored) {
          const int64_t row = block * kTileRows + kStoredRow[stored];
          RowOfTile<type> part;
          uint16_t scale = 0;
          if (row < a.rows) {
            part.read(a.bitmask + row * mask_bytes + value / 4, std::clamp<int64_t>(fours_end - value / 2, 0, 16),
                      a.codes + row * stored_bytes + (type == QuantType::Int8 ? value : value / 2),
                      std::min<int64_t>(range.end - value, kTileCols / 2));
            scale = a.scales[row * groups + g];
          }
          std::memcpy(tile + 2 * kStoredRow[stored], &scale, sizeof scale);
          part.write(tile, stored);
        }
    }
}

}  // namespace

// Blocks of 8 rows [begin, end).
void tile24(const Tile24Args& a, int64_t begin, int64_t end) {
  const auto blocks = a.type == QuantType::Int8   ? tile_blocks<QuantType::Int8>
                      : a.type == QuantType::Int4 ? tile_blocks<QuantType::Int4>
                                                  : tile_blocks<QuantType::Nf4>;
  blocks(a, begin, end);
}

}  // namespace sparsekit::SPARSEKIT_LEVEL
