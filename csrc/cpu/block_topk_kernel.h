// The top k of every block: keys gathered into the first-level cache, a range that holds the k-th largest narrowed by
// counting until few keys are in it, and those ranked.
#pragma once

#include "block_strips.h"

namespace sparsekit::SPARSEKIT_LEVEL {
namespace {

#if defined(SPARSEKIT_AVX512)
constexpr int kVectorBytes = 64;
#elif defined(SPARSEKIT_AVX2)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

// A vector of keys; the compiler turns its operators into the instructions of the level.
typedef int32_t KeyLanes __attribute__((vector_size(kVectorBytes), aligned(alignof(int32_t)), may_alias));
constexpr int kKeyLanes = kVectorBytes / sizeof(int32_t);
constexpr int kAtOnce = 4;  // vectors
constexpr int kFew = kAtOnce * kKeyLanes;

// By reference: by value GCC copies it in halves.
inline const KeyLanes& lanes_at(const int32_t* keys) { return *reinterpret_cast<const KeyLanes*>(keys); }

// The keys of a block in row-major order, padded to a multiple of kFew with -1, which is below every key.
struct BlockKeys {
  const int32_t* keys;
  int64_t count;

  static int64_t padded(int64_t count) { return (count + kFew - 1) / kFew * kFew; }
  int64_t end() const { return padded(count); }
};

int64_t count_above(const BlockKeys& block, int32_t bound) {
  KeyLanes counts[kAtOnce] = {};
  for (int64_t i = 0; i < block.end(); i += kFew)
    for (int j = 0; j < kAtOnce; ++j) counts[j] -= lanes_at(block.keys + i + j * kKeyLanes) > bound;
  const KeyLanes sums = (counts[0] + counts[1]) + (counts[2] + counts[3]);
  int32_t lanes[kKeyLanes], total = 0;
  std::memcpy(lanes, &sums, sizeof lanes);
  for (int lane = 0; lane < kKeyLanes; ++lane) total += lanes[lane];
  return total;
}

// The maximum of every lane of two vectors: the k-th largest of them has k keys of the block at or above it.
constexpr int kMaxima = 2 * kKeyLanes;

void lane_maxima(const BlockKeys& block, int32_t* maxima) {
  KeyLanes best[kAtOnce] = {};  // 0 is the least key
  for (int64_t i = 0; i < block.end(); i += kFew)
    for (int j = 0; j < kAtOnce; ++j) {
      const KeyLanes& keys = lanes_at(block.keys + i + j * kKeyLanes);
      best[j] = keys > best[j] ? keys : best[j];
    }
  for (int j = 0; j < 2; ++j) best[j] = best[j] > best[j + 2] ? best[j] : best[j + 2];
  std::memcpy(maxima, best, kMaxima * sizeof(int32_t));
}

// The k-th largest of up to kLanes values, of which there are k or more (the rest are -1), and how many are not below it.
struct Kth {
  int32_t key;
  int64_t reached;
};

template <int kLanes>
Kth kth_largest(const int32_t* values, int64_t count, int64_t k) {
  constexpr int kVectors = kLanes / kKeyLanes;
  KeyLanes ranks[kVectors] = {};
  for (int64_t i = 0; i < count; ++i)
    for (int j = 0; j < kVectors; ++j) ranks[j] -= values[i] > lanes_at(values + j * kKeyLanes);
  int32_t before[kLanes], key = std::numeric_limits<int32_t>::max(), reached = 0;
  std::memcpy(before, ranks, sizeof before);
  for (int i = 0; i < kLanes; ++i) {
    const bool in = before[i] < static_cast<int32_t>(k);
    key = std::min(key, in ? values[i] : std::numeric_limits<int32_t>::max());
    reached += in;
  }
  return {key, reached};
}

// The keys from `low` on, in order; returns how many. `to` has room for a vector more than there are keys.
int64_t collect(const BlockKeys& block, int32_t low, int32_t* to) {
  int64_t found = 0;
#if defined(SPARSEKIT_AVX512)
  for (int64_t i = 0; i < block.end(); i += kKeyLanes) {
    const __m512i keys = load(block.keys + i);
    const __mmask16 in = _mm512_cmpge_epi32_mask(keys, _mm512_set1_epi32(low));
    _mm512_storeu_si512(to + found, _mm512_maskz_compress_epi32(in, keys));
    found += std::popcount(static_cast<uint16_t>(in));
  }
#elif defined(SPARSEKIT_AVX2)
  static constexpr auto kSetBits = [] {
    std::array<std::array<uint8_t, 8>, 256> table{};
    for (int bits = 0; bits < 256; ++bits)
      for (int bit = 0, next = 0; bit < 8; ++bit)
        if (bits >> bit & 1) table[bits][next++] = static_cast<uint8_t>(bit);
    return table;
  }();
  for (int64_t i = 0; i < block.end(); i += kKeyLanes) {
    const __m256i keys = load(block.keys + i);
    const __m256i in = _mm256_cmpgt_epi32(keys, _mm256_set1_epi32(low - 1));
    const uint32_t bits = static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(in)));
    const __m128i from = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kSetBits[bits].data()));
    store(to + found, _mm256_permutevar8x32_epi32(keys, _mm256_cvtepu8_epi32(from)), false);
    found += std::popcount(bits);
  }
#else
  for (int64_t i = 0; i < block.end(); ++i) {
    to[found] = block.keys[i];
    found += block.keys[i] >= low;
  }
#endif
  return found;
}

// The index after the wanted-th key that equals `key`.
int64_t end_of_equals(const BlockKeys& block, int32_t key, int64_t wanted) {
  int64_t i = 0;
  for (; i + kFew <= block.count; i += kFew) {
    int32_t equals = 0;
    for (int64_t j = 0; j < kFew; ++j) equals += block.keys[i + j] == key;
    if (equals >= wanted) break;
    wanted -= equals;
  }
  while (wanted > 0) wanted -= block.keys[i++] == key;
  return i;
}

// The keys above `bound` are kept, and those equal to it before the index `ties_end`.
struct Cut {
  int32_t bound;
  int64_t ties_end;
};

// Where to cut a block of more than k keys so that k stay, 0 < k. `few` has room for the keys and kFew more.
Cut cut_at(BlockKeys block, int64_t k, int32_t* few) {
  int32_t maxima[kMaxima], low = 0, high = 0;  // low <= the k-th largest key <= high
  lane_maxima(block, maxima);
  for (int i = 0; i < kMaxima; ++i) high = std::max(high, maxima[i]);
  const BlockKeys all = block;
  if (k <= kMaxima) {
    low = kth_largest<kMaxima>(maxima, kMaxima, k).key;
    block = {few, collect(all, low, few)};
    std::fill_n(few + block.count, kFew, -1);
    if (block.count == k) return {low - 1, 0};
  }
  int64_t above_high = 0;  // how many keys are above high
  for (int32_t octaves = 1 << 23; low == 0 && octaves < high; octaves = std::min(octaves, 1 << 29) * 2) {
    const int64_t above = count_above(block, high - octaves);
    if (above >= k)
      low = high - octaves + 1;
    else
      high -= octaves, above_high = above;
  }
  while (low < high) {
    const int32_t middle = low + (high - low) / 2;
    const int64_t above = count_above(block, middle);
    if (above == k) return {middle, 0};
    const int32_t more = -static_cast<int32_t>(above > k);  // all ones or none: a branch would be a coin's toss
    low += (middle + 1 - low) & more;
    high += (middle - high) & ~more;
    above_high += (above - above_high) & ~int64_t{more};
  }
  return {high, end_of_equals(all, high, k - above_high)};
}

template <int64_t kCols, class T>
void load_keys(const T* score, int32_t* keys, int64_t cols) {
  if constexpr (kCols > 0) cols = kCols;
  for (int64_t i = 0; i < cols; ++i) keys[i] = magnitude_key(score[i]);
}

inline void store_above(const int32_t* keys, int32_t bound, bool* mask, int64_t cols) {
  int64_t i = 0;
#if defined(SPARSEKIT_AVX512)
  for (; i + 16 <= cols; i += 16) {
    const __mmask16 above = _mm512_cmpgt_epi32_mask(load(keys + i), _mm512_set1_epi32(bound));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(mask + i), _mm_maskz_mov_epi8(above, _mm_set1_epi8(1)));
  }
#elif defined(SPARSEKIT_AVX2)
  const __m256i least = _mm256_set1_epi32(bound);
  for (; i + 16 <= cols; i += 16) {
    const Keep16 above = join(Keep32{_mm256_cmpgt_epi32(load(keys + i), least)},
                              Keep32{_mm256_cmpgt_epi32(load(keys + i + 8), least)});
    const __m128i bytes =
        _mm_packs_epi16(_mm256_castsi256_si128(above.lanes), _mm256_extracti128_si256(above.lanes, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(mask + i), _mm_and_si128(bytes, _mm_set1_epi8(1)));
  }
#endif
  for (; i < cols; ++i) mask[i] = keys[i] > bound;
}

struct TopkScratch {
  int64_t blocks, pitch;  // blocks side by side, and room for the keys of one
  std::unique_ptr<int32_t[]> keys, few;
  std::unique_ptr<Cut[]> cuts;

  explicit TopkScratch(const BlockTopkArgs& a)
      : pitch(BlockKeys::padded(std::min(a.block_rows, a.rows) * std::min(a.block_cols, a.cols))) {
    blocks = std::max<int64_t>(1, kStripEntries / pitch);
    keys.reset(new int32_t[blocks * pitch]);
    few.reset(new int32_t[pitch + kFew]);
    cuts.reset(new Cut[blocks]);
  }
};

// kCols: the columns of a block where they are known when compiling, else 0.
template <class T, int64_t kCols>
void topk_strip(const BlockTopkArgs& a, const BlockStrip& strip, const TopkScratch& scratch) {
  const int64_t side = kCols > 0 ? kCols : a.block_cols, pitch = scratch.pitch;
  const int64_t full = strip.cols / side, rest = strip.cols % side, blocks = full + (rest > 0);
  int32_t* keys = scratch.keys.get();
  for (int64_t row = 0; row < strip.rows; ++row) {
    const T* score = static_cast<const T*>(a.score) + (strip.top + row) * a.score_stride + strip.left;
    for (int64_t block = 0; block < full; ++block) {
      __builtin_prefetch(score + strip.cols + block * side, 0, 2);  // the next strip, into the second-level cache
      load_keys<kCols>(score + block * side, keys + block * pitch + row * side, side);
    }
    if (rest) load_keys<0>(score + full * side, keys + full * pitch + row * rest, rest);
  }
  for (int64_t block = 0; block < blocks; ++block) {
    const BlockKeys one{keys + block * pitch, strip.rows * (block < full ? side : rest)};
    std::fill(keys + block * pitch + one.count, keys + block * pitch + one.end(), -1);
    if (a.k == 0)
      scratch.cuts[block] = {std::numeric_limits<int32_t>::max(), 0};
    else if (a.k >= one.count)
      scratch.cuts[block] = {-1, 0};
    else
      scratch.cuts[block] = cut_at(one, a.k, scratch.few.get());
  }
  for (int64_t row = 0; row < strip.rows; ++row) {
    bool* mask = a.mask + (strip.top + row) * a.cols + strip.left;
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t cols = block < full ? side : rest;
      const Cut& cut = scratch.cuts[block];
      const int32_t* from = keys + block * pitch + row * cols;
      bool* to = mask + block * side;
      const int64_t ties = std::clamp<int64_t>(cut.ties_end - row * cols, 0, cols);
      if (ties > 0) store_above(from, cut.bound - 1, to, ties);
      store_above(from + ties, cut.bound, to + ties, cols - ties);
    }
  }
}

}  // namespace

void block_topk(const BlockTopkArgs& a, int64_t begin, int64_t end) {
  dispatch(a.dtype, [&]<class T>(T*) {
    const TopkScratch scratch(a);
    for_strips(a, begin, end, scratch.blocks, [&](const BlockStrip& strip) {
      if (a.block_cols == 16)
        topk_strip<T, 16>(a, strip, scratch);
      else
        topk_strip<T, 0>(a, strip, scratch);
    });
  });
}

}  // namespace sparsekit::SPARSEKIT_LEVEL
