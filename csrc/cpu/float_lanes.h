// Vectors of kLanes floats, for the kernels that have one token in each lane. `multiply_add` rounds once, at the scalar
// level twice: it is for products, never for what must be the same at every level.
#pragma once

#include "elements.h"

namespace sparsekit::SPARSEKIT_LEVEL {
namespace {

#if defined(SPARSEKIT_AVX512)

constexpr int kLanes = 16;
using Floats = __m512;

inline Floats zeros() { return _mm512_setzero_ps(); }
inline Floats broadcast(float value) { return _mm512_set1_ps(value); }
inline Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
inline Floats multiply_add(Floats a, Floats b, Floats sum) { return _mm512_fmadd_ps(a, b, sum); }
inline bool any_nan(Floats a) { return _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q) != 0; }

// Four values to broadcast, each straight from memory: a shuffle would occupy a port that multiply-adds need.
using Quad = const float*;
inline Quad load_quad(const float* values) { return values; }
template <int i>
Floats broadcast(Quad quad) {
  return _mm512_set1_ps(quad[i]);
}

inline Floats load_lanes(const float* from) { return _mm512_loadu_ps(from); }
inline Floats load_lanes(const F16* from) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
inline Floats load_lanes(const BF16* from) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

inline void store_lanes(float* to, Floats lanes) { _mm512_storeu_ps(to, lanes); }
inline void store_lanes(F16* to, Floats lanes) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph(lanes, _MM_FROUND_TO_NEAREST_INT));
}
inline void store_lanes(BF16* to, Floats lanes) {
  const __m512i bits = _mm512_castps_si512(lanes);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  const __m512i result = _mm512_mask_blend_epi32(_mm512_cmp_ps_mask(lanes, lanes, _CMP_UNORD_Q), rounded, quiet);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(_mm512_srli_epi32(result, 16)));
}

// Exchanges lane j of vector i with lane i of vector j.
inline void transpose(Floats (&m)[16]) {
  Floats pairs[16], quads[16];
  for (int i = 0; i < 16; i += 2) {
    pairs[i] = _mm512_unpacklo_ps(m[i], m[i + 1]);
    pairs[i + 1] = _mm512_unpackhi_ps(m[i], m[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; ++j) {
      const __m512d a = _mm512_castps_pd(pairs[i + j]), b = _mm512_castps_pd(pairs[i + j + 2]);
      quads[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
      quads[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
    }
  for (int j = 0; j < 4; ++j) {
    const Floats low = _mm512_shuffle_f32x4(quads[j], quads[j + 4], 0x88);
    const Floats high = _mm512_shuffle_f32x4(quads[j], quads[j + 4], 0xdd);
    const Floats low2 = _mm512_shuffle_f32x4(quads[j + 8], quads[j + 12], 0x88);
    const Floats high2 = _mm512_shuffle_f32x4(quads[j + 8], quads[j + 12], 0xdd);
    m[j] = _mm512_shuffle_f32x4(low, low2, 0x88);
    m[j + 4] = _mm512_shuffle_f32x4(high, high2, 0x88);
    m[j + 8] = _mm512_shuffle_f32x4(low, low2, 0xdd);
    m[j + 12] = _mm512_shuffle_f32x4(high, high2, 0xdd);
  }
}

#elif defined(SPARSEKIT_AVX2)

constexpr int kLanes = 8;
using Floats = __m256;

inline Floats zeros() { return _mm256_setzero_ps(); }
inline Floats broadcast(float value) { return _mm256_set1_ps(value); }
inline Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
inline Floats multiply_add(Floats a, Floats b, Floats sum) { return _mm256_fmadd_ps(a, b, sum); }
inline bool any_nan(Floats a) { return _mm256_movemask_ps(_mm256_cmp_ps(a, a, _CMP_UNORD_Q)) != 0; }

// Four values to broadcast, by one load and a shuffle for each: loads are the bottleneck of these kernels.
using Quad = __m256;
inline Quad load_quad(const float* values) { return _mm256_broadcast_ps(reinterpret_cast<const __m128*>(values)); }
template <int i>
Floats broadcast(Quad quad) {
  return _mm256_permute_ps(quad, i * 0x55);
}

inline Floats load_lanes(const float* from) { return _mm256_loadu_ps(from); }
inline Floats load_lanes(const F16* from) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
inline Floats load_lanes(const BF16* from) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

inline void store_lanes(float* to, Floats lanes) { _mm256_storeu_ps(to, lanes); }
inline void store_lanes(F16* to, Floats lanes) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(lanes, _MM_FROUND_TO_NEAREST_INT));
}
inline void store_lanes(BF16* to, Floats lanes) {
  const __m256i bits = _mm256_castps_si256(lanes);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(lanes, lanes, _CMP_UNORD_Q));
  const __m256i result = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
  const __m128i low = _mm256_castsi256_si128(result), high = _mm256_extracti128_si256(result, 1);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_packus_epi32(low, high));
}

// Exchanges lane j of vector i with lane i of vector j.
inline void transpose(Floats (&m)[8]) {
  Floats pairs[8], quads[8];
  for (int i = 0; i < 8; i += 2) {
    pairs[i] = _mm256_unpacklo_ps(m[i], m[i + 1]);
    pairs[i + 1] = _mm256_unpackhi_ps(m[i], m[i + 1]);
  }
  for (int i = 0; i < 8; i += 4)
    for (int j = 0; j < 2; ++j) {
      const __m256d a = _mm256_castps_pd(pairs[i + j]), b = _mm256_castps_pd(pairs[i + j + 2]);
      quads[i + 2 * j] = _mm256_castpd_ps(_mm256_unpacklo_pd(a, b));
      quads[i + 2 * j + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(a, b));
    }
  for (int j = 0; j < 4; ++j) {
    m[j] = _mm256_permute2f128_ps(quads[j], quads[j + 4], 0x20);
    m[j + 4] = _mm256_permute2f128_ps(quads[j], quads[j + 4], 0x31);
  }
}

#else

constexpr int kLanes = 4;

#if defined(SPARSEKIT_NEON)

using Floats = float32x4_t;

inline Floats multiply_add(Floats a, Floats b, Floats sum) { return vfmaq_f32(sum, a, b); }

inline Floats load_lanes(const float* from) { return vld1q_f32(from); }
inline Floats load_lanes(const F16* from) {
  return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(reinterpret_cast<const uint16_t*>(from))));
}
inline Floats load_lanes(const BF16* from) {
  return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(reinterpret_cast<const uint16_t*>(from)), 16));
}

inline void store_lanes(float* to, Floats lanes) { vst1q_f32(to, lanes); }
inline void store_lanes(F16* to, Floats lanes) {
  vst1_u16(reinterpret_cast<uint16_t*>(to), vreinterpret_u16_f16(vcvt_f16_f32(lanes)));
}
inline void store_lanes(BF16* to, Floats lanes) {
  const uint32x4_t bits = vreinterpretq_u32_f32(lanes), odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  const uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
  const uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x400000));
  vst1_u16(reinterpret_cast<uint16_t*>(to), vshrn_n_u32(vbslq_u32(vceqq_f32(lanes, lanes), rounded, quiet), 16));
}

#else

typedef float Floats __attribute__((vector_size(4 * kLanes)));

inline Floats multiply_add(Floats a, Floats b, Floats sum) { return sum + a * b; }

template <class T>
Floats load_lanes(const T* from) {
  return Floats{to_float(from[0]), to_float(from[1]), to_float(from[2]), to_float(from[3])};
}
template <class T>
void store_lanes(T* to, Floats lanes) {
  for (int i = 0; i < kLanes; ++i) to[i] = from_float<T>(lanes[i]);
}

#endif

inline Floats zeros() { return Floats{}; }
inline Floats broadcast(float value) { return Floats{value, value, value, value}; }
inline Floats add(Floats a, Floats b) { return a + b; }
inline bool any_nan(Floats a) {
  bool found = false;
  for (int i = 0; i < kLanes; ++i) found |= std::isnan(a[i]);
  return found;
}

using Quad = const float*;
inline Quad load_quad(const float* values) { return values; }
template <int i>
Floats broadcast(Quad quad) {
  return broadcast(quad[i]);
}

// Exchanges lane j of vector i with lane i of vector j.
inline void transpose(Floats (&m)[4]) {
  const Floats before[4] = {m[0], m[1], m[2], m[3]};
  for (int i = 0; i < 4; ++i) m[i] = Floats{before[0][i], before[1][i], before[2][i], before[3][i]};
}

#endif

}  // namespace
}  // namespace sparsekit::SPARSEKIT_LEVEL
