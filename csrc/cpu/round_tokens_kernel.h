// Rounds tokens to 8 bits or fewer, each by a step of its own: the inputs of integer products.
#pragma once

#include "elements.h"

namespace sparsekit::SPARSEKIT_LEVEL {
namespace {

constexpr float kSmallestInput = 1e-30f;  // as in ops/linear24q_int8.py and ops/int8_linear.py

// Returns the largest magnitude of a token, which is NaN if one of its entries is an Inf or a NaN.
template <class T>
float largest_input(const T* x, int64_t cols) {
  int32_t bits = 0;  // those of NaN are above those of Inf
  for (int64_t i = 0; i < cols; ++i) bits = std::max(bits, std::bit_cast<int32_t>(to_float(x[i])) & 0x7fffffff);
  if (bits >= 0x7f800000) return std::numeric_limits<float>::quiet_NaN();
  return std::max(std::bit_cast<float>(bits), kSmallestInput);
}

// Writes `count` entries times `factor`, to the nearest integer, ties to even, plus `offset`.
template <class T, class Code>
void round_inputs(const T* x, int64_t count, float factor, int32_t offset, Code* codes) {
  for (int64_t i = 0; i < count; ++i)
    codes[i] = static_cast<Code>(static_cast<int32_t>(std::rint(to_float(x[i]) * factor)) + offset);
}

}  // namespace

inline void round_tokens(const RoundTokensArgs& a, int64_t begin, int64_t end) {
  const float limit = static_cast<float>(a.limit);
  const int32_t zero = static_cast<int32_t>(a.limit) + 1;
  dispatch(a.dtype, [&]<class T>(T*) {
    for (int64_t token = begin; token < end; ++token) {
      const T* x = static_cast<const T*>(a.x) + token * a.cols;
      uint8_t* codes = a.codes + token * a.cols;
      const float largest = largest_input(x, a.cols);
      a.steps[token] = largest / limit;
      if (std::isnan(largest))
        std::fill_n(codes, a.cols, static_cast<uint8_t>(zero));
      else
        round_inputs(x, a.cols, limit / largest, zero, codes);
    }
  });
}

}  // namespace sparsekit::SPARSEKIT_LEVEL
