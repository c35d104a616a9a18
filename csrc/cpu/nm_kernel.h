// N:M masks: keep the n largest magnitudes of every m.
#pragma once

#include "scalar.h"

namespace sparsekit::SPARSEKIT_LEVEL {
namespace {

// One group of `count` entries: an entry stays if fewer than n others go before it.
inline void nm_group(const int32_t* key, bool* mask, int n, int count) {
  for (int i = 0; i < count; ++i) {
    int before = 0;
    for (int j = 0; j < i; ++j) before += key[j] >= key[i];
    for (int j = i + 1; j < count; ++j) before += key[j] > key[i];
    mask[i] = before < n;
  }
}

template <class T>
void nm_row(const T* weight, const float* scale, T* pruned, bool* mask, int64_t cols, int n, int m) {
  const int64_t full = cols / m * m;
  int32_t key[32];
  for (int64_t start = 0; start < full; start += m) {
    for (int i = 0; i < m; ++i)
      key[i] = scale ? magnitude_key(to_float(weight[start + i]) * scale[start + i]) : magnitude_key(weight[start + i]);
    nm_group(key, mask + start, n, m);
  }
  for (int64_t i = full; i < cols; ++i) mask[i] = true;
  if (pruned)
    for (int64_t i = 0; i < cols; ++i) pruned[i] = mask[i] ? weight[i] : T{};
}

}  // namespace

void nm(const NmArgs& a, int64_t begin, int64_t end) {
  dispatch(a.dtype, [&]<class T>(T*) {
    for (int64_t row = begin; row < end; ++row)
      nm_row(static_cast<const T*>(a.weight) + row * a.weight_stride, a.scale,
             a.pruned ? static_cast<T*>(a.pruned) + row * a.pruned_stride : nullptr, a.mask + row * a.cols, a.cols,
             a.n, a.m);
  });
}

}  // namespace sparsekit::SPARSEKIT_LEVEL
