// N:M masks: an entry is kept if fewer than n entries of its group of m rank before it, by larger magnitude or, where
// magnitudes are equal, by lower index.
#pragma once

#include "lanes.h"

namespace sparsekit::SPARSEKIT_LEVEL {
namespace {

template <class T>
struct NmRow {
  const T* weight;
  const float* scale;  // or null
  T* pruned;           // or null
  bool* mask;          // or null
  uint8_t* bits;       // or null
  bool stream_mask, stream_pruned;
};

template <class T>
int32_t nm_key(const NmRow<T>& row, int64_t i) {
  return row.scale ? magnitude_key(to_float(row.weight[i]) * row.scale[i]) : magnitude_key(row.weight[i]);
}

// Any n:m, for several groups at once: the compiler turns the loops over `lane` into vector instructions.
template <class T>
void nm_any(const NmRow<T>& row, int64_t cols, int n, int m) {
  constexpr int kGroups = 16;
  int32_t key[32][kGroups] = {}, before[32][kGroups];
  bool kept[32 * kGroups];
  for (int64_t start = 0; start < cols; start += kGroups * m) {
    const int groups = static_cast<int>(std::min<int64_t>(kGroups, (cols - start) / m));
    for (int lane = 0; lane < groups; ++lane)
      for (int i = 0; i < m; ++i) key[i][lane] = nm_key(row, start + lane * m + i);
    for (int i = 0; i < m; ++i)
      for (int lane = 0; lane < kGroups; ++lane) before[i][lane] = 0;
    for (int i = 0; i < m; ++i)
      for (int j = i + 1; j < m; ++j)
        for (int lane = 0; lane < kGroups; ++lane) {
          const int32_t later = key[j][lane] > key[i][lane];
          before[i][lane] += later;
          before[j][lane] += 1 - later;
        }
    const int64_t full = start + groups * m, end = std::min<int64_t>(start + kGroups * m, cols);
    bool* mask = row.mask ? row.mask + start : kept;
    for (int lane = 0; lane < groups; ++lane)
      for (int i = 0; i < m; ++i) mask[lane * m + i] = before[i][lane] < n;
    std::fill(mask + (full - start), mask + (end - start), true);
    if (row.pruned)
      for (int64_t i = start; i < end; ++i) row.pruned[i] = mask[i - start] ? row.weight[i] : T{};
    if (row.bits) pack_bits(mask, row.bits + start / 8, end - start);
  }
}

#if !defined(SPARSEKIT_SCALAR)

template <int M, class Keys, int... R>
auto nm_keep(Keys key, int n, std::integer_sequence<int, R...>) {
  Keys before{};
  ((before = count_greater(before, rotate<M, R + 1>(key), minus_wrapped<M, R + 1>(key))), ...);
  return less(before, n);
}

template <int M, class Keys>
auto nm_keep(Keys key, int n) {
  return nm_keep<M>(key, n, std::make_integer_sequence<int, M - 1>());
}

// Which entries from i on are kept, for as many as a vector of T holds.
template <int M, bool kScaled, class T>
auto nm_keep_at(const NmRow<T>& row, int64_t i, int n) {
  if constexpr (!kScaled)
    return nm_keep<M>(magnitude_keys(row.weight + i), n);
  else if constexpr (sizeof(T) == 4)
    return nm_keep<M>(magnitude_keys(row.weight + i, row.scale + i), n);
  else
    return join(nm_keep<M>(magnitude_keys(row.weight + i, row.scale + i), n),
                nm_keep<M>(magnitude_keys(row.weight + i + Keys32::kLanes, row.scale + i + Keys32::kLanes), n));
}

// Columns [0, cols), where cols is a multiple of kStep.
template <int M, bool kScaled, class T>
void nm_steps(NmRow<T> row, int64_t cols, int n) {
  constexpr int kLanes = Keys32::kLanes * 4 / sizeof(T);
  const auto keep_and_prune = [&](int64_t i) {
    const auto keep = nm_keep_at<M, kScaled>(row, i, n);
    if (row.pruned) store_kept(row.pruned + i, row.weight + i, keep, row.stream_pruned);
    return keep;
  };
  const auto keep16 = [&](int64_t i) {
    if constexpr (sizeof(T) == 4)
      return join(keep_and_prune(i), keep_and_prune(i + kLanes));
    else
      return keep_and_prune(i);
  };
  for (int64_t i = 0; i < cols; i += kStep) {
    const Keep8 keep = join(keep16(i), keep16(i + kStep / 2));
    if (row.mask) store_mask(row.mask + i, keep, row.stream_mask);
    if (row.bits) store_bytes(row.bits + i / 8, bits_of(keep), kStep / 8);
  }
}

template <int M, bool kScaled, class T>
void nm_grouped(const NmRow<T>& row, int64_t cols, int n) {
  const int64_t whole = cols / kStep * kStep, rest = cols - whole, full = rest / M * M;
  nm_steps<M, kScaled>(row, whole, n);
  if (rest == 0) return;
  T weight[kStep] = {};
  float scale[kStep] = {};
  bool mask[kStep];
  T pruned[kStep];
  std::copy_n(row.weight + whole, rest, weight);
  if (kScaled) std::copy_n(row.scale + whole, rest, scale);
  nm_steps<M, kScaled, T>({weight, scale, pruned, mask, nullptr, false, false}, kStep, n);
  std::fill(mask + full, mask + rest, true);
  std::copy(weight + full, weight + rest, pruned + full);
  if (row.mask) std::copy_n(mask, rest, row.mask + whole);
  if (row.bits) pack_bits(mask, row.bits + whole / 8, rest);
  if (row.pruned) std::copy_n(pruned, rest, row.pruned + whole);
}

#endif

// Which of 64 columns 2:4 keeps, the first in the lowest bit. kScaled says whether a scale is given.
template <bool kScaled, class T>
uint64_t kept24(const T* weight, const float* scale) {
  const NmRow<T> row{weight, kScaled ? scale : nullptr, nullptr, nullptr, nullptr, false, false};
  uint64_t bits = 0;
#if !defined(SPARSEKIT_SCALAR)
  const auto keep16 = [&](int i) {
    if constexpr (sizeof(T) == 4)
      return join(nm_keep_at<4, kScaled>(row, i, 2), nm_keep_at<4, kScaled>(row, i + Keys32::kLanes, 2));
    else
      return nm_keep_at<4, kScaled>(row, i, 2);
  };
  for (int i = 0; i < 64; i += kStep) bits |= uint64_t{bits_of(join(keep16(i), keep16(i + kStep / 2)))} << i;
#else
  bool mask[64];
  nm_any<T>({row.weight, row.scale, nullptr, mask, nullptr, false, false}, 64, 2, 4);
  for (int i = 0; i < 64; ++i) bits |= uint64_t{mask[i]} << i;
#endif
  return bits;
}

// The same for fewer columns: columns after the last whole group are kept, and bits after the last column are 0.
template <bool kScaled, class T>
uint64_t kept24(const T* weight, const float* scale, int64_t cols) {
  T padded[64] = {};
  float padded_scale[64] = {};
  std::copy_n(weight, cols, padded);
  if (kScaled) std::copy_n(scale, cols, padded_scale);
  const uint64_t full = low_bits(cols / 4 * 4);
  return (kept24<kScaled>(padded, padded_scale) & full) | (low_bits(cols) & ~full);
}

template <class T>
void nm_row(const NmRow<T>& row, int64_t cols, int n, int m) {
#if !defined(SPARSEKIT_SCALAR)
  if (m == 4) return row.scale ? nm_grouped<4, true>(row, cols, n) : nm_grouped<4, false>(row, cols, n);
  if constexpr (Keys32::kLanes >= 8)
    if (m == 8) return row.scale ? nm_grouped<8, true>(row, cols, n) : nm_grouped<8, false>(row, cols, n);
#endif
  nm_any(row, cols, n, m);
}

}  // namespace

void nm(const NmArgs& a, int64_t begin, int64_t end) {
  dispatch(a.dtype, [&]<class T>(T*) {
    for (int64_t i = begin; i < end; ++i) {
      const T* weight = static_cast<const T*>(a.weight) + i * a.weight_stride;
      T* pruned = a.pruned ? static_cast<T*>(a.pruned) + i * a.pruned_stride : nullptr;
      bool* mask = a.mask ? a.mask + i * a.cols : nullptr;
      uint8_t* bits = a.bits ? a.bits + i * ((a.cols + 7) / 8) : nullptr;
      const bool past_caches = a.stream && pruned != weight;  // in place, the cache lines have just been read
      nm_row<T>({weight, a.scale, pruned, mask, bits, a.stream && aligned(mask), past_caches && aligned(pruned)},
                a.cols, a.n, a.m);
    }
  });
  if (a.stream) fence();
}

}  // namespace sparsekit::SPARSEKIT_LEVEL
