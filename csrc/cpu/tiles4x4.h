// Rows of 4x4 tiles, one tile to a lane: loaded as magnitudes, and stored as bytes of a mask.
#pragma once

#include "float_lanes.h"
#include "lanes.h"

namespace sparsekit::SPARSEKIT_LEVEL {
namespace {

// The bits of floats that are not negative: as integers they have the same order. The compiler turns the operators into
// the instructions of the level.
typedef int32_t TileInts __attribute__((vector_size(kLanes * 4)));
typedef float TileFloats __attribute__((vector_size(kLanes * 4)));

// The bits of the sum of floats.
inline TileInts plus(const TileInts& a, const TileInts& b) {
  return reinterpret_cast<TileInts>(reinterpret_cast<TileFloats>(a) + reinterpret_cast<TileFloats>(b));
}

inline TileInts larger(const TileInts& a, const TileInts& b) { return a > b ? a : b; }

// The fp32 bits without the sign; NaN becomes Inf.
inline TileInts magnitude(const TileInts& bits) {
  const TileInts unsigned_bits = bits & 0x7fffffff, inf = TileInts{} + 0x7f800000;
  return unsigned_bits < inf ? unsigned_bits : inf;
}

#if defined(SPARSEKIT_AVX512)

// The 4 * kLanes entries of a row: column[i] has the i-th of every four.
template <class T>
void split_columns(const T* row, __m512i (&column)[4]) {
  __m512 from[4], tiles[4], pairs[4];
  for (int i = 0; i < 4; ++i) from[i] = load_floats(row + 16 * i);
  for (int i = 0; i < 4; i += 2) {
    pairs[i] = _mm512_shuffle_f32x4(from[i / 2 * 2], from[i / 2 * 2 + 1], 0x88);
    pairs[i + 1] = _mm512_shuffle_f32x4(from[i / 2 * 2], from[i / 2 * 2 + 1], 0xdd);
  }
  for (int i = 0; i < 2; ++i) {  // tiles[i] has the tiles i, i + 4, i + 8 and i + 12
    tiles[i] = _mm512_shuffle_f32x4(pairs[i], pairs[i + 2], 0x88);
    tiles[i + 2] = _mm512_shuffle_f32x4(pairs[i], pairs[i + 2], 0xdd);
  }
  for (int i = 0; i < 4; i += 2) {
    pairs[i] = _mm512_unpacklo_ps(tiles[i], tiles[i + 1]);
    pairs[i + 1] = _mm512_unpackhi_ps(tiles[i], tiles[i + 1]);
  }
  for (int i = 0; i < 2; ++i) {
    const __m512d low = _mm512_castps_pd(pairs[i]), high = _mm512_castps_pd(pairs[i + 2]);
    column[2 * i] = _mm512_castpd_si512(_mm512_unpacklo_pd(low, high));
    column[2 * i + 1] = _mm512_castpd_si512(_mm512_unpackhi_pd(low, high));
  }
}

#elif defined(SPARSEKIT_AVX2)

// The 4 * kLanes entries of a row: column[i] has the i-th of every four.
template <class T>
void split_columns(const T* row, __m256i (&column)[4]) {
  __m256 tiles[4], pairs[4];
  for (int i = 0; i < 2; ++i) {  // tiles[i] has the tiles i and i + 4
    const __m256 low = load_floats(row + 8 * i), high = load_floats(row + 8 * i + 16);
    tiles[2 * i] = _mm256_permute2f128_ps(low, high, 0x20);
    tiles[2 * i + 1] = _mm256_permute2f128_ps(low, high, 0x31);
  }
  for (int i = 0; i < 4; i += 2) {
    pairs[i] = _mm256_unpacklo_ps(tiles[i], tiles[i + 1]);
    pairs[i + 1] = _mm256_unpackhi_ps(tiles[i], tiles[i + 1]);
  }
  for (int i = 0; i < 2; ++i) {
    const __m256d low = _mm256_castps_pd(pairs[i]), high = _mm256_castps_pd(pairs[i + 2]);
    column[2 * i] = _mm256_castpd_si256(_mm256_unpacklo_pd(low, high));
    column[2 * i + 1] = _mm256_castpd_si256(_mm256_unpackhi_pd(low, high));
  }
}

// Loads two neighboring entries to a lane: a bf16 in the upper half of a lane is already the fp32 of the same value.
inline void split_columns(const BF16* row, __m256i (&column)[4]) {
  const auto sixteen = [&](int i) {
    return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(row + i))),
                                   _mm_loadu_si128(reinterpret_cast<const __m128i*>(row + i + 16)), 1);
  };
  const __m256 a = _mm256_castsi256_ps(sixteen(0)), b = _mm256_castsi256_ps(sixteen(8));
  const __m256i low = _mm256_castps_si256(_mm256_shuffle_ps(a, b, 0x88));
  const __m256i high = _mm256_castps_si256(_mm256_shuffle_ps(a, b, 0xdd)), upper = _mm256_set1_epi32(-65536);
  column[0] = _mm256_slli_epi32(low, 16);
  column[1] = _mm256_and_si256(low, upper);
  column[2] = _mm256_slli_epi32(high, 16);
  column[3] = _mm256_and_si256(high, upper);
}

#elif defined(SPARSEKIT_NEON)

// The 4 * kLanes entries of a row: column[i] has the i-th of every four.
inline void split_columns(const float* row, int32x4_t (&column)[4]) {
  const float32x4x4_t split = vld4q_f32(row);
  for (int i = 0; i < 4; ++i) column[i] = vreinterpretq_s32_f32(split.val[i]);
}
inline void split_columns(const F16* row, int32x4_t (&column)[4]) {
  const uint16x4x4_t split = vld4_u16(reinterpret_cast<const uint16_t*>(row));
  for (int i = 0; i < 4; ++i) column[i] = vreinterpretq_s32_f32(vcvt_f32_f16(vreinterpret_f16_u16(split.val[i])));
}
inline void split_columns(const BF16* row, int32x4_t (&column)[4]) {
  const uint16x4x4_t split = vld4_u16(reinterpret_cast<const uint16_t*>(row));
  for (int i = 0; i < 4; ++i) column[i] = vreinterpretq_s32_u32(vshll_n_u16(split.val[i], 16));
}

#endif

// The magnitudes of 4 * kLanes entries of a row: column[i] has the i-th of every four.
template <class T>
void load_tiles(const T* row, TileInts (&column)[4]) {
#if !defined(SPARSEKIT_SCALAR)
  decltype(load(row)) split[4];
  split_columns(row, split);
  for (int i = 0; i < 4; ++i) column[i] = magnitude(reinterpret_cast<TileInts>(split[i]));
#else
  for (int i = 0; i < 4; ++i) {
    for (int lane = 0; lane < kLanes; ++lane) column[i][lane] = std::bit_cast<int32_t>(to_float(row[4 * lane + i]));
    column[i] = magnitude(column[i]);
  }
#endif
}

// Stores four bits of every lane as four bytes.
inline void store_tiles(bool* mask, const TileInts& bits, bool stream) {
#if !defined(SPARSEKIT_SCALAR)
  const TileInts bytes = bits * 0x00204081 & 0x01010101;  // copies bit i to bit 8 i, by 1 + 2^7 + 2^14 + 2^21
  store(mask, reinterpret_cast<decltype(load(mask))>(bytes), stream);
#else
  static_cast<void>(stream);
  for (int lane = 0; lane < kLanes; ++lane)
    for (int i = 0; i < 4; ++i) mask[4 * lane + i] = bits[lane] >> i & 1;
#endif
}

}  // namespace
}  // namespace sparsekit::SPARSEKIT_LEVEL
