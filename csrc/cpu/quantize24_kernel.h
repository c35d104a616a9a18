// quantize24: finds the scale of every group of columns of a row, and the code that is nearest to each kept value.
#pragma once

#include "dequantize24.h"

namespace sparsekit::SPARSEKIT_LEVEL {
namespace {

constexpr int largest_code(QuantType type) { return type == QuantType::Int8 ? 127 : type == QuantType::Int4 ? 7 : 1; }

template <class T>
constexpr double kLargestNumber = 0x1.fffffep127;
template <>
constexpr double kLargestNumber<F16> = 65504;
template <>
constexpr double kLargestNumber<BF16> = 0x1.fep127;

constexpr std::array<double, 15> kNf4Middles = [] {
  std::array<double, 15> middles{};
  for (int i = 0; i < 15; ++i) middles[i] = (double{kNf4Levels[i]} + double{kNf4Levels[i + 1]}) / 2;
  return middles;
}();

// The largest magnitude over the largest code, rounded upward to bfloat16, but so that their product is finite in T.
template <class T, QuantType type>
BF16 scale_for(int32_t largest_bits) {
  constexpr double most = kLargestNumber<T> / largest_code(type);
  const int32_t most_bits = std::bit_cast<int32_t>(static_cast<float>(most));
  const float scale = std::bit_cast<float>(std::min(largest_bits, 0x7f800000)) / largest_code(type);
  return {static_cast<uint16_t>(std::min(std::bit_cast<int32_t>(scale) + 0xffff, most_bits) >> 16)};
}

template <QuantType type>
uint8_t nearest_code(double ratio) {
  ratio = ratio == ratio ? ratio : 0;
  if constexpr (type == QuantType::Nf4) {
    int code = 0;
    for (double middle : kNf4Middles) code += middle < ratio;
    return static_cast<uint8_t>(code);
  } else {
    constexpr double most = largest_code(type);
    return static_cast<uint8_t>(static_cast<int>(std::min(std::max(std::rint(ratio), -most), most)));
  }
}

template <class T, QuantType type>
void quantize_rows(const Quantize24Args& a, int64_t begin, int64_t end) {
  const int64_t kept = 2 * (a.cols / 4) + a.cols % 4, groups = (a.cols + a.group - 1) / a.group;
  const int64_t stored = type == QuantType::Int8 ? kept : (kept + 1) / 2;
  const std::unique_ptr<float[]> numbers(new float[kept]);
  const std::unique_ptr<uint8_t[]> codes(new uint8_t[kept + 1]());
  for (int64_t row = begin; row < end; ++row) {
    const T* values = static_cast<const T*>(a.values) + row * kept;
    for (int64_t i = 0; i < kept; ++i) numbers[i] = to_float(values[i]);
    for (int64_t g = 0; g < groups; ++g) {
      const ValueRange range(g, a.cols, a.group);
      int32_t largest = 0;
      for (int64_t i = range.begin; i < range.end; ++i)
        largest = std::max(largest, std::bit_cast<int32_t>(numbers[i]) & 0x7fffffff);
      const BF16 scale = scale_for<T, type>(largest);
      a.scales[row * groups + g] = scale.bits;
      const double step = scale.bits ? to_float(scale) : 1;
      for (int64_t i = range.begin; i < range.end; ++i) codes[i] = nearest_code<type>(numbers[i] / step);
    }
    uint8_t* to = a.codes + row * stored;
    if constexpr (type == QuantType::Int8)
      std::copy_n(codes.get(), kept, to);
    else
      for (int64_t i = 0; i < stored; ++i) to[i] = static_cast<uint8_t>((codes[2 * i] & 15) | codes[2 * i + 1] << 4);
  }
}

}  // namespace

// Rows [begin, end).
void quantize24(const Quantize24Args& a, int64_t begin, int64_t end) {
  dispatch(a.dtype, [&]<class T>(T*) {
    const auto rows = a.type == QuantType::Int8   ? quantize_rows<T, QuantType::Int8>
                      : a.type == QuantType::Int4 ? quantize_rows<T, QuantType::Int4>
                                                  : quantize_rows<T, QuantType::Nf4>;
    rows(a, begin, end);
  });
}

}  // namespace sparsekit::SPARSEKIT_LEVEL
