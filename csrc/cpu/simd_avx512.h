// Vectors of magnitude keys at AVX-512: 16 keys of 32 bits or 32 of 16, and which of them to keep as mask bits.
#pragma once

#include "elements.h"

namespace sparsekit::SPARSEKIT_LEVEL {
namespace {

// Entries per step: one vector of mask bytes.
constexpr int kStep = 64;

struct Keys32 {
  static constexpr int kLanes = 16;
  __m512i lanes;
};
struct Keys16 {
  static constexpr int kLanes = 32;
  __m512i lanes;
};
struct Keep32 {
  __mmask16 bits;
};
struct Keep16 {
  __mmask32 bits;
};
struct Keep8 {
  __mmask64 bits;
};

inline __m512i load(const void* from) { return _mm512_loadu_si512(from); }

// A streaming store goes past the caches and needs an aligned address.
inline void store(void* to, __m512i lanes, bool stream) {
  if (stream)
    _mm512_stream_si512(static_cast<__m512i*>(to), lanes);
  else
    _mm512_storeu_si512(to, lanes);
}

inline __m512 load_floats(const float* from) { return _mm512_loadu_ps(from); }
inline __m512 load_floats(const F16* from) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
inline __m512 load_floats(const BF16* from) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

inline Keys32 magnitude_keys(__m512 score) {
  const __m512i bits = _mm512_and_si512(_mm512_castps_si512(score), _mm512_set1_epi32(0x7fffffff));
  return {_mm512_min_epi32(bits, _mm512_set1_epi32(kNanKey<float>))};
}
inline Keys32 magnitude_keys(const float* score) { return magnitude_keys(load_floats(score)); }
template <class T>
Keys16 magnitude_keys(const T* score) {
  const __m512i bits = _mm512_and_si512(load(score), _mm512_set1_epi16(0x7fff));
  return {_mm512_min_epi16(bits, _mm512_set1_epi16(kNanKey<T>))};
}
template <class T>
Keys32 magnitude_keys(const T* weight, const float* scale) {
  return magnitude_keys(_mm512_mul_ps(load_floats(weight), _mm512_loadu_ps(scale)));
}

// Lane i of a group of M takes lane (i + R) % M.
template <int M, int R>
Keys32 rotate(Keys32 key) {
  if constexpr (M == 4) return {_mm512_shuffle_epi32(key.lanes, static_cast<_MM_PERM_ENUM>(rotation4(R)))};
  return {_mm512_permutexvar_epi32(load(rotation<int32_t, 16, 8, R>.data()), key.lanes)};
}
template <int M, int R>
Keys16 rotate(Keys16 key) {
  if constexpr (M == 8) return {_mm512_alignr_epi8(key.lanes, key.lanes, 2 * R)};
  return {_mm512_ror_epi64(key.lanes, 16 * R)};
}

// Subtracts one from the lanes that a rotation by R fills from a lower index of their group.
template <int M, int R>
Keys32 minus_wrapped(Keys32 key) {
  return {_mm512_sub_epi32(key.lanes, load(wrapped<int32_t, 16, M, R>.data()))};
}
template <int M, int R>
Keys16 minus_wrapped(Keys16 key) {
  return {_mm512_sub_epi16(key.lanes, load(wrapped<int16_t, 32, M, R>.data()))};
}

// Adds one to `count` where a > b.
inline Keys32 count_greater(Keys32 count, Keys32 a, Keys32 b) {
  return {_mm512_mask_add_epi32(count.lanes, _mm512_cmpgt_epi32_mask(a.lanes, b.lanes), count.lanes,
                                _mm512_set1_epi32(1))};
}
inline Keys16 count_greater(Keys16 count, Keys16 a, Keys16 b) {
  return {_mm512_mask_add_epi16(count.lanes, _mm512_cmpgt_epi16_mask(a.lanes, b.lanes), count.lanes,
                                _mm512_set1_epi16(1))};
}
inline Keep32 less(Keys32 count, int n) { return {_mm512_cmplt_epi32_mask(count.lanes, _mm512_set1_epi32(n))}; }
inline Keep16 less(Keys16 count, int n) {
  return {_mm512_cmplt_epi16_mask(count.lanes, _mm512_set1_epi16(static_cast<int16_t>(n)))};
}

// Joins two masks to one.
inline Keep16 join(Keep32 low, Keep32 high) { return {_mm512_kunpackw(high.bits, low.bits)}; }
inline Keep8 join(Keep16 low, Keep16 high) { return {_mm512_kunpackd(high.bits, low.bits)}; }

inline uint64_t bits_of(Keep8 keep) { return keep.bits; }
inline void store_mask(bool* to, Keep8 keep, bool stream) {
  store(to, _mm512_maskz_mov_epi8(keep.bits, _mm512_set1_epi8(1)), stream);
}
inline void store_kept(void* to, const void* from, Keep32 keep, bool stream) {
  store(to, _mm512_maskz_mov_epi32(keep.bits, load(from)), stream);
}
inline void store_kept(void* to, const void* from, Keep16 keep, bool stream) {
  store(to, _mm512_maskz_mov_epi16(keep.bits, load(from)), stream);
}

// The lanes to keep of the entries from i on, as many as a vector of T holds, from bits.
template <class T, int i>
auto keep_bits(uint64_t bits) {
  if constexpr (sizeof(T) == 4)
    return Keep32{static_cast<__mmask16>(bits >> i)};
  else
    return Keep16{static_cast<__mmask32>(bits >> i)};
}

// Returns 32 bits as bytes.
inline __m256i mask_bytes(uint32_t bits) { return _mm256_maskz_mov_epi8(bits, _mm256_set1_epi8(1)); }

// Stores 64 bits as bytes.
inline void store_mask64(bool* to, uint64_t bits, bool stream) { store_mask(to, Keep8{bits}, stream); }

// The magnitudes, times the scale.
template <bool kScaled, class T>
__m512 magnitudes(const T* weight, const float* scale) {
  const __m512i bits = _mm512_and_si512(_mm512_castps_si512(load_floats(weight)), _mm512_set1_epi32(0x7fffffff));
  const __m512 score = _mm512_castsi512_ps(bits);
  if constexpr (kScaled) return _mm512_mul_ps(score, _mm512_loadu_ps(scale));
  return score;
}

// Adds the scores of the lanes to keep to `total`.
inline void add_kept(__m512 score, Keep32 keep, float* total) {
  score = _mm512_castsi512_ps(_mm512_maskz_mov_epi32(keep.bits, _mm512_castps_si512(score)));
  _mm512_storeu_ps(total, _mm512_add_ps(_mm512_loadu_ps(total), score));
}

}  // namespace
}  // namespace sparsekit::SPARSEKIT_LEVEL
