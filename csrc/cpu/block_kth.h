// The k-th largest keys of blocks. The keys of a block are reduced to bytes, one value for every 2^shift neighboring keys,
// and bisection finds the largest byte that k keys reach, in eight counts. Where more than k reach it, the keys of that
// byte are told apart by another such round. The first round has the keys near the k-th key of the block before, since
// neighboring blocks are alike: it mostly is the last.
#pragma once

#include "lanes.h"

namespace sparsekit::SPARSEKIT_LEVEL {
namespace {

constexpr int64_t kKeysAtOnce = 32;
constexpr int kBlocksAtOnce = 4;  // counts of several blocks hide each other's latency

// Byte b stands for the 2^shift keys from center + b * 2^shift on; keys below or above all of these share the lowest or
// the highest byte. The center is a multiple of 2^shift, so that no byte stands for both a key and the padding, -1.
struct KeyBytes {
  int32_t center;
  int shift;

  int32_t first_key(int byte) const { return center + byte * (1 << shift); }

  // Has all keys of T.
  template <class T>
  static KeyBytes all() {
    constexpr int kShift = 8 * sizeof(T) - 8;
    return {64 << kShift, kShift};
  }
  // Has the keys within half an octave of `key`, an octave of bfloat16.
  template <class T>
  static KeyBytes near(int32_t key) {
    constexpr int kMantissa = std::is_same_v<T, float> ? 23 : std::is_same_v<T, F16> ? 10 : 7;
    constexpr int kShift = std::max(kMantissa - 8, 0);
    return {key & -(1 << kShift), kShift};
  }
  // Tells the keys of one byte apart.
  KeyBytes within(int byte) const {
    const int narrower = std::max(shift - 7, 0);
    return {first_key(byte) + (64 << narrower), narrower};
  }

  // Which byte comes where is not said: they are only counted.
  void reduce(const int32_t* keys, int64_t count, int8_t* bytes) const {
#if defined(SPARSEKIT_AVX512)
    const auto sixteen = [&](int64_t i) {
      const __m512i above = _mm512_sub_epi32(load(keys + i), _mm512_set1_epi32(center));
      return _mm512_srav_epi32(above, _mm512_set1_epi32(shift));
    };
    int64_t i = 0;
    for (; i + 64 <= count; i += 64) {
      const __m512i low = _mm512_packs_epi32(sixteen(i), sixteen(i + 16));
      const __m512i high = _mm512_packs_epi32(sixteen(i + 32), sixteen(i + 48));
      store(bytes + i, _mm512_packs_epi16(low, high), false);
    }
    if (i < count)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(bytes + i),
                          _mm512_cvtsepi16_epi8(_mm512_packs_epi32(sixteen(i), sixteen(i + 16))));
#elif defined(SPARSEKIT_AVX2)
    for (int64_t i = 0; i < count; i += 32) {
      const auto eight = [&](int j) {
        const __m256i above = _mm256_sub_epi32(load(keys + i + j), _mm256_set1_epi32(center));
        return _mm256_sra_epi32(above, _mm_cvtsi32_si128(shift));
      };
      const __m256i low = _mm256_packs_epi32(eight(0), eight(8)), high = _mm256_packs_epi32(eight(16), eight(24));
      store(bytes + i, _mm256_packs_epi16(low, high), false);
    }
#else
    for (int64_t i = 0; i < count; ++i)
      bytes[i] = static_cast<int8_t>(std::clamp((keys[i] - center) >> shift, -128, 127));
#endif
  }
};

// How many bytes are `least` or larger. kCount is their number if it is known when compiling, else 0.
template <int64_t kCount>
int64_t count_from(const int8_t* bytes, int64_t count, int least) {
  if constexpr (kCount > 0) count = kCount;
  int64_t total = 0;
#if defined(SPARSEKIT_AVX512)
  int64_t i = 0;
  for (; i + 64 <= count; i += 64)
    total += std::popcount(_mm512_cmpgt_epi8_mask(load(bytes + i), _mm512_set1_epi8(static_cast<char>(least - 1))));
  if (i < count) {
    const __m256i rest = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes + i));
    const __m256i above = _mm256_cmpgt_epi8(rest, _mm256_set1_epi8(static_cast<char>(least - 1)));
    total += std::popcount(static_cast<uint32_t>(_mm256_movemask_epi8(above)));
  }
#elif defined(SPARSEKIT_AVX2)
  const __m256i below = _mm256_set1_epi8(static_cast<char>(least - 1));
  __m256i sums = _mm256_setzero_si256();
  for (int64_t start = 0; start < count; start += 256) {
    __m256i above = _mm256_setzero_si256();
    for (int64_t i = start; i < std::min(start + 256, count); i += 32)
      above = _mm256_sub_epi8(above, _mm256_cmpgt_epi8(load(bytes + i), below));
    sums = _mm256_add_epi64(sums, _mm256_sad_epu8(above, _mm256_setzero_si256()));
  }
  const __m128i halves = _mm_add_epi64(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
  total = _mm_cvtsi128_si64(halves) + _mm_extract_epi64(halves, 1);
#else
  for (int64_t start = 0; start < count; start += 32) {
    int some = 0;
    for (int64_t i = start; i < start + 32; ++i) some += bytes[i] >= least;
    total += some;
  }
#endif
  return total;
}

// The largest byte that k or more bytes of a block reach, the lowest byte if there is no larger, and how many reach it.
struct LeastByte {
  int byte;
  int64_t reached;
};

// For kBlocks blocks of `pitch` bytes, one after the other.
template <int kBlocks, int64_t kPitch = 0>
void find_least(const int8_t* bytes, int64_t pitch, int64_t k, LeastByte* least) {
  if constexpr (kPitch == 0)
    if (pitch == 256) return find_least<kBlocks, 256>(bytes, pitch, k, least);
  std::fill_n(least, kBlocks, LeastByte{-128, pitch});
  for (int bit = 128; bit > 0; bit /= 2)
    for (int block = 0; block < kBlocks; ++block) {
      const int byte = least[block].byte + bit;
      const int64_t reached = count_from<kPitch>(bytes + block * pitch, pitch, byte);
      const int64_t enough = -static_cast<int64_t>(reached >= k);  // all ones or none: branches would be mispredicted
      least[block].byte += static_cast<int>(bit & enough);
      least[block].reached += (reached - least[block].reached) & enough;
    }
}

class KthSearch {
 public:
  // A block has `pitch` keys, the last of which may be padding: -1, which is below every key.
  KthSearch(int64_t pitch, int64_t blocks)
      : pitch_(pitch), bytes_(new int8_t[kBlocksAtOnce * pitch]()), pending_(new Pending[blocks]) {}

  // Finds a number for every block that its k largest keys reach: where other keys reach it too, the k-th largest key.
  // It is 0 where a block has no more than k keys, above every key where k is 0. T is the type of the keys.
  template <class T, class CountOf>
  void find(const int32_t* keys, int64_t blocks, CountOf count_of, int64_t k, int32_t* kth) {
    std::fill_n(kth, blocks, k == 0 ? std::numeric_limits<int32_t>::max() : 0);
    int64_t count = 0;
    const KeyBytes first = before_ < 0 ? KeyBytes::all<T>() : KeyBytes::near<T>(before_);
    for (int64_t block = 0; k > 0 && block < blocks; ++block)
      if (count_of(block) > k) pending_[count++] = {block, first};
    while (count > 0) {
      int64_t left = 0;
      for (int64_t i = 0; i < count; i += kBlocksAtOnce) {
        const int64_t some = std::min<int64_t>(kBlocksAtOnce, count - i);
        LeastByte least[kBlocksAtOnce];
        for (int64_t j = 0; j < some; ++j)
          pending_[i + j].bytes.reduce(keys + pending_[i + j].block * pitch_, pitch_, bytes_.get() + j * pitch_);
        if (some == 1)
          find_least<1>(bytes_.get(), pitch_, k, least);
        else
          find_least<kBlocksAtOnce>(bytes_.get(), pitch_, k, least);
        for (int64_t j = 0; j < some; ++j) {
          const auto [block, bytes] = pending_[i + j];
          const auto [byte, reached] = least[j];
          if (byte == -128 || byte == 127)
            pending_[left++] = {block, KeyBytes::all<T>()};
          else if (reached > k && bytes.shift > 0)
            pending_[left++] = {block, bytes.within(byte)};
          else
            kth[block] = before_ = bytes.first_key(byte);
        }
      }
      count = left;
    }
  }

 private:
  struct Pending {
    int64_t block;
    KeyBytes bytes;
  };

  int64_t pitch_;
  std::unique_ptr<int8_t[]> bytes_;
  std::unique_ptr<Pending[]> pending_;
  int32_t before_ = -1;  // what was found last
};

}  // namespace
}  // namespace sparsekit::SPARSEKIT_LEVEL
