// Single elements of the dtypes: conversion from and to float, and the integer key that ranks by magnitude.
#pragma once

#include "simd_level_headers.h"

namespace sparsekit::SPARSEKIT_LEVEL {
namespace {

struct F16 {
  uint16_t bits;
};
struct BF16 {
  uint16_t bits;
};

inline float to_float(float value) { return value; }

inline float to_float(BF16 value) { return std::bit_cast<float>(static_cast<uint32_t>(value.bits) << 16); }

inline float to_float(F16 value) {
#if defined(SPARSEKIT_AVX2) || defined(SPARSEKIT_AVX512)
  return _cvtsh_ss(value.bits);
#elif defined(SPARSEKIT_NEON)
  return std::bit_cast<__fp16>(value.bits);
#else
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000) << 16;
  const uint32_t magnitude = value.bits & 0x7fff;
  if (magnitude < 0x400) return std::copysign(static_cast<float>(magnitude) * 0x1p-24f, std::bit_cast<float>(sign));
  if (magnitude < 0x7c00) return std::bit_cast<float>(sign | ((magnitude << 13) + 0x38000000));
  const uint32_t quiet = magnitude > 0x7c00 ? 0x400000 : 0;
  return std::bit_cast<float>(sign | 0x7f800000 | (magnitude & 0x3ff) << 13 | quiet);
#endif
}

// Rounds to nearest, ties to even; a NaN stays a NaN.
template <class T>
T from_float(float value);

template <>
inline float from_float<float>(float value) {
  return value;
}

template <>
inline BF16 from_float<BF16>(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if (std::isnan(value)) return {static_cast<uint16_t>(bits >> 16 | 0x40)};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

template <>
inline F16 from_float<F16>(float value) {
#if defined(SPARSEKIT_AVX2) || defined(SPARSEKIT_AVX512)
  return {static_cast<uint16_t>(_cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT))};
#elif defined(SPARSEKIT_NEON)
  return {std::bit_cast<uint16_t>(static_cast<__fp16>(value))};
#else
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return {static_cast<uint16_t>(sign | 0x7e00 | (magnitude >> 13 & 0x1ff))};
  if (magnitude >= 0x477ff000) return {static_cast<uint16_t>(sign | 0x7c00)};  // rounds to 2^16 or more
  if (magnitude < 0x38800000) {  // below 2^-14: adding 0.5 leaves the denormal's bits, rounded, at the low end
    const float shifted = std::bit_cast<float>(magnitude) + 0.5f;
    return {static_cast<uint16_t>(sign | (std::bit_cast<uint32_t>(shifted) - 0x3f000000))};
  }
  magnitude += 0xfff + (magnitude >> 13 & 1);
  return {static_cast<uint16_t>(sign | (magnitude - 0x38000000) >> 13)};
#endif
}

// The key of every NaN: one above Inf's.
template <class T>
constexpr int kNanKey = 0;
template <>
constexpr int kNanKey<float> = 0x7f800001;
template <>
constexpr int kNanKey<F16> = 0x7c01;
template <>
constexpr int kNanKey<BF16> = 0x7f81;

// Keys that order values by magnitude: -0.0 equals 0.0, and all NaNs are equal and above Inf.
inline int32_t magnitude_key(float value) {
  return std::min(std::bit_cast<int32_t>(value) & 0x7fffffff, kNanKey<float>);
}
template <class T>
int32_t magnitude_key(T value) {
  return std::min(value.bits & 0x7fff, kNanKey<T>);
}

// Marks the n entries of a group of m that rank first: by larger key, then by lower index. nm_kernel.h ranks many
// groups at a time by the same rule.
inline void keep_first(const int32_t* keys, bool* keep, int n, int m) {
  for (int i = 0; i < m; ++i) {
    int before = 0;
    for (int j = 0; j < i; ++j) before += keys[j] >= keys[i];
    for (int j = i + 1; j < m; ++j) before += keys[j] > keys[i];
    keep[i] = before < n;
  }
}

// Whether an entry of a caller's mask is set. A bool tensor may be a view of bytes other than 0 and 1, which C++ must
// not read as bool.
inline bool is_set(const bool* mask, int64_t i) { return reinterpret_cast<const uint8_t*>(mask)[i] != 0; }

// Whether all are neither Inf nor NaN.
template <class T>
bool all_finite(const T* values, int64_t count) {
  int32_t largest = 0;
  for (int64_t i = 0; i < count; ++i) largest = std::max<int32_t>(largest, magnitude_key(values[i]));
  return largest < kNanKey<T> - 1;
}

// Calls body with a null pointer to the element type.
template <class Body>
auto dispatch(DType dtype, Body body) {
  switch (dtype) {
    case DType::F16:
      return body(static_cast<F16*>(nullptr));
    case DType::BF16:
      return body(static_cast<BF16*>(nullptr));
    default:
      return body(static_cast<float*>(nullptr));
  }
}

// Adds the products of dropped weights, which are 0, with inputs that are Inf or NaN: NaN, as in the dense product. A
// kernel that skips dropped weights calls this if it meets such an input.
//
// x is [tokens, cols] and y [tokens, rows], with tokens `stride` apart. keeps(row, col) says whether a weight is kept.
template <class T, class Keeps>
void multiply_dropped(const T* x, int64_t tokens, int64_t cols, T* y, int64_t rows, int64_t stride, Keeps keeps) {
  for (int64_t token = 0; token < tokens; ++token, x += cols, y += stride) {
    int64_t left = rows;  // rows that are not NaN
    for (int64_t col = 0; col < cols && left > 0; ++col) {
      if (all_finite(x + col, 1)) continue;
      left = 0;
      for (int64_t row = 0; row < rows; ++row) {
        if (std::isnan(to_float(y[row]))) continue;
        if (keeps(row, col))
          ++left;
        else
          y[row] = from_float<T>(std::numeric_limits<float>::quiet_NaN());
      }
    }
  }
}

}  // namespace
}  // namespace sparsekit::SPARSEKIT_LEVEL
