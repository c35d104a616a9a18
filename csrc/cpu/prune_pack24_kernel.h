// 2:4 pruning and packing in one pass: the mask stays in registers, and the dense weight is read once.
#pragma once

#include "compress_expand.h"
#include "nm_kernel.h"

namespace sparsekit::SPARSEKIT_LEVEL {
namespace {

template <bool kScaled, class T>
void prune_pack24_row(const T* weight, const float* scale, T* values, uint8_t* bitmask, int64_t cols, bool stream) {
  const int64_t whole = cols / 64 * 64, rest = cols - whole, full = rest / 4 * 4;
  for (int64_t i = 0; i < whole; i += 64) {
    const uint64_t kept = kept24<kScaled>(weight + i, kScaled ? scale + i : nullptr);
    store_bytes(bitmask + i / 8, kept, 8);
    compress64(weight + i, kept, values + i / 2, stream);
  }
  if (rest == 0) return;
  const uint64_t kept = kept24<kScaled>(weight + whole, kScaled ? scale + whole : nullptr, rest);
  T padded[64] = {}, packed[32];
  std::copy_n(weight + whole, full, padded);
  compress64(padded, kept & low_bits(full), packed, false);
  store_bytes(bitmask + whole / 8, kept, (rest + 7) / 8);
  std::copy_n(weight + whole + full, rest - full, std::copy_n(packed, full / 2, values + whole / 2));
}

}  // namespace

void prune_pack24(const PrunePack24Args& a, int64_t begin, int64_t end) {
  const int64_t stored = 2 * (a.cols / 4) + a.cols % 4, bytes = (a.cols + 7) / 8;
  dispatch(a.dtype, [&]<class T>(T*) {
    for (int64_t row = begin; row < end; ++row) {
      const T* weight = static_cast<const T*>(a.weight) + row * a.weight_stride;
      T* values = static_cast<T*>(a.values) + row * stored;
      uint8_t* bitmask = a.bitmask + row * bytes;
      const bool stream = a.stream && aligned(values);
      if (a.scale)
        prune_pack24_row<true>(weight, a.scale, values, bitmask, a.cols, stream);
      else
        prune_pack24_row<false>(weight, a.scale, values, bitmask, a.cols, stream);
    }
  });
  if (a.stream) fence();
}

}  // namespace sparsekit::SPARSEKIT_LEVEL
