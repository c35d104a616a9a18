// Applies a mask that is given as bits to a row of weights: writes the pruned row and the mask as bytes, and adds the
// kept magnitudes to the column sums.
#pragma once

#include "lanes.h"

namespace sparsekit::SPARSEKIT_LEVEL {
namespace {

template <class T>
struct Applied {
  T* pruned;
  bool* mask;
  float* total;  // += the kept magnitudes, times a scale where one is given
  int64_t cols;
  bool stream;
};

#if !defined(SPARSEKIT_SCALAR)

template <bool kScaled, class T>
void apply64(const T* weight, uint64_t kept, const float* scale, const Applied<T>& to, int64_t column) {
  constexpr int kWide = Keys32::kLanes, kNarrow = kWide * 4 / sizeof(T);
  [&]<int... i>(std::integer_sequence<int, i...>) {
    (store_kept(to.pruned + column + i * kNarrow, weight + column + i * kNarrow, keep_bits<T, i * kNarrow>(kept),
                to.stream), ...);
  }(std::make_integer_sequence<int, 64 / kNarrow>());
  [&]<int... i>(std::integer_sequence<int, i...>) {
    (add_kept(magnitudes<kScaled>(weight + column + i * kWide, kScaled ? scale + column + i * kWide : nullptr),
              keep_bits<float, i * kWide>(kept), to.total + column + i * kWide), ...);
  }(std::make_integer_sequence<int, 64 / kWide>());
  store_mask64(to.mask + column, kept, to.stream);
}

#endif

template <bool kScaled, class T>
void apply_bits(const T* weight, const uint64_t* kept, const float* scale, const Applied<T>& to) {
  int64_t i = 0;
#if !defined(SPARSEKIT_SCALAR)
  for (; i + 64 <= to.cols; i += 64) {
    for (int line = 0; line < static_cast<int>(sizeof(T)); ++line)
      __builtin_prefetch(weight + i + to.cols + line * 64 / sizeof(T), 0, 2);  // the next strip
    apply64<kScaled>(weight, kept[i / 64], scale, to, i);
  }
#endif
  for (; i < to.cols; ++i) {
    to.mask[i] = kept[i / 64] >> i % 64 & 1;
    to.pruned[i] = to.mask[i] ? weight[i] : T{};
    const float score = std::fabs(to_float(weight[i])) * (kScaled ? scale[i] : 1.0f);
    to.total[i] += to.mask[i] ? score : 0.0f;
  }
}

template <class T>
void apply_bits(const T* weight, const uint64_t* kept, const float* scale, const Applied<T>& to) {
  scale ? apply_bits<true>(weight, kept, scale, to) : apply_bits<false>(weight, kept, scale, to);
}

}  // namespace
}  // namespace sparsekit::SPARSEKIT_LEVEL
