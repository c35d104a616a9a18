// The packed 2:4 format: two values and four mask bits for every group of four.
#pragma once

#include "compress_expand.h"

namespace sparsekit::SPARSEKIT_LEVEL {
namespace {

// The two bits that a group keeps, by its four mask bits. Two stay as they are. Fewer are completed by the rule of
// torch.sparse's semi-structured conversion. Of more, which a check refuses, the lowest two are kept.
constexpr uint8_t kComplete[16] = {0b1100, 0b0101, 0b0110, 0b0011, 0b1100, 0b0101, 0b0110, 0b0011,
                                   0b1100, 0b1001, 0b1010, 0b0011, 0b1100, 0b0101, 0b0110, 0b0011};

inline bool is_zero(float value) { return value == 0; }
inline bool is_zero(F16 value) { return (value.bits & 0x7fff) == 0; }
inline bool is_zero(BF16 value) { return (value.bits & 0x7fff) == 0; }

// The same for the eight bits of two groups.
constexpr uint8_t complete2(unsigned bits) {
  return static_cast<uint8_t>(kComplete[bits & 15] | kComplete[bits >> 4] << 4);
}

// Packs the columns from `column`, a multiple of 8, one group at a time; returns the first bad group, or -1.
template <class T>
int64_t pack24_columns(const T* weight, const bool* mask, T* values, uint8_t* bitmask, int64_t column, int64_t cols) {
  int64_t bad = -1;
  values += column / 2;
  for (; column < cols; column += 4) {
    const int width = static_cast<int>(std::min<int64_t>(4, cols - column));
    unsigned kept = 0;
    for (int i = 0; i < width; ++i)
      kept |= unsigned{width < 4 || (mask ? is_set(mask, column + i) : !is_zero(weight[column + i]))} << i;
    if (width == 4) {
      const int count = std::popcount(kept);
      if (bad < 0 && (count > 2 || (mask && count < 2))) bad = column / 4;
      kept = kComplete[kept];
    }
    bitmask[column / 8] = static_cast<uint8_t>(column % 8 ? bitmask[column / 8] | kept << 4 : kept);
    for (int i = 0; i < width; ++i)
      if (kept >> i & 1) *values++ = weight[column + i];
  }
  return bad;
}

// The inverse. A group whose bitmask does not have two bits set is completed by the same rule.
template <class T>
void unpack24_columns(const T* values, const uint8_t* bitmask, T* weight, int64_t column, int64_t cols) {
  values += column / 2;
  for (; column < cols; column += 4) {
    const int width = static_cast<int>(std::min<int64_t>(4, cols - column));
    const unsigned kept = width < 4 ? 15 : kComplete[bitmask[column / 8] >> column % 8 & 15];
    for (int i = 0; i < width; ++i) weight[column + i] = kept >> i & 1 ? *values++ : T{};
  }
}

#if !defined(SPARSEKIT_SCALAR)

constexpr uint64_t kEveryGroup = 0x1111111111111111;

// How many of the four bits of each group are set: 16 counts of four bits.
inline uint64_t count_bits(uint64_t kept) {
  const uint64_t pairs = kept - (kept >> 1 & 0x5555555555555555);
  return (pairs & 0x3333333333333333) + (pairs >> 2 & 0x3333333333333333);
}

// The lowest bit of every group whose count is more than two or, with `exact`, is not two.
inline uint64_t bad_groups(uint64_t counts, bool exact) {
  const uint64_t ones = counts, twos = counts >> 1, fours = counts >> 2;
  return (fours | (exact ? ones | ~twos : ones & twos)) & kEveryGroup;
}

inline uint64_t complete(uint64_t kept) {
  static constexpr auto kTable = [] {
    std::array<uint8_t, 256> table{};
    for (unsigned i = 0; i < 256; ++i) table[i] = complete2(i);
    return table;
  }();
  uint64_t result = 0;
  for (int shift = 0; shift < 64; shift += 8) result |= uint64_t{kTable[kept >> shift & 255]} << shift;
  return result;
}

// Packs whole pieces of 64 columns; returns the first bad group, or -1.
template <class T>
int64_t pack24_pieces(const T* weight, const bool* mask, T* values, uint8_t* bitmask, int64_t cols, bool stream) {
  int64_t bad = -1;
  for (int64_t column = 0; column < cols; column += 64) {
    uint64_t kept = mask ? mask_bits(mask + column) : nonzero_bits(weight + column);
    const uint64_t counts = count_bits(kept);
    if (counts != 2 * kEveryGroup) {
      const uint64_t wrong = bad_groups(counts, mask != nullptr);
      if (bad < 0 && wrong) bad = (column + std::countr_zero(wrong)) / 4;
      kept = complete(kept);
    }
    std::memcpy(bitmask + column / 8, &kept, 8);
    compress64(weight + column, kept, values + column / 2, stream);
  }
  return bad;
}

template <class T>
void unpack24_pieces(const T* values, const uint8_t* bitmask, T* weight, int64_t cols, bool stream) {
  for (int64_t column = 0; column < cols; column += 64) {
    uint64_t kept;
    std::memcpy(&kept, bitmask + column / 8, 8);
    if (count_bits(kept) != 2 * kEveryGroup) kept = complete(kept);
    expand64(values + column / 2, kept, weight + column, stream);
  }
}

// How many columns are in whole pieces.
inline int64_t piece_columns(int64_t cols) { return cols / 64 * 64; }

#else

template <class T>
int64_t pack24_pieces(const T*, const bool*, T*, uint8_t*, int64_t, bool) {
  return -1;
}
template <class T>
void unpack24_pieces(const T*, const uint8_t*, T*, int64_t, bool) {}

inline int64_t piece_columns(int64_t) { return 0; }

#endif

}  // namespace

int64_t pack24(const Pack24Args& a, int64_t begin, int64_t end) {
  const int64_t stored = 2 * (a.cols / 4) + a.cols % 4, bytes = (a.cols + 7) / 8, pieces = piece_columns(a.cols);
  int64_t first = -1;
  dispatch(a.dtype, [&]<class T>(T*) {
    for (int64_t row = begin; row < end; ++row) {
      const T* weight = static_cast<const T*>(a.weight) + row * a.weight_stride;
      const bool* mask = a.mask ? a.mask + row * a.cols : nullptr;
      T* values = static_cast<T*>(a.values) + row * stored;
      uint8_t* bitmask = a.bitmask + row * bytes;
      const int64_t bad = pack24_pieces(weight, mask, values, bitmask, pieces, a.stream && aligned(values));
      const int64_t bad_after = pack24_columns(weight, mask, values, bitmask, pieces, a.cols);
      if (first < 0 && std::max(bad, bad_after) >= 0) first = row * (a.cols / 4) + (bad >= 0 ? bad : bad_after);
    }
  });
  if (a.stream) fence();
  return first;
}

void unpack24(const Unpack24Args& a, int64_t begin, int64_t end) {
  const int64_t stored = 2 * (a.cols / 4) + a.cols % 4, bytes = (a.cols + 7) / 8, pieces = piece_columns(a.cols);
  dispatch(a.dtype, [&]<class T>(T*) {
    for (int64_t row = begin; row < end; ++row) {
      const T* values = static_cast<const T*>(a.values) + row * stored;
      const uint8_t* bitmask = a.bitmask + row * bytes;
      T* weight = static_cast<T*>(a.weight) + row * a.cols;
      unpack24_pieces(values, bitmask, weight, pieces, a.stream && aligned(weight));
      unpack24_columns(values, bitmask, weight, pieces, a.cols);
    }
  });
  if (a.stream) fence();
}

}  // namespace sparsekit::SPARSEKIT_LEVEL
