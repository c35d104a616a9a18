// What the top-k blocks of a strip keep, as bits, row by row.
#pragma once

#include "block_topk_kernel.h"
#include "nm_kernel.h"

namespace sparsekit::SPARSEKIT_LEVEL {
namespace {

// Adds bits [first, first + count) of `from` to `words`, from bit `at` on.
inline void copy_bits(const uint32_t* from, int64_t first, uint64_t* words, int64_t at, int64_t count) {
  for (int64_t done = 0, some; done < count; done += some) {
    const int64_t source = first + done, target = at + done;
    some = std::min({count - done, 32 - source % 32, 64 - target % 64});
    words[target / 64] |= (uint64_t{from[source / 32]} >> source % 32 & low_bits(some)) << target % 64;
  }
}

template <class T>
void load_scaled_keys(const T* weight, const float* scale, int32_t* keys, int64_t cols) {
  int64_t i = 0;
#if !defined(SPARSEKIT_SCALAR)
  for (; scale && i + Keys32::kLanes <= cols; i += Keys32::kLanes)
    store(keys + i, magnitude_keys(weight + i, scale + i).lanes, false);
#endif
  for (; i < cols; ++i) keys[i] = scale ? magnitude_key(to_float(weight[i]) * scale[i]) : magnitude_key(weight[i]);
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

// Args is the struct of a kernel that ranks the entries of `weight` by magnitude times `scale`, and keeps `k`.
template <class Args>
class StripTopk {
 public:
  explicit StripTopk(const Args& a)
      : a_(a),
        pitch_(BlockKeys::padded(std::min(a.block_rows, a.rows) * std::min(a.block_cols, a.cols))),
        blocks_(std::max<int64_t>(1, kStripEntries / pitch_)),
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
    const auto keys_of = [&](int64_t i) {
      return BlockKeys{keys_.get() + i * pitch_, strip.rows * cols_of(strip, i)};
    };
    for (int64_t i = 0; i < topk_count_; ++i) {
      const int64_t left = strip.left + topk_blocks_[i] * a_.block_cols, cols = cols_of(strip, i);
      int32_t* keys = keys_.get() + i * pitch_;
      for (int64_t row = 0; row < strip.rows; ++row, keys += cols) {
        const T* weight = static_cast<const T*>(a_.weight) + (strip.top + row) * a_.weight_stride + left;
        if (a_.scale)
          load_scaled_keys(weight, a_.scale + left, keys, cols);
        else if (cols == kCols)
          load_keys<kCols>(weight, keys, cols);
        else
          load_keys<0>(weight, keys, cols);
        if (nested) keep24(keys, cols);
      }
      std::fill(keys, keys_.get() + i * pitch_ + keys_of(i).end(), -1);
    }
    kth_of_blocks(keys_of, topk_count_, a_.k, kth_.get());
    for (int64_t i = 0; i < topk_count_; ++i)
      keep_topk(keys_of(i), a_.k, nested ? std::max(kth_[i], 1) : kth_[i], kept_.get() + i * pitch_ / 32);
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

 private:
  int64_t cols_of(const BlockStrip& strip, int64_t i) const {
    return std::min(a_.block_cols, strip.cols - topk_blocks_[i] * a_.block_cols);
  }

  const Args& a_;
  int64_t pitch_, blocks_, topk_count_ = 0;  // pitch_: keys from one block to the next
  std::unique_ptr<int32_t[]> keys_, kth_;    // of the top-k blocks, one after the other
  std::unique_ptr<uint32_t[]> kept_;         // a bit for each key
  std::unique_ptr<int64_t[]> topk_blocks_;   // the index of each top-k block in the strip
};

}  // namespace
}  // namespace sparsekit::SPARSEKIT_LEVEL
