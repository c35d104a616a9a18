// Pruning and packing at once against pruning, then packing what the mask keeps.
#include "check.h"

using namespace check;

namespace {

struct Case {
  DType dtype;
  int64_t rows, cols, padding;
  bool scaled, stream;
  Flush flush;
  Values values;
};

void run(const Kernels& level, const Case& c, uint64_t seed) {
  const std::string what = std::string("prune_pack24 ") + level.simd_level + " " + name(c.dtype) + " [" +
                           std::to_string(c.rows) + ", " + std::to_string(c.cols) + "+" + std::to_string(c.padding) +
                           "]" + (c.scaled ? " scaled" : "") + (c.stream ? " stream" : "") +
                           (c.flush == Flush::End ? " end" : " begin") + " values " +
                           std::to_string(static_cast<int>(c.values));
  Random random(seed);
  const size_t size = size_of(c.dtype);
  const int64_t stride = c.cols + c.padding, span = (c.rows - 1) * stride + c.cols;
  const int64_t stored = 2 * (c.cols / 4) + c.cols % 4;
  Buffer weight(span * size, c.flush), scale(c.cols * 4, c.flush), mask(c.rows * c.cols, c.flush),
      values(c.rows * stored * size, c.flush), bitmask(c.rows * ((c.cols + 7) / 8), c.flush);
  random.fill(weight.data(), span, c.dtype, c.values);
  random.fill(scale.data(), c.cols, DType::F32, Values::Special);
  const float* factors = c.scaled ? scale.as<float>() : nullptr;
  sparsekit::kernels_scalar.nm({.weight = weight.data(), .weight_stride = stride, .pruned = nullptr, .pruned_stride = 0,
                               .scale = factors, .mask = mask.as<bool>(), .bits = nullptr, .cols = c.cols, .n = 2,
                               .m = 4, .dtype = c.dtype, .stream = false},
                              0, c.rows);
  for (auto [begin, end] : {std::pair{c.rows / 2, c.rows}, std::pair{int64_t{0}, c.rows / 2}})
    level.prune_pack24({.weight = weight.data(), .weight_stride = stride, .scale = factors, .values = values.data(),
                        .bitmask = bitmask.as<uint8_t>(), .cols = c.cols, .dtype = c.dtype, .stream = c.stream},
                       begin, end);
  std::vector<char> want;
  for (int64_t row = 0; row < c.rows; ++row)
    for (int64_t col = 0; col < c.cols; ++col) {
      const char* entry = weight.data() + (row * stride + col) * size;
      if (mask.as<bool>()[row * c.cols + col]) want.insert(want.end(), entry, entry + size);
    }
  expect(values.copy() == want, what + ": values");
  expect(bitmask.copy() == as_bits(mask.copy(), c.rows, c.cols), what + ": bitmask");
}

void literal(const Kernels& level) {
  const float weight[] = {1, -3, 2, 0, 5, 5, 5, 5, 7, -0.0f}, want[] = {-3, 2, 5, 5, 7, -0.0f};
  float values[6];
  uint8_t bitmask[2];
  level.prune_pack24({.weight = weight, .weight_stride = 10, .scale = nullptr, .values = values, .bitmask = bitmask,
                      .cols = 10, .dtype = DType::F32, .stream = false},
                     0, 1);
  expect(std::memcmp(values, want, sizeof want) == 0 && bitmask[0] == 0b00110110 && bitmask[1] == 0b11,
         std::string(level.simd_level) + ": literal prune_pack24");
}

}  // namespace

TEST(prune_pack24) {
  constexpr int64_t kCols[] = {1, 3, 4, 7, 8, 31, 60, 63, 64, 65, 100, 127, 128, 190, 517, 1024};
  uint64_t seed = 0;
  for (const Kernels* level : levels()) {
    literal(*level);
    for (DType dtype : kDTypes)
      for (int64_t cols : kCols)
        for (Values values : {Values::Normal, Values::Ties, Values::Bits, Values::Special})
          for (bool scaled : {false, true}) {
            Random random(++seed);
            run(*level,
                {dtype, 1 + random.below(4), cols, random.below(2) * random.below(40), scaled, random.below(2) == 1,
                 random.below(2) ? Flush::End : Flush::Begin, values},
                seed);
          }
  }
}
