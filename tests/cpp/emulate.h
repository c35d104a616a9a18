// AVX-512 through SIMDe (https://github.com/simd-everywhere/simde), with the intrinsics that its release 0.7.4 lacks.
// Force-included, so that it comes before the kernels.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

#include <immintrin.h>
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>

namespace emulated {

template <class Lane, class Vector>
auto lanes(const Vector& vector) {
  std::array<Lane, sizeof(Vector) / sizeof(Lane)> array;
  std::memcpy(array.data(), &vector, sizeof(Vector));
  return array;
}

template <class Vector, class Array>
Vector vector(const Array& array) {
  static_assert(sizeof(Vector) == sizeof(Array));
  Vector result;
  std::memcpy(&result, array.data(), sizeof(Vector));
  return result;
}

template <class Lane, class Compare>
auto compare(simde__m512i a, simde__m512i b, Compare holds) {
  const auto x = lanes<Lane>(a), y = lanes<Lane>(b);
  uint64_t bits = 0;
  for (size_t i = 0; i < x.size(); ++i) bits |= uint64_t{holds(x[i], y[i])} << i;
  return bits;
}

inline simde__m512i shift_right(simde__m512i from, simde__m512i counts) {
  auto x = lanes<int32_t>(from);
  const auto by = lanes<int32_t>(counts);
  for (size_t i = 0; i < x.size(); ++i) x[i] >>= by[i];
  return vector<simde__m512i>(x);
}

template <class Lane>
simde__m512i compress(uint64_t kept, simde__m512i from) {
  const auto x = lanes<Lane>(from);
  std::remove_const_t<decltype(x)> result{};
  for (size_t i = 0, k = 0; i < x.size(); ++i)
    if (kept >> i & 1) result[k++] = x[i];
  return vector<simde__m512i>(result);
}

template <class Lane>
simde__m512i expand(uint64_t kept, simde__m512i from) {
  const auto x = lanes<Lane>(from);
  std::remove_const_t<decltype(x)> result{};
  for (size_t i = 0, k = 0; i < x.size(); ++i)
    if (kept >> i & 1) result[i] = x[k++];
  return vector<simde__m512i>(result);
}

template <class To, class From, class Convert>
simde__m512i widen(From from, Convert convert) {
  const auto x = lanes<uint16_t>(from);
  std::array<To, 64 / sizeof(To)> result;
  for (size_t i = 0; i < result.size(); ++i) result[i] = convert(x[i]);
  return vector<simde__m512i>(result);
}

template <class Convert>
__m256i narrow(simde__m512i from, Convert convert) {
  const auto x = lanes<uint32_t>(from);
  std::array<uint16_t, 16> result;
  for (size_t i = 0; i < result.size(); ++i) result[i] = convert(x[i]);
  return vector<__m256i>(result);
}

// Every 128 bits by themselves.
template <class Body>
simde__m512i each128(simde__m512i a, simde__m512i b, Body body) {
  using Quarter = std::array<int32_t, 4>;
  const auto x = lanes<Quarter>(a), y = lanes<Quarter>(b);
  std::array<Quarter, 4> result;
  for (int i = 0; i < 4; ++i)
    result[i] = lanes<int32_t>(body(vector<simde__m128i>(x[i]), vector<simde__m128i>(y[i])));
  return vector<simde__m512i>(result);
}

inline simde__m512 shuffle128(simde__m512 a, simde__m512 b, int order) {
  using Quarter = std::array<float, 4>;
  const auto x = lanes<Quarter>(a), y = lanes<Quarter>(b);
  return vector<simde__m512>(std::array{x[order & 3], x[order >> 2 & 3], y[order >> 4 & 3], y[order >> 6 & 3]});
}

// By halves, as the compilers do.
inline float sum(simde__m512 a) {
  auto x = lanes<float>(a);
  for (size_t width = 8; width > 0; width /= 2)
    for (size_t i = 0; i < width; ++i) x[i] += x[i + width];
  return x[0];
}

inline simde__m512i widen_bytes(__m128i from) {
  const auto x = lanes<int8_t>(from);
  std::array<int32_t, 16> result;
  std::copy(x.begin(), x.end(), result.begin());
  return vector<simde__m512i>(result);
}

inline simde__m512 to_floats(simde__m512i from) {
  const auto x = lanes<int32_t>(from);
  std::array<float, 16> result;
  std::copy(x.begin(), x.end(), result.begin());
  return vector<simde__m512>(result);
}

template <class Vector>
Vector multiply_pairs(Vector a, Vector b) {
  const auto x = lanes<int16_t>(a), y = lanes<int16_t>(b);
  std::array<int32_t, sizeof(Vector) / 4> result;
  for (size_t i = 0; i < result.size(); ++i) result[i] = x[2 * i] * y[2 * i] + x[2 * i + 1] * y[2 * i + 1];
  return vector<Vector>(result);
}

// Adds the products of unsigned by signed bytes, four to a lane.
template <class Vector>
Vector add_products(Vector sums, Vector a, Vector b) {
  const auto x = lanes<uint8_t>(a);
  const auto y = lanes<int8_t>(b);
  auto result = lanes<int32_t>(sums);
  for (size_t i = 0; i < x.size(); ++i) result[i / 4] += x[i] * y[i];
  return vector<Vector>(result);
}

}  // namespace emulated

#undef _mm512_alignr_epi8
#define _mm512_alignr_epi8(a, b, count) \
  emulated::each128(a, b, [](auto high, auto low) { return simde_mm_alignr_epi8(high, low, count); })
#undef _mm512_shuffle_epi32
#define _mm512_shuffle_epi32(a, order) \
  emulated::each128(a, a, [](auto x, auto) { return simde_mm_shuffle_epi32(x, int(order)); })
#undef _mm512_cmpgt_epi16_mask
#define _mm512_cmpgt_epi16_mask(a, b) \
  static_cast<__mmask32>(emulated::compare<int16_t>(a, b, [](auto x, auto y) { return x > y; }))
#undef _mm512_cmplt_epi16_mask
#define _mm512_cmplt_epi16_mask(a, b) \
  static_cast<__mmask32>(emulated::compare<int16_t>(a, b, [](auto x, auto y) { return x < y; }))
#undef _mm512_cmplt_epi32_mask
#define _mm512_cmplt_epi32_mask(a, b) \
  static_cast<__mmask16>(emulated::compare<int32_t>(a, b, [](auto x, auto y) { return x < y; }))
#undef _mm512_cvtepu16_epi32
#define _mm512_cvtepu16_epi32(a) emulated::widen<uint32_t>(a, [](uint16_t x) -> uint32_t { return x; })
#undef _mm512_cvtph_ps
#define _mm512_cvtph_ps(a) \
  simde_mm512_castsi512_ps(emulated::widen<float>(a, [](uint16_t x) { return _cvtsh_ss(x); }))
#undef _mm512_cvtps_ph
#define _mm512_cvtps_ph(a, rounding)                    \
  emulated::narrow(simde_mm512_castps_si512(a), [](uint32_t x) -> uint16_t { \
    return _cvtss_sh(std::bit_cast<float>(x), rounding);                     \
  })
#undef _mm512_cvtepi32_epi16
#define _mm512_cvtepi32_epi16(a) emulated::narrow(a, [](uint32_t x) { return static_cast<uint16_t>(x); })
#undef _mm512_kunpackd
#define _mm512_kunpackd(high, low) (static_cast<__mmask64>(high) << 32 | static_cast<uint32_t>(low))
#undef _mm512_kunpackw
#define _mm512_kunpackw(high, low) (static_cast<__mmask32>(high) << 16 | static_cast<uint16_t>(low))
#undef _mm512_maskz_compress_epi16
#define _mm512_maskz_compress_epi16(kept, a) emulated::compress<uint16_t>(kept, a)
#undef _mm512_maskz_expand_epi16
#define _mm512_maskz_expand_epi16(kept, a) emulated::expand<uint16_t>(kept, a)
#undef _mm512_maskz_expand_epi32
#define _mm512_maskz_expand_epi32(kept, a) emulated::expand<uint32_t>(kept, a)
#undef _mm512_maskz_expand_ps
#define _mm512_maskz_expand_ps(kept, a) \
  simde_mm512_castsi512_ps(emulated::expand<uint32_t>(kept, simde_mm512_castps_si512(a)))
#undef _mm512_shuffle_f32x4
#define _mm512_shuffle_f32x4(a, b, order) emulated::shuffle128(a, b, order)
#undef _mm512_srav_epi32
#define _mm512_srav_epi32(a, counts) emulated::shift_right(a, counts)
#undef _mm512_stream_si512
#define _mm512_stream_si512(to, a) simde_mm512_store_si512(to, a)
#undef _mm512_reduce_add_ps
#define _mm512_reduce_add_ps(a) emulated::sum(a)
#undef _mm512_cvtepi8_epi32
#define _mm512_cvtepi8_epi32(a) emulated::widen_bytes(a)
#undef _mm512_cvtepi32_ps
#define _mm512_cvtepi32_ps(a) emulated::to_floats(a)
#undef _mm512_extractf32x8_ps
#define _mm512_extractf32x8_ps(a, half) \
  _mm256_castsi256_ps(simde_mm512_extracti64x4_epi64(simde_mm512_castps_si512(a), half))
#undef _mm512_madd_epi16
#define _mm512_madd_epi16(a, b) emulated::multiply_pairs<simde__m512i>(a, b)
#undef _mm512_dpbusd_epi32
#define _mm512_dpbusd_epi32(sums, a, b) emulated::add_products<simde__m512i>(sums, a, b)
#undef _mm256_dpbusd_avx_epi32
#define _mm256_dpbusd_avx_epi32(sums, a, b) emulated::add_products<__m256i>(sums, a, b)
