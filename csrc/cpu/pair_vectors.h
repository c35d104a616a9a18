// Vectors whose lanes are a few tokens times two inputs: what the product by input pairs is written in.
#pragma once

#include "float_lanes.h"

namespace sparsekit::SPARSEKIT_LEVEL {
namespace {

// The kept positions of a group of four, by the number of its pattern; and that number by the four bits.
constexpr int kPatterns = 6;
constexpr uint8_t kFirstKept[kPatterns] = {0, 0, 0, 1, 1, 2}, kSecondKept[kPatterns] = {1, 2, 3, 2, 3, 3};
constexpr uint8_t kPatternOf[16] = {0, 0, 0, 0, 0, 1, 3, 0, 0, 2, 4, 0, 5, 0, 0, 0};

// Two floats, repeated.
inline Floats broadcast_pair(const float* two) {
#if defined(SPARSEKIT_AVX512)
  return _mm512_castpd_ps(_mm512_set1_pd(*reinterpret_cast<const double __attribute__((may_alias, aligned(4)))*>(two)));
#elif defined(SPARSEKIT_AVX2)
  return _mm256_castpd_ps(_mm256_broadcast_sd(reinterpret_cast<const double*>(two)));
#else
  float lanes[kLanes];
  for (int i = 0; i < kLanes; ++i) lanes[i] = two[i % 2];
  return load_lanes(lanes);
#endif
}

// The sums of neighboring lanes, those of `a` first.
inline Floats add_neighbors(Floats a, Floats b) {
#if defined(SPARSEKIT_AVX512)
  const __m512i even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  const __m512i odd = _mm512_set_epi32(31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
  return _mm512_add_ps(_mm512_permutex2var_ps(a, even, b), _mm512_permutex2var_ps(a, odd, b));
#elif defined(SPARSEKIT_AVX2)
  return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(_mm256_hadd_ps(a, b)), 0xd8));
#else
  float from[2 * kLanes], to[kLanes];
  store_lanes(from, a);
  store_lanes(from + kLanes, b);
  for (int i = 0; i < kLanes; ++i) to[i] = from[2 * i] + from[2 * i + 1];
  return load_lanes(to);
#endif
}

// How pairs of inputs are multiplied; Weight is what the weights are converted to beforehand.
template <class T>
struct PairVector {
  using Vector = Floats;
  using Weight = float;
  static constexpr int kTokens = kLanes / 2;

  static Floats zero() { return zeros(); }
  static Floats weights(const float* two) { return broadcast_pair(two); }
  static Floats inputs(const char* from) { return load_lanes(reinterpret_cast<const float*>(from)); }
  static Floats madd(Floats weights, Floats inputs, Floats sums) { return multiply_add(weights, inputs, sums); }

  // Makes sums [vector of tokens][token][2] into [token], in place, for `vectors` vectors; returns how many lanes remain.
  static int64_t finish(const float* sums, int vectors, float* to) {
    for (int v = 0; v < vectors; v += 2) {
      const Floats second = v + 1 < vectors ? load_lanes(sums + (v + 1) * kLanes) : zeros();
      store_lanes(to + v / 2 * kLanes, add_neighbors(load_lanes(sums + v * kLanes), second));
    }
    return (vectors + 1) / 2 * kLanes;
  }

  // Writes the inputs of one token for all patterns, `stride` bytes apart. Returns whether they are finite.
  static bool expand(const T* x, int64_t count, char* to, int64_t stride) {
    float four[4] = {};
    for (int64_t i = 0; i < count; ++i) four[i] = to_float(x[i]);
    for (int pattern = 0; pattern < kPatterns; ++pattern) {
      const float two[2] = {four[kFirstKept[pattern]], four[kSecondKept[pattern]]};
      std::memcpy(to + pattern * stride, two, sizeof two);
    }
    return !std::isnan((four[0] + four[1]) * 0.0f + (four[2] + four[3]) * 0.0f);
  }
};

#if defined(SPARSEKIT_AVX512_BF16)
// 16 tokens times two bfloat16, which one instruction multiplies and adds.
template <>
struct PairVector<BF16> {
  using Vector = __m512i;
  using Weight = BF16;
  static constexpr int kTokens = 16;

  static __m512 zero() { return _mm512_setzero_ps(); }
  static __m512i weights(const BF16* two) {
    int32_t both;
    std::memcpy(&both, two, sizeof both);
    return _mm512_set1_epi32(both);
  }
  static __m512i inputs(const char* from) { return _mm512_loadu_si512(from); }
  static __m512 madd(__m512i weights, __m512i inputs, __m512 sums) {
    return _mm512_dpbf16_ps(sums, (__m512bh)weights, (__m512bh)inputs);
  }
  static int64_t finish(const float* sums, int vectors, float* to) {
    for (int v = 0; v < vectors; ++v) store_lanes(to + v * kLanes, load_lanes(sums + v * kLanes));
    return vectors * kLanes;
  }
  static bool expand(const BF16* x, int64_t count, char* to, int64_t stride) {
    BF16 four[4] = {};
    std::copy_n(x, count, four);
    for (int pattern = 0; pattern < kPatterns; ++pattern) {
      const BF16 two[2] = {four[kFirstKept[pattern]], four[kSecondKept[pattern]]};
      std::memcpy(to + pattern * stride, two, sizeof two);
    }
    return all_finite(four, 4);
  }
};
#endif

}  // namespace
}  // namespace sparsekit::SPARSEKIT_LEVEL
