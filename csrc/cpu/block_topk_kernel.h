// The top k of every block. The keys of a strip are gathered in the first-level cache and the k-th largest key of each
// block is found. The keys that are not below it are kept; if these are too many, the last that equal it are dropped.
#pragma once

#include "block_kth.h"
#include "block_strips.h"

namespace sparsekit::SPARSEKIT_LEVEL {
namespace {

// Writes which keys are kept, a bit for each key.
void keep_topk(const BlockKeys& block, int64_t k, int32_t kth, uint32_t* kept) {
  const int64_t words = block.end() / 32;
  int64_t excess = -k;
  for (int64_t word = 0; word < words; ++word) {
    kept[word] = bits_from(block.keys + word * 32, kth);
    excess += std::popcount(kept[word]);
  }
  for (int64_t word = words - 1; excess > 0; --word) {
    uint32_t equal = kept[word] & ~bits_from(block.keys + word * 32, kth + 1);
    while (std::popcount(equal) > excess) equal &= equal - 1;
    kept[word] &= ~equal;
    excess -= std::popcount(equal);
  }
}

template <int64_t kCols, class T>
void load_keys(const T* score, int32_t* keys, int64_t cols) {
  if constexpr (kCols > 0) cols = kCols;
  for (int64_t i = 0; i < cols; ++i) keys[i] = magnitude_key(score[i]);
}

// Stores 32 bits as bytes.
inline void store_bits(uint32_t bits, bool* mask) {
#if defined(SPARSEKIT_AVX2) || defined(SPARSEKIT_AVX512)
  const __m256i byte = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
  const __m256i bit = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201));
  const __m256i set = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32(static_cast<int>(bits)), byte), bit);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(mask), _mm256_min_epu8(set, _mm256_set1_epi8(1)));
#else
  for (int i = 0; i < 32; ++i) mask[i] = bits >> i & 1;
#endif
}

struct TopkScratch {
  int64_t blocks, pitch;  // blocks of a strip, and keys from one block to the next
  std::unique_ptr<int32_t[]> keys, kth;
  std::unique_ptr<uint32_t[]> kept;
  std::unique_ptr<bool[]> bytes;

  explicit TopkScratch(const BlockTopkArgs& a)
      : pitch(BlockKeys::padded(std::min(a.block_rows, a.rows) * std::min(a.block_cols, a.cols))) {
    blocks = std::max<int64_t>(1, kStripEntries / pitch);
    keys.reset(new int32_t[blocks * pitch]);
    kth.reset(new int32_t[blocks]);
    kept.reset(new uint32_t[blocks * pitch / 32]);
    bytes.reset(new bool[blocks * pitch]);
  }
};

// kCols is the number of columns of a block if it is known when compiling, else 0.
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
  const auto keys_of = [&](int64_t block) {
    return BlockKeys{keys + block * pitch, strip.rows * (block < full ? side : rest)};
  };
  for (int64_t block = 0; block < blocks; ++block)
    std::fill(keys + block * pitch + keys_of(block).count, keys + block * pitch + keys_of(block).end(), -1);
  kth_of_blocks(keys_of, blocks, a.k, scratch.kth.get());
  for (int64_t block = 0; block < blocks; ++block)
    keep_topk(keys_of(block), a.k, scratch.kth[block], scratch.kept.get() + block * pitch / 32);

  bool* mask = a.mask + strip.top * a.cols + strip.left;
  if (kCols == 16 && rest == 0 && full % 2 == 0) {
    const uint32_t* kept = scratch.kept.get();
    for (int64_t row = 0; row < strip.rows; ++row, mask += a.cols)
      for (int64_t block = 0; block < full; block += 2) {
        const uint32_t left = kept[(block * pitch + row * 16) / 32] >> row % 2 * 16;
        const uint32_t right = kept[((block + 1) * pitch + row * 16) / 32] >> row % 2 * 16;
        store_bits((left & 0xffff) | right << 16, mask + block * 16);
      }
    return;
  }
  for (int64_t word = 0; word < blocks * pitch / 32; ++word)
    store_bits(scratch.kept[word], scratch.bytes.get() + word * 32);
  for (int64_t row = 0; row < strip.rows; ++row, mask += a.cols)
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t cols = block < full ? side : rest;
      std::copy_n(scratch.bytes.get() + block * pitch + row * cols, cols, mask + block * side);
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
