// The vectors that a tile of a quantized 2:4 weight is multiplied in: parts of kPartRows rows, of which a step takes 16
// columns. The 8 kept values of a row are 8 neighboring bytes, and the inputs they belong to are picked from the 16
// inputs of the step by a byte shuffle.
#pragma once

#include "elements.h"

namespace sparsekit::SPARSEKIT_LEVEL {
namespace {

constexpr int kTileRows = 8, kTileCols = 64, kSteps = 4, kStepCols = 16;
constexpr int kIndexAt = 16, kCodesAt = 80;  // after 8 scales of 16 bits, and the positions

// The rows as they are stored.
constexpr int kStoredRow[kTileRows] = {0, 1, 4, 5, 2, 3, 6, 7};

constexpr int tile_bytes(QuantType type) { return kCodesAt + (type == QuantType::Int8 ? 256 : 128); }

// The integers that codes of 4 bits stand for: int4 itself, and the levels of nf4 in steps of 1/127.
alignas(16) constexpr int8_t kInt4[16] = {0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1};
alignas(16) constexpr int8_t kNf4[16] = {-127, -88, -67, -50, -36, -23, -12, 0, 10, 20, 31, 43, 56, 71, 92, 127};
constexpr const int8_t* table_of(QuantType type) { return type == QuantType::Int4 ? kInt4 : kNf4; }

// What is added to every input: vpdpbusd multiplies unsigned bytes by signed ones.
#if defined(SPARSEKIT_VNNI)
constexpr int kInputOffset = 128;
#else
constexpr int kInputOffset = 0;
#endif

#if defined(SPARSEKIT_AVX512) || defined(SPARSEKIT_AVX2)

inline __m128i bytes128(const void* from) { return _mm_loadu_si128(static_cast<const __m128i*>(from)); }
inline __m256i bytes256(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }

#if defined(SPARSEKIT_AVX512)

using Bytes = __m512i;
using Totals = __m512;
constexpr int kTileParts = 1;  // all 8 rows

inline Totals zero_totals() { return _mm512_setzero_ps(); }

inline Bytes zero_sums() { return _mm512_setzero_si512(); }
inline Bytes load_index(const uint8_t* tile, int) { return _mm512_loadu_si512(tile + kIndexAt); }
template <int step>
Bytes select(Bytes index) {
  const Bytes in_group = _mm512_and_si512(_mm512_srli_epi16(index, 2 * step), _mm512_set1_epi8(3));
  return _mm512_or_si512(in_group, _mm512_set1_epi64(0x0c0c080804040000));
}
template <QuantType type>
Bytes load_codes(const uint8_t* tile, int, int step) {
  if constexpr (type == QuantType::Int8) return _mm512_loadu_si512(tile + kCodesAt + 64 * step);
  const Bytes both = _mm512_loadu_si512(tile + kCodesAt + 64 * (step / 2));
  return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(bytes128(table_of(type))),
                             _mm512_and_si512(step % 2 ? _mm512_srli_epi16(both, 4) : both, _mm512_set1_epi8(15)));
}
inline Bytes pick(const int8_t* inputs, Bytes selected) {
  return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(bytes128(inputs)), selected);
}
// The scales of all rows, for both lanes of each.
inline Totals scales_of(const uint8_t* tile, int) {
  const __m512i twice = _mm512_set_epi32(7, 7, 6, 6, 3, 3, 2, 2, 5, 5, 4, 4, 1, 1, 0, 0);
  const __m256i scales = _mm256_slli_epi32(_mm256_cvtepu16_epi32(bytes128(tile)), 16);
  return _mm512_castsi512_ps(_mm512_permutexvar_epi32(twice, _mm512_castsi256_si512(scales)));
}
inline Totals add_scaled(Totals totals, Bytes sums, Totals scales) {
  return _mm512_add_ps(totals, _mm512_mul_ps(_mm512_cvtepi32_ps(sums), scales));
}
// Adds both lanes of every row, and stores the rows in order.
inline void store_rows(float* y, const Totals (&totals)[kTileParts]) {
  const __m256 upper = _mm512_extractf32x8_ps(totals[0], 1);
  _mm256_storeu_ps(y, _mm256_hadd_ps(_mm512_castps512_ps256(totals[0]), upper));
}

#if defined(SPARSEKIT_VNNI)
struct Products {
  Bytes codes;
  explicit Products(Bytes codes) : codes(codes) {}
  Bytes add_to(Bytes sums, Bytes inputs) const { return _mm512_dpbusd_epi32(sums, inputs, codes); }
};
inline Bytes subtract(Bytes a, Bytes b) { return _mm512_sub_epi32(a, b); }
inline Bytes offsets() { return _mm512_set1_epi8(-128); }
#else
// Products of 16 bits of two numbers of 8, one of which is unsigned: the sign of a code goes to its input. Two products
// of at most 127 * 127 fit.
struct Products {
  Bytes magnitude;
  __mmask64 negative;
  explicit Products(Bytes codes) : magnitude(_mm512_abs_epi8(codes)), negative(_mm512_movepi8_mask(codes)) {}
  Bytes add_to(Bytes sums, Bytes inputs) const {
    const Bytes turned = _mm512_mask_sub_epi8(inputs, negative, _mm512_setzero_si512(), inputs);
    const Bytes pairs = _mm512_maddubs_epi16(magnitude, turned);
    return _mm512_add_epi32(sums, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
  }
};
#endif

#else

using Bytes = __m256i;
using Totals = __m256;
constexpr int kTileParts = 2;  // of 4 rows

inline Totals zero_totals() { return _mm256_setzero_ps(); }

inline Bytes zero_sums() { return _mm256_setzero_si256(); }
inline Bytes load_index(const uint8_t* tile, int part) { return bytes256(tile + kIndexAt + 32 * part); }
template <int step>
Bytes select(Bytes index) {
  const Bytes in_group = _mm256_and_si256(_mm256_srli_epi16(index, 2 * step), _mm256_set1_epi8(3));
  return _mm256_or_si256(in_group, _mm256_set1_epi64x(0x0c0c080804040000));
}
template <QuantType type>
Bytes load_codes(const uint8_t* tile, int part, int step) {
  if constexpr (type == QuantType::Int8) return bytes256(tile + kCodesAt + 64 * step + 32 * part);
  const Bytes both = bytes256(tile + kCodesAt + 64 * (step / 2) + 32 * part);
  const Bytes codes = _mm256_and_si256(step % 2 ? _mm256_srli_epi16(both, 4) : both, _mm256_set1_epi8(15));
  return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(bytes128(table_of(type))), codes);
}
inline Bytes pick(const int8_t* inputs, Bytes selected) {
  return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(bytes128(inputs)), selected);
}
// The scales of the rows of a part, for both lanes of each.
inline Totals scales_of(const uint8_t* tile, int part) {
  const __m256i twice = part ? _mm256_set_epi32(7, 7, 6, 6, 3, 3, 2, 2) : _mm256_set_epi32(5, 5, 4, 4, 1, 1, 0, 0);
  const __m256i scales = _mm256_slli_epi32(_mm256_cvtepu16_epi32(bytes128(tile)), 16);
  return _mm256_castsi256_ps(_mm256_permutevar8x32_epi32(scales, twice));
}
inline Totals add_scaled(Totals totals, Bytes sums, Totals scales) {
  return _mm256_add_ps(totals, _mm256_mul_ps(_mm256_cvtepi32_ps(sums), scales));
}
// Adds both lanes of every row, and stores the rows in order.
inline void store_rows(float* y, const Totals (&totals)[kTileParts]) {
  _mm256_storeu_ps(y, _mm256_hadd_ps(totals[0], totals[1]));
}

#if defined(SPARSEKIT_VNNI)
struct Products {
  Bytes codes;
  explicit Products(Bytes codes) : codes(codes) {}
  Bytes add_to(Bytes sums, Bytes inputs) const { return _mm256_dpbusd_avx_epi32(sums, inputs, codes); }
};
inline Bytes subtract(Bytes a, Bytes b) { return _mm256_sub_epi32(a, b); }
inline Bytes offsets() { return _mm256_set1_epi8(-128); }
#else
struct Products {
  Bytes codes, magnitude;
  explicit Products(Bytes codes) : codes(codes), magnitude(_mm256_abs_epi8(codes)) {}
  Bytes add_to(Bytes sums, Bytes inputs) const {
    const Bytes pairs = _mm256_maddubs_epi16(magnitude, _mm256_sign_epi8(inputs, codes));
    return _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
};
#endif

#endif

#endif

}  // namespace
}  // namespace sparsekit::SPARSEKIT_LEVEL
