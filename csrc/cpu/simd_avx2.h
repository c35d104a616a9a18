// Vectors of magnitude keys at AVX2: 8 keys of 32 bits or 16 of 16, and which of them to keep as lanes of ones.
#pragma once

#include "elements.h"

namespace sparsekit::SPARSEKIT_LEVEL {
namespace {

// Entries per step: one vector of mask bytes.
constexpr int kStep = 32;

struct Keys32 {
  static constexpr int kLanes = 8;
  __m256i lanes;
};
struct Keys16 {
  static constexpr int kLanes = 16;
  __m256i lanes;
};
struct Keep32 {
  __m256i lanes;
};
struct Keep16 {
  __m256i lanes;
};
struct Keep8 {
  __m256i lanes;
};

inline __m256i load(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }

// A streaming store goes past the caches and needs an aligned address.
inline void store(void* to, __m256i lanes, bool stream) {
  if (stream)
    _mm256_stream_si256(static_cast<__m256i*>(to), lanes);
  else
    _mm256_storeu_si256(static_cast<__m256i*>(to), lanes);
}

inline __m256 load_floats(const float* from) { return _mm256_loadu_ps(from); }
inline __m256 load_floats(const F16* from) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
inline __m256 load_floats(const BF16* from) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

inline Keys32 magnitude_keys(__m256 score) {
  const __m256i bits = _mm256_and_si256(_mm256_castps_si256(score), _mm256_set1_epi32(0x7fffffff));
  return {_mm256_min_epi32(bits, _mm256_set1_epi32(kNanKey<float>))};
}
inline Keys32 magnitude_keys(const float* score) { return magnitude_keys(load_floats(score)); }
template <class T>
Keys16 magnitude_keys(const T* score) {
  const __m256i bits = _mm256_and_si256(load(score), _mm256_set1_epi16(0x7fff));
  return {_mm256_min_epi16(bits, _mm256_set1_epi16(kNanKey<T>))};
}
template <class T>
Keys32 magnitude_keys(const T* weight, const float* scale) {
  return magnitude_keys(_mm256_mul_ps(load_floats(weight), _mm256_loadu_ps(scale)));
}

// Lane i of a group of M takes lane (i + R) % M.
template <int M, int R>
Keys32 rotate(Keys32 key) {
  if constexpr (M == 4) return {_mm256_shuffle_epi32(key.lanes, rotation4(R))};
  return {_mm256_permutevar8x32_epi32(key.lanes, load(rotation<int32_t, 8, 8, R>.data()))};
}
template <int M, int R>
Keys16 rotate(Keys16 key) {
  if constexpr (M == 8) return {_mm256_alignr_epi8(key.lanes, key.lanes, 2 * R)};
  return {_mm256_shuffle_epi8(key.lanes, load(rotation_bytes<32, R>.data()))};
}

// Subtracts one from the lanes that a rotation by R fills from a lower index of their group.
template <int M, int R>
Keys32 minus_wrapped(Keys32 key) {
  return {_mm256_sub_epi32(key.lanes, load(wrapped<int32_t, 8, M, R>.data()))};
}
template <int M, int R>
Keys16 minus_wrapped(Keys16 key) {
  return {_mm256_sub_epi16(key.lanes, load(wrapped<int16_t, 16, M, R>.data()))};
}

// Adds one to `count` where a > b.
inline Keys32 count_greater(Keys32 count, Keys32 a, Keys32 b) {
  return {_mm256_sub_epi32(count.lanes, _mm256_cmpgt_epi32(a.lanes, b.lanes))};
}
inline Keys16 count_greater(Keys16 count, Keys16 a, Keys16 b) {
  return {_mm256_sub_epi16(count.lanes, _mm256_cmpgt_epi16(a.lanes, b.lanes))};
}
inline Keep32 less(Keys32 count, int n) { return {_mm256_cmpgt_epi32(_mm256_set1_epi32(n), count.lanes)}; }
inline Keep16 less(Keys16 count, int n) {
  return {_mm256_cmpgt_epi16(_mm256_set1_epi16(static_cast<int16_t>(n)), count.lanes)};
}

// Joins two vectors of lanes to one whose lanes have half the width.
inline Keep16 join(Keep32 low, Keep32 high) {
  return {_mm256_permute4x64_epi64(_mm256_packs_epi32(low.lanes, high.lanes), 0xd8)};
}
inline Keep8 join(Keep16 low, Keep16 high) {
  return {_mm256_permute4x64_epi64(_mm256_packs_epi16(low.lanes, high.lanes), 0xd8)};
}

inline uint32_t bits_of(Keep8 keep) { return static_cast<uint32_t>(_mm256_movemask_epi8(keep.lanes)); }
inline void store_mask(bool* to, Keep8 keep, bool stream) {
  store(to, _mm256_and_si256(keep.lanes, _mm256_set1_epi8(1)), stream);
}
template <class Keep>
void store_kept(void* to, const void* from, Keep keep, bool stream) {
  store(to, _mm256_and_si256(load(from), keep.lanes), stream);
}

// The lanes to keep of the entries from i on, as many as a vector of T holds, from bits.
template <class T, int i>
auto keep_bits(uint64_t bits) {
  if constexpr (sizeof(T) == 4) {
    const __m256i bit = _mm256_slli_epi32(_mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128), i % 32);
    const __m256i half = _mm256_set1_epi32(static_cast<int>(bits >> i / 32 * 32));
    return Keep32{_mm256_cmpeq_epi32(_mm256_and_si256(half, bit), bit)};
  } else {
    const __m256i bit = _mm256_setr_epi16(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, -32768);
    const __m256i quarter = _mm256_set1_epi16(static_cast<int16_t>(bits >> i));
    return Keep16{_mm256_cmpeq_epi16(_mm256_and_si256(quarter, bit), bit)};
  }
}

// Returns 32 bits as bytes.
inline __m256i mask_bytes(uint32_t bits) {
  const __m256i byte = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
  const __m256i bit = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201));
  const __m256i set = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32(static_cast<int>(bits)), byte), bit);
  return _mm256_min_epu8(set, _mm256_set1_epi8(1));
}

// Stores 64 bits as bytes.
inline void store_mask64(bool* to, uint64_t bits, bool stream) {
  store(to, mask_bytes(static_cast<uint32_t>(bits)), stream);
  store(to + 32, mask_bytes(static_cast<uint32_t>(bits >> 32)), stream);
}

// The magnitudes, times the scale.
template <bool kScaled, class T>
__m256 magnitudes(const T* weight, const float* scale) {
  const __m256 score = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), load_floats(weight));
  if constexpr (kScaled) return _mm256_mul_ps(score, _mm256_loadu_ps(scale));
  return score;
}

// Adds the scores of the lanes to keep to `total`.
inline void add_kept(__m256 score, Keep32 keep, float* total) {
  score = _mm256_and_ps(score, _mm256_castsi256_ps(keep.lanes));
  _mm256_storeu_ps(total, _mm256_add_ps(_mm256_loadu_ps(total), score));
}

}  // namespace
}  // namespace sparsekit::SPARSEKIT_LEVEL
