// What the top-k blocks of a strip keep, as bits, row by row. The keys of the blocks are gathered in the first-level cache
// and the k-th largest key of each is found. The keys that are not below it are kept; if these are too many, the last
// that equal it are dropped.
#pragma once

#include "block_kth.h"
#include "block_strips.h"
#include "nm_kernel.h"

namespace sparsekit::SPARSEKIT_LEVEL {
namespace {

// Which of 32 keys are `least` or larger, as bits.
inline uint32_t bits_from(const int32_t* keys, int32_t least) {
#if defined(SPARSEKIT_AVX512)
  const __m512i lanes = _mm512_set1_epi32(least);
  return _mm512_cmpge_epi32_mask(load(keys), lanes) |
         static_cast<uint32_t>(_mm512_cmpge_epi32_mask(load(keys + 16), lanes)) << 16;
#elif defined(SPARSEKIT_AVX2)
  const __m256i below = _mm256_set1_epi32(least - 1);
  const auto from = [&](int i) { return _mm256_cmpgt_epi32(load(keys + i), below); };
  const __m256i mixed =
      _mm256_packs_epi16(_mm256_packs_epi32(from(0), from(8)), _mm256_packs_epi32(from(16), from(24)));
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  return static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_permutevar8x32_epi32(mixed, order)));
#else
  uint32_t bits = 0;
  for (int i = 0; i < 32; ++i) bits |= static_cast<uint32_t>(keys[i] >= least) << i;
  return bits;
#endif
}

// Writes which keys of a block of `pitch` are kept, a bit for each.
inline void keep_topk(const int32_t* keys, int64_t pitch, int64_t k, int32_t kth, uint32_t* kept) {
  int64_t excess = -k;
  for (int64_t word = 0; word < pitch / 32; ++word) {
    kept[word] = bits_from(keys + word * 32, kth);
    excess += std::popcount(kept[word]);
  }
  for (int64_t word = pitch / 32 - 1; excess > 0; --word) {
    uint32_t equal = kept[word] & ~bits_from(keys + word * 32, kth + 1);
    while (std::popcount(equal) > excess) equal &= equal - 1;
    kept[word] &= ~equal;
    excess -= std::popcount(equal);
  }
}

// Adds bits [first, first + count) of `from` to `words`, from bit `at` on.
inline void copy_bits(const uint32_t* from, int64_t first, uint64_t* words, int64_t at, int64_t count) {
  for (int64_t done = 0, some; done < count; done += some) {
    const int64_t source = first + done, target = at + done;
    some = std::min({count - done, 32 - source % 32, 64 - target % 64});
    words[target / 64] |= (uint64_t{from[source / 32]} >> source % 32 & low_bits(some)) << target % 64;
  }
}

template <class T>
void load_keys(const T* weight, int32_t* keys, int64_t cols) {
  for (int64_t i = 0; i < cols; ++i) keys[i] = magnitude_key(weight[i]);
}

template <class T>
void load_scaled_keys(const T* weight, const float* scale, int32_t* keys, int64_t cols) {
  int64_t i = 0;
#if !defined(SPARSEKIT_SCALAR)
  for (; i + Keys32::kLanes <= cols; i += Keys32::kLanes)
    store(keys + i, magnitude_keys(weight + i, scale + i).lanes, false);
#endif
  for (; i < cols; ++i) keys[i] = magnitude_key(to_float(weight[i]) * scale[i]);
}

// Zeroes the keys of a row that 2:4 drops. A tail shorter than a group stays.
inline void keep24(int32_t* keys, int64_t cols) {
  int64_t i = 0;
#if !defined(SPARSEKIT_SCALAR)
  for (; i + Keys32::kLanes <= cols; i += Keys32::kLanes)
    store_kept(keys + i, keys + i, nm_keep<4>(Keys32{load(keys + i)}, 2), false);
#endif
  // The rule of keep_first, written out: a call of it here cost tier_scores, which never comes here, 5 % of its time.
  for (; i + 4 <= cols; i += 4) {
    std::array<int32_t, 4> key;
    std::copy_n(keys + i, 4, key.begin());
    for (int j = 0; j < 4; ++j) {
      int before = 0;
      for (int other = 0; other < 4; ++other) before += key[other] > key[j] || (key[other] == key[j] && other < j);
      if (before >= 2) keys[i + j] = 0;
    }
  }
}

// Of a matrix whose entries are ranked by magnitude, times a scale of its column where one is given.
struct StripTopkArgs {
  const void* weight;
  int64_t weight_stride;
  const float* scale;
  int64_t rows, cols, block_rows, block_cols, k;
};

class StripTopk {
 public:
  explicit StripTopk(const StripTopkArgs& a)
      : a_(a),
        pitch_((std::min(a.block_rows, a.rows) * std::min(a.block_cols, a.cols) + kKeysAtOnce - 1) / kKeysAtOnce *
               kKeysAtOnce),
        blocks_(std::max<int64_t>(1, kStripEntries / pitch_)),
        search_(pitch_, blocks_),
        keys_(new int32_t[blocks_ * pitch_]),
        kth_(new int32_t[blocks_]),
        kept_(new uint32_t[blocks_ * pitch_ / 32]),
        topk_blocks_(new int64_t[blocks_]) {}

  // How many blocks a strip has at most.
  int64_t blocks() const { return blocks_; }

  // clear() begins a strip; add() says that one of its blocks is a top-k block.
  void clear() { topk_count_ = 0; }
  void add(int64_t block) { topk_blocks_[topk_count_++] = block; }

  // Finds what the top-k blocks keep. kCols is the number of columns of a block if it is known when compiling, else 0.
  // If `nested`, only entries that 2:4 keeps and that are not 0 can be kept.
  template <class T, int64_t kCols>
  void choose(const BlockStrip& strip, bool nested) {
    for (int64_t i = 0; i < topk_count_; ++i) {
      const int64_t left = strip.left + topk_blocks_[i] * a_.block_cols, cols = cols_of(strip, i);
      const T* weight = static_cast<const T*>(a_.weight) + strip.top * a_.weight_stride + left;
      load_block<kCols>(weight, a_.scale ? a_.scale + left : nullptr, strip.rows, cols, keys_.get() + i * pitch_);
      for (int64_t row = 0; nested && row < strip.rows; ++row) keep24(keys_.get() + i * pitch_ + row * cols, cols);
    }
    const auto count_of = [&](int64_t i) { return strip.rows * cols_of(strip, i); };
    for (int64_t i = 0; i < topk_count_; ++i)
      std::fill(keys_.get() + i * pitch_ + count_of(i), keys_.get() + (i + 1) * pitch_, -1);
    if (a_.scale)
      search_.find<float>(keys_.get(), topk_count_, count_of, a_.k, kth_.get());
    else
      search_.find<T>(keys_.get(), topk_count_, count_of, a_.k, kth_.get());
    for (int64_t i = 0; i < topk_count_; ++i)
      keep_topk(keys_.get() + i * pitch_, pitch_, a_.k, nested ? std::max(kth_[i], 1) : kth_[i],
                kept_.get() + i * pitch_ / 32);
  }

  // Sets the bits of the columns that the top-k blocks keep in one row of the strip.
  template <int64_t kCols>
  void add_kept_bits(const BlockStrip& strip, int64_t row, uint64_t* kept) const {
    for (int64_t i = 0; i < topk_count_; ++i) {
      const uint32_t* bits = kept_.get() + i * pitch_ / 32;
      const int64_t left = topk_blocks_[i] * a_.block_cols, cols = cols_of(strip, i);
      if (kCols == 16 && cols == 16)
        kept[left / 64] |= uint64_t{bits[row / 2] >> row % 2 * 16 & 0xffff} << left % 64;
      else
        copy_bits(bits, row * cols, kept, left, cols);
    }
  }

  // The bits of a block, the first row in the lowest. Columns are `cols_of` the block apart.
  const uint32_t* kept_bits(int64_t i) const { return kept_.get() + i * pitch_ / 32; }

 private:
  template <int64_t kCols, class T>
  void load_block(const T* weight, const float* scale, int64_t rows, int64_t cols, int32_t* keys) const {
    for (int64_t row = 0; row < rows; ++row, weight += a_.weight_stride, keys += cols) {
      __builtin_prefetch(weight + blocks_ * a_.block_cols, 0, 2);  // the next strip, into the second-level cache
      if (scale)
        load_scaled_keys(weight, scale, keys, cols);
      else if (kCols > 0 && cols == kCols)
        load_keys(weight, keys, kCols);
      else
        load_keys(weight, keys, cols);
    }
  }
  int64_t cols_of(const BlockStrip& strip, int64_t i) const {
    return std::min(a_.block_cols, strip.cols - topk_blocks_[i] * a_.block_cols);
  }

  StripTopkArgs a_;
  int64_t pitch_, blocks_, topk_count_ = 0;  // pitch_: keys from one block to the next
  KthSearch search_;
  std::unique_ptr<int32_t[]> keys_, kth_;   // of the top-k blocks, one after the other
  std::unique_ptr<uint32_t[]> kept_;        // a bit for each key
  std::unique_ptr<int64_t[]> topk_blocks_;  // the index of each top-k block in the strip
};

}  // namespace
}  // namespace sparsekit::SPARSEKIT_LEVEL
