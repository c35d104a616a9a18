// Finds the kept entries of 64 columns, compresses them to 32 values, and expands values to columns. Every group of
// four keeps two, so that 8 columns always make 4 values and nothing has to be counted.
#pragma once

#include "lanes.h"

#if !defined(SPARSEKIT_SCALAR)

namespace sparsekit::SPARSEKIT_LEVEL {
namespace {

// For every byte of mask bits, the byte indices that pshufb takes: kCompressBytes says which of the 8 columns value k
// comes from, and kExpandBytes which value column i gets (0x80 for none). A value has kSize bytes.
template <int kSize>
constexpr auto kCompressBytes = [] {
  std::array<std::array<uint8_t, 4 * kSize>, 256> table{};
  for (int bits = 0; bits < 256; ++bits)
    for (int i = 0, k = 0; i < 8; ++i)
      if (bits >> i & 1 && k < 4) {
        for (int byte = 0; byte < kSize; ++byte) table[bits][k * kSize + byte] = static_cast<uint8_t>(i * kSize + byte);
        ++k;
      }
  return table;
}();
template <int kSize>
constexpr auto kExpandBytes = [] {
  std::array<std::array<uint8_t, 8 * kSize>, 256> table{};
  for (int bits = 0; bits < 256; ++bits)
    for (int i = 0, k = 0; i < 8; ++i) {
      for (int byte = 0; byte < kSize; ++byte)
        table[bits][i * kSize + byte] = static_cast<uint8_t>(bits >> i & 1 ? k * kSize + byte : 0x80);
      k += bits >> i & 1;
    }
  return table;
}();

#if defined(SPARSEKIT_NEON)

// A bit for each of 64 entries, from vectors of 16 entries: sixteen(i) has ones where entry i + lane has a bit.
template <class Sixteen>
uint64_t bits_of_64(Sixteen sixteen) {
  uint64_t bits = 0;
  for (int i = 0; i < 64; i += 16) bits |= uint64_t{bits_of(sixteen(i))} << i;
  return bits;
}
inline uint64_t mask_bits(const bool* mask) {
  return bits_of_64([&](int i) { return Keep8{vtstq_u8(load_bytes(mask + i), load_bytes(mask + i))}; });
}
inline uint64_t nonzero_bits(const float* weight) {
  const auto four = [&](int i) {
    return Keep32{vtstq_u32(vreinterpretq_u32_u8(load_bytes(weight + i)), vdupq_n_u32(0x7fffffff))};
  };
  return bits_of_64([&](int i) { return join(join(four(i), four(i + 4)), join(four(i + 8), four(i + 12))); });
}
template <class T>
uint64_t nonzero_bits(const T* weight) {
  const auto eight = [&](int i) {
    return Keep16{vtstq_u16(vreinterpretq_u16_u8(load_bytes(weight + i)), vdupq_n_u16(0x7fff))};
  };
  return bits_of_64([&](int i) { return join(eight(i), eight(i + 8)); });
}

inline void compress64(const float* weight, uint64_t kept, float* values, bool) {
  for (int i = 0; i < 64; i += 8) {
    const uint8x16x2_t eight = {{load_bytes(weight + i), load_bytes(weight + i + 4)}};
    store(values + i / 2, vqtbl2q_u8(eight, load_bytes(kCompressBytes<4>[kept >> i & 255].data())), false);
  }
}
template <class T>
void compress64(const T* weight, uint64_t kept, T* values, bool) {
  for (int i = 0; i < 64; i += 8) {
    const uint8x8_t from = vld1_u8(kCompressBytes<2>[kept >> i & 255].data());
    vst1_u8(reinterpret_cast<uint8_t*>(values + i / 2), vqtbl1_u8(load_bytes(weight + i), from));
  }
}
template <class T>
void expand64(const T* values, uint64_t kept, T* weight, bool) {
  for (int i = 0; i < 64; i += 8) {
    uint8_t four[16] = {};
    std::memcpy(four, values + i / 2, 4 * sizeof(T));
    for (int byte = 0; byte < 8 * static_cast<int>(sizeof(T)); byte += 16)
      store(reinterpret_cast<uint8_t*>(weight + i) + byte,
            vqtbl1q_u8(load_bytes(four), load_bytes(kExpandBytes<sizeof(T)>[kept >> i & 255].data() + byte)), false);
  }
}

#else

inline __m128i load128(const void* from) { return _mm_loadu_si128(static_cast<const __m128i*>(from)); }
inline __m128i load64(const void* from) { return _mm_loadl_epi64(static_cast<const __m128i*>(from)); }

#if defined(SPARSEKIT_AVX512)

inline uint64_t mask_bits(const bool* mask) {
  const __m512i bytes = load(mask);
  return _mm512_test_epi8_mask(bytes, bytes);
}
inline uint64_t nonzero_bits(const float* weight) {
  uint64_t bits = 0;
  for (int i = 0; i < 64; i += 16)
    bits |= uint64_t{_mm512_test_epi32_mask(load(weight + i), _mm512_set1_epi32(0x7fffffff))} << i;
  return bits;
}
template <class T>
uint64_t nonzero_bits(const T* weight) {
  const __m512i magnitude = _mm512_set1_epi16(0x7fff);
  return _mm512_test_epi16_mask(load(weight), magnitude) |
         uint64_t{_mm512_test_epi16_mask(load(weight + 32), magnitude)} << 32;
}

// Compresses in registers: the instruction that compresses into memory is microcoded, and slow, on Zen 4.
inline void compress64(const float* weight, uint64_t kept, float* values, bool stream) {
  for (int i = 0; i < 64; i += 32) {
    const __m512i low = _mm512_maskz_compress_epi32(static_cast<__mmask16>(kept >> i), load(weight + i));
    const __m512i high = _mm512_maskz_compress_epi32(static_cast<__mmask16>(kept >> (i + 16)), load(weight + i + 16));
    store(values + i / 2, _mm512_inserti64x4(low, _mm512_castsi512_si256(high), 1), stream);
  }
}
inline void expand64(const float* values, uint64_t kept, float* weight, bool stream) {
  for (int i = 0; i < 64; i += 16) {
    const __m256i eight = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values + i / 2));
    const __m512i spread = _mm512_maskz_expand_epi32(static_cast<__mmask16>(kept >> i), _mm512_castsi256_si512(eight));
    store(weight + i, spread, stream);
  }
}

#else

inline uint64_t mask_bits(const bool* mask) {
  uint64_t bits = 0;
  for (int i = 0; i < 64; i += 32) {
    const __m256i zero = _mm256_cmpeq_epi8(load(mask + i), _mm256_setzero_si256());
    bits |= uint64_t{~static_cast<uint32_t>(_mm256_movemask_epi8(zero))} << i;
  }
  return bits;
}
inline uint64_t nonzero_bits(const float* weight) {
  uint64_t bits = 0;
  for (int i = 0; i < 64; i += 8) {
    const __m256i zero = _mm256_cmpeq_epi32(_mm256_slli_epi32(load(weight + i), 1), _mm256_setzero_si256());
    bits |= static_cast<uint64_t>(_mm256_movemask_ps(_mm256_castsi256_ps(zero))) << i;
  }
  return ~bits;
}
template <class T>
uint64_t nonzero_bits(const T* weight) {
  const auto zero = [&](int i) {
    return Keep16{_mm256_cmpeq_epi16(_mm256_slli_epi16(load(weight + i), 1), _mm256_setzero_si256())};
  };
  uint64_t bits = 0;
  for (int i = 0; i < 64; i += 32)
    bits |= uint64_t{static_cast<uint32_t>(_mm256_movemask_epi8(join(zero(i), zero(i + 16)).lanes))} << i;
  return ~bits;
}

inline void compress64(const float* weight, uint64_t kept, float* values, bool stream) {
  const auto four = [&](int i) {
    int from;
    std::memcpy(&from, kCompressBytes<1>[kept >> i & 255].data(), 4);
    const __m128i lanes = _mm_cvtepu8_epi32(_mm_cvtsi32_si128(from));
    return _mm256_castsi256_si128(_mm256_permutevar8x32_epi32(load(weight + i), _mm256_castsi128_si256(lanes)));
  };
  for (int i = 0; i < 64; i += 16) store(values + i / 2, _mm256_set_m128i(four(i + 8), four(i)), stream);
}
inline void expand64(const float* values, uint64_t kept, float* weight, bool stream) {
  for (int i = 0; i < 64; i += 8) {
    const __m256i lanes = _mm256_cvtepi8_epi32(load64(kExpandBytes<1>[kept >> i & 255].data()));
    const __m256i spread = _mm256_permutevar8x32_epi32(_mm256_castsi128_si256(load128(values + i / 2)), lanes);
    store(weight + i, _mm256_andnot_si256(_mm256_srai_epi32(lanes, 31), spread), stream);
  }
}

#endif

#if defined(SPARSEKIT_AVX512_BF16)

template <class T>
void compress64(const T* weight, uint64_t kept, T* values, bool stream) {
  const __m512i low = _mm512_maskz_compress_epi16(static_cast<__mmask32>(kept), load(weight));
  const __m512i high = _mm512_maskz_compress_epi16(static_cast<__mmask32>(kept >> 32), load(weight + 32));
  store(values, _mm512_inserti64x4(low, _mm512_castsi512_si256(high), 1), stream);
}
template <class T>
void expand64(const T* values, uint64_t kept, T* weight, bool stream) {
  for (int i = 0; i < 64; i += 32) {
    const __m256i sixteen = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values + i / 2));
    const __m512i spread = _mm512_maskz_expand_epi16(static_cast<__mmask32>(kept >> i), _mm512_castsi256_si512(sixteen));
    store(weight + i, spread, stream);
  }
}

#else

inline void store256(void* to, __m128i low, __m128i high, bool stream) {
  const __m256i both = _mm256_set_m128i(high, low);
  if (stream)
    _mm256_stream_si256(static_cast<__m256i*>(to), both);
  else
    _mm256_storeu_si256(static_cast<__m256i*>(to), both);
}
template <class T>
void compress64(const T* weight, uint64_t kept, T* values, bool stream) {
  const auto four = [&](int i) {
    return _mm_shuffle_epi8(load128(weight + i), load64(kCompressBytes<2>[kept >> i & 255].data()));
  };
  for (int i = 0; i < 64; i += 32)
    store256(values + i / 2, _mm_unpacklo_epi64(four(i), four(i + 8)), _mm_unpacklo_epi64(four(i + 16), four(i + 24)),
             stream);
}
template <class T>
void expand64(const T* values, uint64_t kept, T* weight, bool stream) {
  const auto eight = [&](int i) {
    return _mm_shuffle_epi8(load64(values + i / 2), load128(kExpandBytes<2>[kept >> i & 255].data()));
  };
  for (int i = 0; i < 64; i += 16) store256(weight + i, eight(i), eight(i + 8), stream);
}

#endif
#endif

}  // namespace
}  // namespace sparsekit::SPARSEKIT_LEVEL

#else

namespace sparsekit::SPARSEKIT_LEVEL {
namespace {

template <class T>
void compress64(const T* weight, uint64_t kept, T* values, bool) {
  for (; kept; kept &= kept - 1) *values++ = weight[std::countr_zero(kept)];
}

}  // namespace
}  // namespace sparsekit::SPARSEKIT_LEVEL

#endif
