// The packed 2:4 format: two values and four mask bits for every group of four.
#pragma once

#include "scalar.h"

namespace sparsekit::SPARSEKIT_LEVEL {
namespace {

// The two bits that a group keeps, by its four mask bits: two stay as they are, fewer are completed by the rule of
// torch.sparse's semi-structured conversion, and of more (never reached where the pattern is checked) the lowest two.
constexpr uint8_t kComplete[16] = {0b1100, 0b0101, 0b0110, 0b0011, 0b1100, 0b0101, 0b0110, 0b0011,
                                   0b1100, 0b1001, 0b1010, 0b0011, 0b1100, 0b0101, 0b0110, 0b0011};

inline bool is_zero(float value) { return value == 0; }
inline bool is_zero(F16 value) { return (value.bits & 0x7fff) == 0; }
inline bool is_zero(BF16 value) { return (value.bits & 0x7fff) == 0; }

// Packs columns from `column`, a multiple of 8, on; returns the first bad group, or -1.
template <class T>
int64_t pack24_columns(const T* weight, const bool* mask, T* values, uint8_t* bitmask, int64_t column, int64_t cols) {
  int64_t bad = -1;
  values += column / 2;
  for (; column < cols; column += 4) {
    const int width = static_cast<int>(std::min<int64_t>(4, cols - column));
    unsigned kept = width < 4 ? (1u << width) - 1 : 0;
    if (width == 4) {
      for (int i = 0; i < 4; ++i) kept |= unsigned{mask ? mask[column + i] : !is_zero(weight[column + i])} << i;
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

template <class T>
void unpack24_columns(const T* values, const uint8_t* bitmask, T* weight, int64_t column, int64_t cols) {
  values += column / 2;
  for (; column < cols; column += 4) {
    const int width = static_cast<int>(std::min<int64_t>(4, cols - column));
    const unsigned kept = bitmask[column / 8] >> column % 8 & 15;
    int used = 0;
    for (int i = 0; i < width; ++i)
      weight[column + i] = kept >> i & 1 && used < (width < 4 ? width : 2) ? values[used++] : T{};
    values += width < 4 ? width : 2;
  }
}

}  // namespace

int64_t pack24(const Pack24Args& a, int64_t begin, int64_t end) {
  return dispatch(a.dtype, [&]<class T>(T*) -> int64_t {
    const int64_t stored = 2 * (a.cols / 4) + a.cols % 4, bytes = (a.cols + 7) / 8;
    int64_t first = -1;
    for (int64_t row = begin; row < end; ++row) {
      const int64_t bad = pack24_columns(static_cast<const T*>(a.weight) + row * a.weight_stride,
                                         a.mask ? a.mask + row * a.cols : nullptr,
                                         static_cast<T*>(a.values) + row * stored, a.bitmask + row * bytes, 0, a.cols);
      if (bad >= 0 && first < 0) first = row * (a.cols / 4) + bad;
    }
    return first;
  });
}

void unpack24(const Unpack24Args& a, int64_t begin, int64_t end) {
  dispatch(a.dtype, [&]<class T>(T*) {
    const int64_t stored = 2 * (a.cols / 4) + a.cols % 4, bytes = (a.cols + 7) / 8;
    for (int64_t row = begin; row < end; ++row)
      unpack24_columns(static_cast<const T*>(a.values) + row * stored, a.bitmask + row * bytes,
                       static_cast<T*>(a.weight) + row * a.cols, 0, a.cols);
  });
}

}  // namespace sparsekit::SPARSEKIT_LEVEL
