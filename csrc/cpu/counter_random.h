// Random numbers by counter, and exp and log of float32 products and sums that are each rounded once, so that every
// device draws the same. sparsekit/ops/_counter_random.py defines them. A vector has the compiler's own operators.
#pragma once

#include "simd_level_headers.h"

namespace sparsekit::SPARSEKIT_LEVEL {
namespace {

#if defined(SPARSEKIT_AVX512)
constexpr int kDrawn = 16;  // lanes
#elif defined(SPARSEKIT_AVX2)
constexpr int kDrawn = 8;
#else
constexpr int kDrawn = 4;
#endif

template <class T>
using Drawn [[gnu::vector_size(kDrawn * sizeof(T))]] = T;
using DrawnFloats = Drawn<float>;
using DrawnInts = Drawn<int32_t>;
using DrawnWords = Drawn<uint32_t>;

// Words times a constant: the upper and the lower words of the products.
inline void multiply_words(DrawnWords a, uint32_t b, DrawnWords& high, DrawnWords& low) {
#if defined(SPARSEKIT_AVX512)
  const __m512i factor = _mm512_set1_epi64(b), even = _mm512_mul_epu32(__m512i(a), factor);
  const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64(__m512i(a), 32), factor);
  low = DrawnWords(_mm512_mask_blend_epi32(0xAAAA, even, _mm512_slli_epi64(odd, 32)));
  high = DrawnWords(_mm512_mask_blend_epi32(0xAAAA, _mm512_srli_epi64(even, 32), odd));
#elif defined(SPARSEKIT_AVX2)
  const __m256i factor = _mm256_set1_epi64x(b), even = _mm256_mul_epu32(__m256i(a), factor);
  const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64(__m256i(a), 32), factor);
  low = DrawnWords(_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA));
  high = DrawnWords(_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA));
#else
  for (int lane = 0; lane < kDrawn; ++lane) {
    const uint64_t product = uint64_t{b} * a[lane];
    low[lane] = static_cast<uint32_t>(product);
    high[lane] = static_cast<uint32_t>(product >> 32);
  }
#endif
}

// Four random words for each of kDrawn counters (Philox4x32-10, Salmon et al., 2011).
inline void random_words(uint64_t first, uint64_t stride, uint64_t seed, uint64_t offset, DrawnWords (&words)[4]) {
  for (int lane = 0; lane < kDrawn; ++lane) {
    words[0][lane] = static_cast<uint32_t>(first + lane * stride);
    words[1][lane] = static_cast<uint32_t>((first + lane * stride) >> 32);
  }
  words[2] = DrawnWords{} + static_cast<uint32_t>(offset);
  words[3] = DrawnWords{} + static_cast<uint32_t>(offset >> 32);
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round, key0 += 0x9E3779B9, key1 += 0xBB67AE85) {
    DrawnWords high0, low0, high1, low1;
    multiply_words(words[0], 0xD2511F53, high0, low0);
    multiply_words(words[2], 0xCD9E8D57, high1, low1);
    words[0] = high1 ^ words[1] ^ key0;
    words[1] = low1;
    words[2] = high0 ^ words[3] ^ key1;
    words[3] = low0;
  }
}

constexpr float kLog2High = 0x1.62e4p-1f, kLog2Low = 0x1.7f7d1cp-20f;

inline DrawnFloats exact_log(DrawnFloats x) {
  const DrawnInts bits = DrawnInts(x), exponent = (bits - 0x3F400000) >> 23;
  const DrawnFloats f = DrawnFloats(bits - (exponent << 23)) - 1.0f, power = __builtin_convertvector(exponent, DrawnFloats);
  DrawnFloats sum = DrawnFloats{} - 0x1.8deffcp-5f;
  for (const float each : {0x1.b842ecp-4f, -0x1.0d344ep-3f, 0x1.27757cp-3f, -0x1.54e0f2p-3f, 0x1.9979aap-3f,
                           -0x1.0000a4p-2f, 0x1.55557ep-2f, -0x1p-1f})
    sum = sum * f + each;
  return power * kLog2High + (f + (f * f * sum + power * kLog2Low));
}

inline DrawnFloats exact_exp(DrawnFloats x) {
  const DrawnFloats power = x * 0x1.715476p+0f + 0x1.8p23f - 0x1.8p23f;  // rounded to an integer
  const DrawnFloats r = x - power * kLog2High - power * kLog2Low;
  DrawnFloats sum = DrawnFloats{} + 0x1.6d7536p-10f;
  for (const float each : {0x1.123d86p-7f, 0x1.5554acp-5f, 0x1.55547cp-3f, 0x1p-1f, 0x1p+0f}) sum = sum * r + each;
  return (1.0f + r * sum) * DrawnFloats((__builtin_convertvector(power, DrawnInts) + 127) << 23);
}

inline DrawnFloats exact_gumbel(DrawnWords words) {
  const DrawnInts odd = DrawnInts((words >> 9) * 2 + 1);
  return -exact_log(-exact_log(__builtin_convertvector(odd, DrawnFloats) * 0x1p-24f));
}

}  // namespace
}  // namespace sparsekit::SPARSEKIT_LEVEL
