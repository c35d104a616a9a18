// The k-th largest key of a block. For a small k, kLanes blocks are searched at once, one to a lane: the k-th largest
// of the maxima of 16 parts is a lower bound that few keys reach, and a sorting network sorts those few. For a larger
// k, or where too many keys reach the bound, by bisection.
#pragma once

#include "float_lanes.h"
#include "lanes.h"

namespace sparsekit::SPARSEKIT_LEVEL {
namespace {

// A vector of keys; the compiler turns its operators into the instructions of the level.
typedef int32_t KeyLanes __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
constexpr int kVectorsAtOnce = 32 / kLanes > 4 ? 32 / kLanes : 4;
constexpr int kKeysAtOnce = kVectorsAtOnce * kLanes;

// By reference: by value GCC copies it in halves.
inline const KeyLanes& lanes_at(const int32_t* keys) { return *reinterpret_cast<const KeyLanes*>(keys); }
inline KeyLanes& lanes_at(int32_t* keys) { return *reinterpret_cast<KeyLanes*>(keys); }

// The keys of a block in row-major order, padded to a multiple of kKeysAtOnce with -1, which is below every key.
struct BlockKeys {
  const int32_t* keys;
  int64_t count;

  static int64_t padded(int64_t count) { return (count + kKeysAtOnce - 1) / kKeysAtOnce * kKeysAtOnce; }
  int64_t end() const { return padded(count); }
};

int64_t count_above(const BlockKeys& block, int32_t bound) {
  KeyLanes counts[kVectorsAtOnce] = {};
  for (int64_t i = 0; i < block.end(); i += kKeysAtOnce)
    for (int j = 0; j < kVectorsAtOnce; ++j) counts[j] -= lanes_at(block.keys + i + j * kLanes) > bound;
  for (int j = 1; j < kVectorsAtOnce; ++j) counts[0] += counts[j];
  int32_t total = 0;
  for (int lane = 0; lane < kLanes; ++lane) total += counts[0][lane];
  return total;
}

// For any 0 < k < block.count; `low` is a lower bound of the result, 0 if none is known.
int32_t kth_by_bisection(const BlockKeys& block, int64_t k, int32_t low) {
  KeyLanes best = lanes_at(block.keys);
  for (int64_t i = kLanes; i < block.end(); i += kLanes) {
    const KeyLanes& keys = lanes_at(block.keys + i);
    best = keys > best ? keys : best;
  }
  int32_t high = 0;  // low <= the k-th largest key <= high
  for (int lane = 0; lane < kLanes; ++lane) high = std::max(high, best[lane]);
  for (int32_t octaves = 1 << 23; low == 0 && octaves < high; octaves = std::min(octaves, 1 << 29) * 2) {
    if (count_above(block, high - octaves) >= k)
      low = high - octaves + 1;
    else
      high -= octaves;
  }
  while (low < high) {
    const int32_t middle = low + (high - low) / 2;
    const int64_t above = count_above(block, middle);
    if (above == k) return middle + 1;
    const int32_t more = -static_cast<int32_t>(above > k);  // all ones or none: branches would be mispredicted
    low += (middle + 1 - low) & more;
    high += (middle - high) & ~more;
  }
  return high;
}

// Which of 32 keys are `low` or larger, as bits.
inline uint32_t bits_from(const int32_t* keys, int32_t low) {
#if defined(SPARSEKIT_AVX512)
  const __m512i least = _mm512_set1_epi32(low);
  return _mm512_cmpge_epi32_mask(load(keys), least) |
         static_cast<uint32_t>(_mm512_cmpge_epi32_mask(load(keys + 16), least)) << 16;
#elif defined(SPARSEKIT_AVX2)
  const __m256i below = _mm256_set1_epi32(low - 1);
  const auto from = [&](int i) { return _mm256_cmpgt_epi32(load(keys + i), below); };
  const __m256i mixed =
      _mm256_packs_epi16(_mm256_packs_epi32(from(0), from(8)), _mm256_packs_epi32(from(16), from(24)));
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  return static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_permutevar8x32_epi32(mixed, order)));
#else
  uint32_t bits = 0;
  for (int i = 0; i < 32; ++i) bits |= static_cast<uint32_t>(keys[i] >= low) << i;
  return bits;
#endif
}

constexpr int kParts = 16;       // the largest k for which the maxima of parts bound the k-th key
constexpr int kCandidates = 32;  // up to this many keys from the bound on are sorted
constexpr int kCandidateRoom = kCandidates + kKeysAtOnce + kLanes;

// The maxima of 16 parts.
void part_maxima(const BlockKeys& block, int32_t* maxima) {
  constexpr int kVectors = kParts / kLanes;
  KeyLanes best[kVectors] = {};  // 0 is the least key
  for (int64_t i = 0; i < block.end(); i += kParts)
    for (int j = 0; j < kVectors; ++j) {
      const KeyLanes& keys = lanes_at(block.keys + i + j * kLanes);
      best[j] = keys > best[j] ? keys : best[j];
    }
  for (int j = 0; j < kVectors; ++j) lanes_at(maxima + j * kLanes) = best[j];
}

// Copies the keys that are `low` or larger, followed by -1, and returns how many there are. Beyond kCandidates it may
// stop early.
int64_t collect(const BlockKeys& block, int32_t low, int32_t* to) {
  int64_t found = 0;
  for (int64_t start = 0; start < block.end() && found <= kCandidates; start += kKeysAtOnce)
#if defined(SPARSEKIT_AVX512)
    for (int64_t i = start; i < start + kKeysAtOnce; i += kLanes) {
      const __m512i keys = load(block.keys + i);
      const __mmask16 in = _mm512_cmpge_epi32_mask(keys, _mm512_set1_epi32(low));
      _mm512_storeu_si512(to + found, _mm512_maskz_compress_epi32(in, keys));
      found += std::popcount(static_cast<uint16_t>(in));
    }
#elif defined(SPARSEKIT_AVX2)
    for (int64_t i = start; i < start + kKeysAtOnce; i += kLanes) {
      static constexpr auto kSetBits = [] {
        std::array<std::array<uint8_t, 8>, 256> table{};
        for (int bits = 0; bits < 256; ++bits)
          for (int bit = 0, next = 0; bit < 8; ++bit)
            if (bits >> bit & 1) table[bits][next++] = static_cast<uint8_t>(bit);
        return table;
      }();
      const __m256i keys = load(block.keys + i);
      const __m256i in = _mm256_cmpgt_epi32(keys, _mm256_set1_epi32(low - 1));
      const uint32_t bits = static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(in)));
      const __m128i from = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kSetBits[bits].data()));
      store(to + found, _mm256_permutevar8x32_epi32(keys, _mm256_cvtepu8_epi32(from)), false);
      found += std::popcount(bits);
    }
#else
    for (int64_t i = start; i < start + kKeysAtOnce; ++i) {
      to[found] = block.keys[i];
      found += block.keys[i] >= low;
    }
#endif
  int32_t* end = to + std::min<int64_t>(found, kCandidates);
  for (int i = 0; i < kCandidates; i += kLanes) lanes_at(end + i) = KeyLanes{} - 1;
  return found;
}

inline void transpose(KeyLanes (&lanes)[kLanes]) {
  Floats floats[kLanes];
  std::memcpy(floats, lanes, sizeof floats);
  transpose(floats);
  std::memcpy(lanes, floats, sizeof floats);
}

// Loads 16 keys of each of kLanes blocks, `pitch` apart: vector i has the i-th key of every block.
inline void load_sixteen(const int32_t* keys, int64_t pitch, KeyLanes (&sixteen)[16]) {
  for (int start = 0; start < 16; start += kLanes) {
    KeyLanes lanes[kLanes];
    for (int block = 0; block < kLanes; ++block) lanes[block] = lanes_at(keys + block * pitch + start);
    transpose(lanes);
    for (int i = 0; i < kLanes; ++i) sixteen[start + i] = lanes[i];
  }
}

template <int i, int j>
void order(KeyLanes (&keys)[16]) {  // the larger key first
  const KeyLanes a = keys[i], b = keys[j];
  keys[i] = a > b ? a : b;
  keys[j] = a > b ? b : a;
}

// Batcher's odd-even merge of the two sorted halves of kCount keys from kStart, of which every kApart-th is looked at.
template <int kStart, int kCount, int kApart>
void merge_sorted(KeyLanes (&keys)[16]) {
  if constexpr (kApart * 2 >= kCount) {
    order<kStart, kStart + kApart>(keys);
  } else {
    merge_sorted<kStart, kCount, kApart * 2>(keys);
    merge_sorted<kStart + kApart, kCount, kApart * 2>(keys);
    [&]<int... i>(std::integer_sequence<int, i...>) {
      (order<kStart + kApart + 2 * kApart * i, kStart + 2 * kApart + 2 * kApart * i>(keys), ...);
    }(std::make_integer_sequence<int, kCount / (2 * kApart) - 1>());
  }
}

template <int kStart = 0, int kCount = 16>
void sort(KeyLanes (&keys)[16]) {
  if constexpr (kCount > 1) {
    sort<kStart, kCount / 2>(keys);
    sort<kStart + kCount / 2, kCount / 2>(keys);
    merge_sorted<kStart, kCount, 1>(keys);
  }
}

// Sorts a bitonic sequence: one that first falls and then rises, or the other way round.
template <int kApart = 8>
void sort_bitonic(KeyLanes (&keys)[16]) {
  if constexpr (kApart > 0) {
    [&]<int... i>(std::integer_sequence<int, i...>) {
      (order<i / kApart * 2 * kApart + i % kApart, i / kApart * 2 * kApart + i % kApart + kApart>(keys), ...);
    }(std::make_integer_sequence<int, 8>());
    sort_bitonic<kApart / 2>(keys);
  }
}

// The k-th largest keys of up to kLanes blocks. Where more keys reach the lower bound than are sorted, -1 - bound
// instead.
template <class KeysOf>
void kth_of_lanes(KeysOf keys_of, int64_t blocks, int64_t k, int32_t* kth) {
  int32_t maxima[kLanes * kParts] = {}, candidates[kLanes * kCandidateRoom], low[kLanes];
  int64_t found[kLanes];
  for (int64_t block = 0; block < blocks; ++block) part_maxima(keys_of(block), maxima + block * kParts);
  KeyLanes sorted[16], more[16];
  load_sixteen(maxima, kParts, sorted);
  sort(sorted);
  lanes_at(low) = sorted[k - 1];
  for (int64_t block = 0; block < blocks; ++block)
    found[block] = collect(keys_of(block), low[block], candidates + block * kCandidateRoom);
  for (int64_t block = blocks; block < kLanes; ++block)
    std::fill_n(candidates + block * kCandidateRoom, kCandidates, 0);
  load_sixteen(candidates, kCandidateRoom, sorted);
  load_sixteen(candidates + 16, kCandidateRoom, more);
  sort(sorted);
  sort(more);
  for (int i = 0; i < 16; ++i) sorted[i] = sorted[i] > more[15 - i] ? sorted[i] : more[15 - i];
  sort_bitonic(sorted);
  for (int64_t block = 0; block < blocks; ++block)
    kth[block] = found[block] <= kCandidates ? sorted[k - 1][block] : -1 - low[block];
}

// The k-th largest keys of `blocks` blocks: 0 where a block has no more than k, above every key where k is 0.
template <class KeysOf>
void kth_of_blocks(KeysOf keys_of, int64_t blocks, int64_t k, int32_t* kth) {
  if (k == 0) {
    std::fill_n(kth, blocks, std::numeric_limits<int32_t>::max());
    return;
  }
  for (int64_t first = 0; k <= kParts && first < blocks; first += kLanes)
    kth_of_lanes([&](int64_t block) { return keys_of(first + block); }, std::min<int64_t>(kLanes, blocks - first), k,
                kth + first);
  for (int64_t block = 0; block < blocks; ++block) {
    const BlockKeys keys = keys_of(block);
    const int32_t low = k <= kParts ? -1 - kth[block] : 0;  // a bound where not negative
    if (keys.count <= k)
      kth[block] = 0;
    else if (low >= 0)
      kth[block] = kth_by_bisection(keys, k, low);
  }
}

}  // namespace
}  // namespace sparsekit::SPARSEKIT_LEVEL
