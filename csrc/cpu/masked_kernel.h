// A weight with zeros where a mask, given as bits, drops entries.
#pragma once

#include <algorithm>

#include "elements.h"
#include "lanes.h"

namespace sparsekit::SPARSEKIT_LEVEL {
namespace {

// The 64 bits from `bit` on.
inline uint64_t bits64(const uint8_t* bits, int64_t bit) {
  uint64_t word;
  std::memcpy(&word, bits + bit / 8, 8);
  const int shift = static_cast<int>(bit % 8);
  return shift ? word >> shift | uint64_t{bits[bit / 8 + 8]} << (64 - shift) : word;
}

// The `count` bits from `bit` on, at most 8; those above them are set.
inline unsigned bits8(const uint8_t* bits, int64_t bit, int64_t count) {
  if (count == 0) return 255;
  const int shift = static_cast<int>(bit % 8);
  unsigned word = bits[bit / 8];
  if (shift + count > 8) word |= unsigned{bits[bit / 8 + 1]} << 8;
  return word >> shift | ~0u << count;
}

template <class T>
void masked_row(const T* weight, const uint8_t* bits, int64_t bit, T* to, int64_t full, int64_t cols) {
  int64_t i = 0;
#if !defined(SPARSEKIT_SCALAR)
  constexpr int kLanes = Keys32::kLanes * 4 / sizeof(T);
  for (; i + 64 <= full; i += 64) {
    const uint64_t kept = bits64(bits, bit + i);
    [&]<int... j>(std::integer_sequence<int, j...>) {
      (store_kept(to + i + j * kLanes, weight + i + j * kLanes, keep_bits<T, j * kLanes>(kept), false), ...);
    }(std::make_integer_sequence<int, 64 / kLanes>());
  }
#endif
  for (; i < full; ++i) to[i] = bits[(bit + i) / 8] >> (bit + i) % 8 & 1 ? weight[i] : T{};
  std::copy(weight + full, weight + cols, to + full);
}

// Eight columns of a row, or as many as there are, as bits of unsigned integers.
template <class Bits>
void masked_taps(const Bits* weight, const uint8_t* bits, Bits* to, const MaskedArgs& a, int64_t row, int64_t col) {
  constexpr int64_t kTaps = 64;
  const int64_t width = std::min<int64_t>(8, a.cols - col), count = std::clamp<int64_t>(a.full - col, 0, width);
  for (int64_t begin = 0; begin < a.taps; begin += kTaps) {
    const int64_t taps = std::min(kTaps, a.taps - begin), start = (row * a.cols + col) * a.taps + begin;
    Bits kept[8 * kTaps];  // all bits set, or none
    for (int64_t tap = 0; tap < taps; ++tap) {
      const unsigned byte = bits8(bits, (row * a.taps + begin + tap) * a.full + col, count);
      for (int i = 0; i < 8; ++i) kept[i * taps + tap] = static_cast<Bits>(-static_cast<int>(byte >> i & 1));
    }
    const bool whole = taps == a.taps;  // then the columns follow each other
    for (int64_t i = 0; i < (whole ? 1 : width); ++i)
      for (int64_t j = 0; j < (whole ? width * taps : taps); ++j)
        to[start + i * a.taps + j] = weight[start + i * a.taps + j] & kept[i * taps + j];
  }
}

template <class Bits>
void masked_pieces(const MaskedArgs& a, int64_t begin, int64_t end) {
  const int64_t pieces = (a.cols + 7) / 8;
  for (int64_t i = begin; i < end; ++i)
    masked_taps(static_cast<const Bits*>(a.weight), a.bits, static_cast<Bits*>(a.masked), a, i / pieces, i % pieces * 8);
}

}  // namespace

void masked(const MaskedArgs& a, int64_t begin, int64_t end) {
  if (a.taps > 1)
    return a.dtype == DType::F32 ? masked_pieces<uint32_t>(a, begin, end) : masked_pieces<uint16_t>(a, begin, end);
  dispatch(a.dtype, [&]<class T>(T*) {
    const T* weight = static_cast<const T*>(a.weight);
    T* to = static_cast<T*>(a.masked);
    for (int64_t i = begin; i < end; ++i)
      masked_row(weight + i * a.cols, a.bits, i * a.full, to + i * a.cols, a.full, a.cols);
  });
}

}  // namespace sparsekit::SPARSEKIT_LEVEL
