// The bytes of a 2:4 weight in row pairs.
//
// The bytes are the start of every block of rows as int64, and the end; then, block by block and tile by tile of 48
// inputs, the pairs that match_row_pairs24 found: four int16 (first row, second row, number of shared inputs, zero), the
// offsets of the shared inputs, the offsets of the others as {first row's, second row's}, and all weights as {first row's,
// second row's} in the same order. An offset is the number of the input in its tile, times kUnit.
#pragma once

#include "row_pairs24_match.h"

namespace sparsekit::SPARSEKIT_LEVEL {
namespace {

struct PairHead {
  int16_t first, second, shared, zero;
};

// A pair within the bytes, whose tile keeps `kept` inputs of every row.
template <class Byte>
struct PairRecord {
  Byte* at;
  int64_t kept;

  PairHead head() const {
    PairHead head;
    std::memcpy(&head, at, sizeof head);
    return head;
  }
  auto offsets() const {
    using Offset = std::conditional_t<std::is_const_v<Byte>, const uint16_t, uint16_t>;
    return reinterpret_cast<Offset*>(at + sizeof(PairHead));
  }
  Byte* weights(int64_t shared) const { return at + sizeof(PairHead) + 2 * shared + 4 * (kept - shared); }
  template <class T>
  Byte* end(int64_t shared) const {
    return weights(shared) + 2 * kept * static_cast<int64_t>(sizeof(T));
  }
};

inline int64_t kept_of(int64_t inputs) { return 2 * (inputs / 4) + inputs % 4; }

struct RowPairsShape {
  RowBlocks blocks;
  int64_t cols, tiles;

  RowPairsShape(int64_t rows, int64_t cols)
      : blocks(rows), cols(cols), tiles(LanesPlan::ceil_div(cols, kPairInputs)) {}
  int64_t inputs(int64_t tile) const { return std::min(kPairInputs, cols - tile * kPairInputs); }
  int64_t pairs(int64_t block) const { return (blocks.size(block) + 1) / 2; }
  static int64_t start(const uint8_t* data, int64_t block) {
    int64_t start;
    std::memcpy(&start, data + 8 * block, sizeof start);
    return start;
  }
};

template <class T>
T value_at(const T* values, uint64_t kept, int input) {
  return values[std::popcount(kept & ((uint64_t{1} << input) - 1))];
}

// Writes one pair and returns where the next one begins. The second row may be none: its weights are zero.
template <class T>
uint8_t* write_pair(uint8_t* to, const int16_t* pair, const uint64_t* kept, const T* const* values, int64_t count) {
  const int shared = pair[2];
  const PairRecord<uint8_t> record{to, count};
  const PairHead head{pair[0], pair[1], pair[2], 0};
  std::memcpy(to, &head, sizeof head);
  uint16_t* offsets = record.offsets();
  T* weights = reinterpret_cast<T*>(record.weights(shared));
  const auto weight = [&](int row, int input) { return values[row] ? value_at(values[row], kept[row], input) : T{}; };
  uint64_t rest[2] = {kept[0], kept[1]}, both = kept[0] & kept[1];
  for (int i = 0; i < shared; ++i, both &= both - 1) {
    const int input = std::countr_zero(both);
    for (uint64_t& each : rest) each &= ~(uint64_t{1} << input);
    *offsets++ = static_cast<uint16_t>(input * kUnit);
    for (int row = 0; row < 2; ++row) *weights++ = weight(row, input);
  }
  for (; rest[0]; rest[0] &= rest[0] - 1, rest[1] &= rest[1] - 1)
    for (int row = 0; row < 2; ++row) {
      const int input = std::countr_zero(rest[row]);
      *offsets++ = static_cast<uint16_t>(input * kUnit);
      *weights++ = weight(row, input);
    }
  return record.end<T>(shared);
}

// Calls body(tile, pair) for every pair of a block.
template <class T, class Body>
void each_pair(const RowPairsShape& shape, const uint8_t* data, int64_t block, const Body& body) {
  const uint8_t* at = data + shape.start(data, block);
  for (int64_t tile = 0; tile < shape.tiles; ++tile)
    for (int64_t pair = 0; pair < shape.pairs(block); ++pair) {
      const PairRecord<const uint8_t> record{at, kept_of(shape.inputs(tile))};
      const PairHead head = record.head();
      body(tile, record, head);
      at = record.end<T>(head.shared);
    }
}

// Writes the bitmask of a block [row][byte], and its values [row][kept] unless they are null.
template <class T>
void restore_block(const RowPairsShape& shape, const uint8_t* data, int64_t block, T* values, uint8_t* bitmask) {
  const int64_t stored = kept_of(shape.cols), bytes = (shape.cols + 7) / 8, rows = shape.blocks.size(block);
  each_pair<T>(shape, data, block, [&](int64_t tile, const PairRecord<const uint8_t>& record, const PairHead& head) {
    const T* weights = reinterpret_cast<const T*>(record.weights(head.shared));
    const uint16_t* offsets = record.offsets();
    const auto offset = [&](int64_t i, int row) {
      return offsets[i < head.shared ? i : head.shared + 2 * (i - head.shared) + row];
    };
    for (int row = 0; row < 2; ++row) {
      const int64_t at = row == 0 ? head.first : head.second, inputs = shape.inputs(tile);
      if (at >= rows) continue;
      uint64_t kept = 0;
      for (int64_t i = 0; i < record.kept; ++i) kept |= uint64_t{1} << offset(i, row) / kUnit;
      set_bits(bitmask + at * bytes, tile * kPairInputs, kept, inputs);
      if (values == nullptr) continue;
      T* to = values + at * stored + tile * kPairInputs / 2;
      for (int64_t i = 0; i < record.kept; ++i)
        to[std::popcount(kept & ((uint64_t{1} << offset(i, row) / kUnit) - 1))] = weights[2 * i + row];
    }
  });
}

}  // namespace

// Blocks of rows [begin, end).
void arrange_row_pairs24(const Arrange24Args& a, int64_t begin, int64_t end) {
  const RowPairsShape shape(a.rows, a.cols);
  const int64_t stored = kept_of(a.cols), bytes = (a.cols + 7) / 8;
  dispatch(a.dtype, [&]<class T>(T*) {
    for (int64_t block = begin; block < end; ++block) {
      uint8_t* at = a.data + shape.start(a.data, block);
      for (int64_t tile = 0; tile < shape.tiles; ++tile)
        for (int64_t pair = 0; pair < shape.pairs(block); ++pair) {
          const int16_t* matched = a.pairs + ((block * shape.tiles + tile) * (shape.blocks.height / 2) + pair) * 3;
          const int64_t col = tile * kPairInputs, inputs = shape.inputs(tile);
          uint64_t kept[2];
          const T* values[2];
          for (int i = 0; i < 2; ++i) {
            const bool none = matched[i] >= shape.blocks.size(block);
            const int64_t row = block * shape.blocks.height + matched[none ? 0 : i];
            kept[i] = kept_bits(a.bitmask + row * bytes, col, inputs);
            values[i] = none ? nullptr : static_cast<const T*>(a.values) + row * stored + col / 2;
          }
          at = write_pair(at, matched, kept, values, kept_of(inputs));
        }
    }
  });
}

// Blocks of rows [begin, end).
void restore_row_pairs24(const RestoreArranged24Args& a, int64_t begin, int64_t end) {
  const RowPairsShape shape(a.rows, a.cols);
  dispatch(a.dtype, [&]<class T>(T*) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t row = block * shape.blocks.height;
      restore_block<T>(shape, a.data, block, static_cast<T*>(a.values) + row * kept_of(a.cols),
                       a.bitmask + row * ((a.cols + 7) / 8));
    }
  });
}

}  // namespace sparsekit::SPARSEKIT_LEVEL
