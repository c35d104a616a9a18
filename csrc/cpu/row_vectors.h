// What the kernels for few tokens share: the tokens in chunks, and vectors of weights.
//
// A row vector is kCols columns of one weight row, expanded in a register from their kCols / 2 kept values. Two of
// every four columns are kept, so nothing has to be counted. RowVector<T>::Input is the type that x is converted to
// beforehand.
#pragma once

#include "float_lanes.h"

namespace sparsekit::SPARSEKIT_LEVEL {
namespace {

#if defined(SPARSEKIT_AVX512)
constexpr int kMaxTokens = 6;
#else
constexpr int kMaxTokens = 4;
#endif

// Divides the tokens into chunks whose sums fit the registers; the sizes of chunks differ by at most one.
struct TokenChunks {
  int64_t tokens, count;

  explicit TokenChunks(int64_t tokens) : tokens(tokens), count((tokens + kMaxTokens - 1) / kMaxTokens) {}
  int64_t begin(int64_t chunk) const { return tokens * chunk / count; }
  int64_t size(int64_t chunk) const { return begin(chunk + 1) - begin(chunk); }
  int64_t largest() const { return (tokens + count - 1) / count; }
};

// For every byte of the bitmask, the byte shuffle that moves four values of kBytes bytes to the lanes whose bits are
// set. A lane has kLane bytes; a value goes to its high end, and all other bytes are zero.
template <int kBytes, int kLane>
struct Shuffles {
  alignas(32) uint8_t control[256][8 * kLane];

  constexpr Shuffles() : control{} {
    for (int bits = 0; bits < 256; ++bits)
      for (int lane = 0, next = 0; lane < 8; ++lane) {
        const bool kept = bits >> lane & 1;
        for (int i = 0; i < kLane; ++i) {
          const int byte = i - (kLane - kBytes);
          control[bits][lane * kLane + i] = kept && byte >= 0 && next < 4 ? next * kBytes + byte : 0x80;
        }
        next += kept;
      }
  }
};

#if defined(SPARSEKIT_AVX512)

struct FloatRowVector {
  using Input = float;
  static constexpr int kCols = 16;

  template <class T>
  static float input(T x) {
    return to_float(x);
  }
  static __m512 zero() { return _mm512_setzero_ps(); }
  template <class T>
  static __m512 load(const T* x) {
    return load_lanes(x);
  }
  static __m512 madd(__m512 weights, __m512 inputs, __m512 sums) { return _mm512_fmadd_ps(weights, inputs, sums); }
  static float total(__m512 sums) { return _mm512_reduce_add_ps(sums); }
  static __m512 expand_floats(__m256 kept, const uint8_t* bits) {
    uint16_t mask;
    std::memcpy(&mask, bits, sizeof mask);
    return _mm512_maskz_expand_ps(mask, _mm512_castps256_ps512(kept));
  }
};

template <class T>
struct RowVector;

template <>
struct RowVector<float> : FloatRowVector {
  static __m512 expand(const float* values, const uint8_t* bits) {
    return expand_floats(_mm256_loadu_ps(values), bits);
  }
};

template <>
struct RowVector<F16> : FloatRowVector {
  static __m512 expand(const F16* values, const uint8_t* bits) {
    return expand_floats(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values))), bits);
  }
};

struct Bf16FloatRowVector : FloatRowVector {
  static __m512 expand(const BF16* values, const uint8_t* bits) {
    const __m256i kept = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values)));
    return expand_floats(_mm256_castsi256_ps(_mm256_slli_epi32(kept, 16)), bits);
  }
};

#if defined(SPARSEKIT_AVX512_BF16)
template <>
struct RowVector<BF16> {
  using Input = BF16;
  static constexpr int kCols = 32;

  static BF16 input(BF16 x) { return x; }
  static __m512 zero() { return _mm512_setzero_ps(); }
  static __m512i load(const BF16* x) { return _mm512_loadu_si512(x); }
  static __m512 madd(__m512i weights, __m512i inputs, __m512 sums) {
    return _mm512_dpbf16_ps(sums, (__m512bh)weights, (__m512bh)inputs);
  }
  static float total(__m512 sums) { return _mm512_reduce_add_ps(sums); }
  static __m512i expand(const BF16* values, const uint8_t* bits) {
    uint32_t mask;
    std::memcpy(&mask, bits, sizeof mask);
    const __m256i kept = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values));
    return _mm512_maskz_expand_epi16(mask, _mm512_castsi256_si512(kept));
  }
};
#else
template <>
struct RowVector<BF16> : Bf16FloatRowVector {};
#endif

#elif defined(SPARSEKIT_AVX2)

inline __m256i load_control(const uint8_t (&bytes)[32]) {
  return _mm256_load_si256(reinterpret_cast<const __m256i*>(bytes));
}
inline __m128i load_control(const uint8_t (&bytes)[16]) { return _mm_load_si128(reinterpret_cast<const __m128i*>(bytes)); }

struct FloatRowVector {
  using Input = float;
  static constexpr int kCols = 8;

  template <class T>
  static float input(T x) {
    return to_float(x);
  }
  static __m256 zero() { return _mm256_setzero_ps(); }
  template <class T>
  static __m256 load(const T* x) {
    return load_lanes(x);
  }
  static __m256 madd(__m256 weights, __m256 inputs, __m256 sums) { return _mm256_fmadd_ps(weights, inputs, sums); }
  static float total(__m256 sums) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
  }
};

template <class T>
struct RowVector;

template <>
struct RowVector<float> : FloatRowVector {
  static __m256 expand(const float* values, const uint8_t* bits) {
    static constexpr Shuffles<4, 4> kShuffles;
    const __m256i kept = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values)));
    return _mm256_castsi256_ps(_mm256_shuffle_epi8(kept, load_control(kShuffles.control[*bits])));
  }
};

template <>
struct RowVector<BF16> : FloatRowVector {
  static __m256 expand(const BF16* values, const uint8_t* bits) {
    static constexpr Shuffles<2, 4> kShuffles;  // to the upper half of fp32 lanes, which also converts them
    const __m256i kept = _mm256_broadcastq_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(values)));
    return _mm256_castsi256_ps(_mm256_shuffle_epi8(kept, load_control(kShuffles.control[*bits])));
  }
};

template <>
struct RowVector<F16> : FloatRowVector {
  static __m256 expand(const F16* values, const uint8_t* bits) {
    static constexpr Shuffles<2, 2> kShuffles;
    const __m128i kept = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(values));
    return _mm256_cvtph_ps(_mm_shuffle_epi8(kept, load_control(kShuffles.control[*bits])));
  }
};

#else

template <class T>
struct RowVector {
  using Input = float;
  static constexpr int kCols = 8;
  struct Lanes {
    Floats low, high;
  };

  static float input(T x) { return to_float(x); }
  static Lanes zero() { return {zeros(), zeros()}; }
  template <class From>
  static Lanes load(const From* x) {
    return {load_lanes(x), load_lanes(x + 4)};
  }
  static Lanes madd(const Lanes& weights, const Lanes& inputs, const Lanes& sums) {
    return {multiply_add(weights.low, inputs.low, sums.low), multiply_add(weights.high, inputs.high, sums.high)};
  }
  static float total(const Lanes& sums) {
    const Floats four = add(sums.low, sums.high);
    return (four[0] + four[2]) + (four[1] + four[3]);
  }
  static Lanes expand(const T* values, const uint8_t* bits) {
#if defined(SPARSEKIT_NEON)
    static constexpr Shuffles<4, 4> kShuffles;
    const Floats kept = load_lanes(values);
    const auto half = [&](int first) {
      const uint8x16_t from = vld1q_u8(kShuffles.control[*bits] + first);
      return vreinterpretq_f32_u8(vqtbl1q_u8(vreinterpretq_u8_f32(kept), from));
    };
    return {half(0), half(16)};
#else
    float weights[kCols];
    for (int lane = 0, next = 0; lane < kCols; ++lane) {
      const int kept = *bits >> lane & 1;
      weights[lane] = kept ? to_float(values[next]) : 0.0f;
      next = std::min(next + kept, kCols / 2 - 1);
    }
    return {load_lanes(weights), load_lanes(weights + 4)};
#endif
  }
};

#endif

}  // namespace
}  // namespace sparsekit::SPARSEKIT_LEVEL
