// The kept values of a quantized 2:4 weight as floats: a code, or the level that it stands for, times its scale.
#pragma once

#include "float_lanes.h"

namespace sparsekit::SPARSEKIT_LEVEL {
namespace {

// What the 16 codes of 4 bits stand for; those of nf4 are the levels of QLoRA, as in ops/quant24.py.
constexpr float kInt4Levels[16] = {0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1};
constexpr float kNf4Levels[16] = {
    -1.0f,         -0.6961928009986877f,  -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f,
    -0.18477343022823334f, -0.09105003625154495f, 0.0f,         0.07958029955625534f,  0.16093020141124725f,
    0.24611230194568634f,  0.33791524171829224f,  0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f,
    1.0f};

// Writes table[code] for 16 codes, two in a byte.
#if defined(SPARSEKIT_AVX512) || defined(SPARSEKIT_AVX2)
inline __m128i sixteen_codes(const uint8_t* codes) {
  const __m128i pairs = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes)), low = _mm_set1_epi8(15);
  return _mm_unpacklo_epi8(_mm_and_si128(pairs, low), _mm_and_si128(_mm_srli_epi16(pairs, 4), low));
}
#endif
#if defined(SPARSEKIT_AVX512)
inline void look_up16(const uint8_t* codes, const float* table, float* to) {
  const __m512i index = _mm512_cvtepi8_epi32(sixteen_codes(codes));
  _mm512_storeu_ps(to, _mm512_permutexvar_ps(index, _mm512_loadu_ps(table)));
}
#elif defined(SPARSEKIT_AVX2)
inline void look_up16(const uint8_t* codes, const float* table, float* to) {
  const __m128i sixteen = sixteen_codes(codes);
  const __m256 low = _mm256_loadu_ps(table), high = _mm256_loadu_ps(table + 8);
  const auto eight = [&](__m128i bytes, float* at) __attribute__((always_inline)) {
    const __m256i index = _mm256_cvtepu8_epi32(bytes);
    const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));  // the code's highest bit as a sign
    const __m256 value =
        _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, index), _mm256_permutevar8x32_ps(high, index), upper);
    _mm256_storeu_ps(at, value);
  };
  eight(sixteen, to);
  eight(_mm_unpackhi_epi64(sixteen, sixteen), to + 8);
}
#else
inline void look_up16(const uint8_t* codes, const float* table, float* to) {
  for (int i = 0; i < 16; ++i) to[i] = table[codes[i / 2] >> i % 2 * 4 & 15];
}
#endif

// The kept values of a row that share the scale of group g; the last group has those of the tail as well.
struct ValueRange {
  int64_t begin, end;

  ValueRange(int64_t g, int64_t cols, int64_t group)
      : begin(g * group / 2), end((g + 1) * group < cols ? begin + group / 2 : 2 * (cols / 4) + cols % 4) {}
};

// Writes the kept values of one row.
inline void dequantize_row(const Linear24qArgs& a, int64_t row, float* to) {
  const int64_t kept = 2 * (a.cols / 4) + a.cols % 4, groups = (a.cols + a.group - 1) / a.group;
  for (int64_t g = 0; g < groups; ++g) {
    const float scale = to_float(BF16{a.scales[row * groups + g]});
    const auto [begin, end] = ValueRange(g, a.cols, a.group);
    if (a.type == QuantType::Int8) {
      const int8_t* codes = reinterpret_cast<const int8_t*>(a.values) + row * kept;
      for (int64_t i = begin; i < end; ++i) to[i] = static_cast<float>(codes[i]) * scale;
      continue;
    }
    const uint8_t* codes = a.values + row * ((kept + 1) / 2);
    const float* levels = a.type == QuantType::Int4 ? kInt4Levels : kNf4Levels;
    float table[16];
    for (int i = 0; i < 16; ++i) table[i] = levels[i] * scale;
    int64_t i = begin;
    for (; i + 16 <= end; i += 16) look_up16(codes + i / 2, table, to + i);
    for (; i < end; ++i) to[i] = table[codes[i / 2] >> i % 2 * 4 & 15];
  }
}

}  // namespace
}  // namespace sparsekit::SPARSEKIT_LEVEL
