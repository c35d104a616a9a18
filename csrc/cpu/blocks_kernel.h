// Block scores and the top k of every block.
#pragma once

#include "scalar.h"

namespace sparsekit::SPARSEKIT_LEVEL {
namespace {

// The order of additions is the definition: rows one after the other, then columns by halves.
template <class T>
float block_score(const BlockScoresArgs& a, int64_t block_row, int64_t block_col) {
  const int64_t top = block_row * a.block_rows, left = block_col * a.block_cols;
  const int64_t rows = std::min(a.block_rows, a.rows - top), cols = std::min(a.block_cols, a.cols - left);
  int64_t width = static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(a.block_cols)));
  const std::unique_ptr<float[]> total(new float[width]());
  for (int64_t i = 0; i < rows; ++i) {
    const T* weight = static_cast<const T*>(a.weight) + (top + i) * a.weight_stride + left;
    for (int64_t j = 0; j < cols; ++j) {
      const float score = std::fabs(to_float(weight[j])) * (a.scale ? a.scale[left + j] : 1.0f);
      total[j] += !a.mask || a.mask[(top + i) * a.cols + left + j] ? score : 0.0f;
    }
  }
  for (; width > 1; width /= 2)
    for (int64_t j = 0; j < width / 2; ++j) total[j] += total[j + width / 2];
  return total[0];
}

// The k-th place goes to whom fewer than k others precede: a larger key, or an equal one at a lower index.
template <class T>
void block_topk_one(const BlockTopkArgs& a, int64_t block_row, int64_t block_col) {
  const int64_t top = block_row * a.block_rows, left = block_col * a.block_cols;
  const int64_t rows = std::min(a.block_rows, a.rows - top), cols = std::min(a.block_cols, a.cols - left);
  const std::unique_ptr<int64_t[]> order(new int64_t[rows * cols]);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < cols; ++j) {
      const T* score = static_cast<const T*>(a.score) + (top + i) * a.score_stride + left;
      order[i * cols + j] = static_cast<int64_t>(~magnitude_key(score[j])) << 32 | (i * cols + j);
      a.mask[(top + i) * a.cols + left + j] = false;
    }
  const int64_t kept = std::min(a.k, rows * cols);
  std::nth_element(order.get(), order.get() + kept, order.get() + rows * cols);
  for (int64_t place = 0; place < kept; ++place) {
    const int64_t index = order[place] & 0xffffffff;
    a.mask[(top + index / cols) * a.cols + left + index % cols] = true;
  }
}

}  // namespace

void block_scores(const BlockScoresArgs& a, int64_t begin, int64_t end) {
  const int64_t blocks = (a.cols + a.block_cols - 1) / a.block_cols;
  dispatch(a.dtype, [&]<class T>(T*) {
    for (int64_t row = begin; row < end; ++row)
      for (int64_t col = 0; col < blocks; ++col) a.scores[row * blocks + col] = block_score<T>(a, row, col);
  });
}

void block_topk(const BlockTopkArgs& a, int64_t begin, int64_t end) {
  const int64_t blocks = (a.cols + a.block_cols - 1) / a.block_cols;
  dispatch(a.dtype, [&]<class T>(T*) {
    for (int64_t row = begin; row < end; ++row)
      for (int64_t col = 0; col < blocks; ++col) block_topk_one<T>(a, row, col);
  });
}

}  // namespace sparsekit::SPARSEKIT_LEVEL
