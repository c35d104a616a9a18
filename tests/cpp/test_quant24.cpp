// quantize24 against the rule of every code: the level that is nearest in double, of two the even or the lower one.
#include <algorithm>

#include "check.h"

using namespace check;
using sparsekit::QuantType;

namespace {

constexpr double kNf4[] = {-1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f,
                           -0.28444138169288635f, -0.18477343022833234f, -0.09105003625154495f, 0.0f,
                           0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
                           0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f};

int expected_code(double ratio, QuantType type) {
  if (std::isnan(ratio)) ratio = 0;
  if (type != QuantType::Nf4) {
    const double most = type == QuantType::Int8 ? 127 : 7;
    return static_cast<int>(std::nearbyint(std::clamp(ratio, -most, most)));
  }
  int code = 0;
  while (code < 15 && ratio > (kNf4[code] + kNf4[code + 1]) / 2) ++code;
  return code;
}

// The least bfloat16 that is `largest / code` or more, unless `code` times it would not be finite.
uint16_t expected_scale(float largest, int code, DType dtype) {
  const double end = dtype == DType::F32 ? 0x1.fffffep127 : dtype == DType::F16 ? 65504 : 0x1.fep127;
  const float quotient = largest / static_cast<float>(code), most = static_cast<float>(end / code);
  uint16_t bits = 0;
  const auto value = [&] { return get(&bits, 0, DType::BF16); };
  while (value() < quotient) ++bits;  // the bits are in the order of the numbers
  while (value() > most) --bits;
  return bits;
}

void run(const Kernels& level, QuantType type, DType dtype, int64_t rows, int64_t cols, int64_t group, Flush flush,
         Random& random) {
  const int64_t kept = 2 * (cols / 4) + cols % 4, groups = (cols + group - 1) / group;
  const int64_t stored = type == QuantType::Int8 ? kept : (kept + 1) / 2;
  Buffer values(rows * kept * size_of(dtype), flush), codes(rows * stored, flush), scales(rows * groups * 2, flush);
  for (int64_t row = 0; row < rows; ++row)
    random.fill(values.data() + row * kept * size_of(dtype), kept, dtype,
                random.below(3) ? Values::Normal : random.below(2) ? Values::Ties : Values::Special);
  const sparsekit::Quantize24Args args{.values = values.data(), .codes = codes.as<uint8_t>(),
                                       .scales = scales.as<uint16_t>(), .cols = cols, .group = group, .type = type,
                                       .dtype = dtype};
  level.quantize24(args, rows / 2, rows);
  level.quantize24(args, 0, rows / 2);
  const std::string what = std::string("quantize24 ") + level.simd_level + " " + name(dtype) + " type " +
                           std::to_string(static_cast<int>(type)) + " " + std::to_string(rows) + " x " +
                           std::to_string(cols) + " groups of " + std::to_string(group);
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t begin = g * group / 2, end = g + 1 == groups ? kept : begin + group / 2;
      float largest = 0;
      for (int64_t i = begin; i < end; ++i) {
        const float magnitude = std::fabs(get(values.data(), row * kept + i, dtype));
        largest = std::isnan(magnitude) ? INFINITY : std::max(largest, magnitude);
      }
      const uint16_t scale = scales.as<uint16_t>()[row * groups + g];
      const int most = type == QuantType::Int8 ? 127 : type == QuantType::Int4 ? 7 : 1;
      expect(scale == expected_scale(largest, most, dtype), what + ": the scale of row " + std::to_string(row));
      const double step = scale ? get(&scale, 0, DType::BF16) : 1;
      for (int64_t i = begin; i < end; ++i) {
        const int code = expected_code(get(values.data(), row * kept + i, dtype) / step, type);
        const uint8_t* at = codes.as<uint8_t>() + row * stored + (type == QuantType::Int8 ? i : i / 2);
        const int got = type == QuantType::Int8 ? static_cast<int8_t>(*at) : *at >> i % 2 * 4 & 15;
        expect(got == (type == QuantType::Int8 ? code : code & 15), what + ": value " + std::to_string(i));
      }
      if (type != QuantType::Int8 && kept % 2) expect(codes.as<uint8_t>()[row * stored + stored - 1] < 16, what + ": end");
    }
}

}  // namespace

TEST(quant24) {
  uint64_t seed = 0;
  for (const Kernels* level : levels())
    for (QuantType type : {QuantType::Int8, QuantType::Int4, QuantType::Nf4})
      for (DType dtype : kDTypes)
        for (int64_t cols : {0, 1, 3, 4, 31, 64, 67, 130, 515})
          for (int64_t group : {8, 24, 64}) {
            Random random(++seed);
            run(*level, type, dtype, 1 + random.below(5), cols, group, random.below(2) ? Flush::End : Flush::Begin, random);
          }
}
