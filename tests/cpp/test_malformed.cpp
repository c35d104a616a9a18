// What no packer writes: any bits in a bitmask, positions beyond a block, a map that does not belong to its blocks. The
// products of that mean nothing, but nothing outside of the buffers is read or written: they lie between pages that fault.
#include <algorithm>

#include "../../csrc/cpu/cpu_features.h"
#include "check.h"

using namespace check;
using sparsekit::RangeBody;

namespace {

void in_one_piece(int64_t count, int64_t, RangeBody body, void* context) { body(0, count, context); }

// All ones, or any bits.
void fill_bits(Random& random, Buffer& bits) {
  const bool ones = random.below(2);
  for (size_t i = 0; i < bits.size(); ++i) bits.data()[i] = static_cast<char>(ones ? 0xff : random.bits());
}

void two_of_four(const Kernels& level, DType dtype, int64_t tokens, int64_t cols, Flush flush, uint64_t seed) {
  Random random(seed);
  const size_t size = size_of(dtype);
  const int64_t rows = 1 + random.below(9), stored = 2 * (cols / 4) + cols % 4, bytes = (cols + 7) / 8;
  Buffer x(tokens * cols * size, flush), values(rows * stored * size, flush), bitmask(rows * bytes, flush),
      y(tokens * rows * size, flush), weight(rows * cols * size, flush);
  random.fill(x.data(), tokens * cols, dtype, Values::Special);
  random.fill(values.data(), rows * stored, dtype, Values::Normal);
  fill_bits(random, bitmask);
  level.linear24({.x = x.data(), .values = values.data(), .bitmask = bitmask.as<uint8_t>(), .bias = nullptr,
                  .y = y.data(), .tokens = tokens, .rows = rows, .cols = cols, .threads = 2, .dtype = dtype},
                 in_one_piece);
  level.unpack24({.values = values.data(), .bitmask = bitmask.as<uint8_t>(), .weight = weight.data(), .cols = cols,
                  .dtype = dtype, .stream = false},
                 0, rows);
}

// A mask of bytes that are neither 0 nor 1, as a view of other bytes has them.
void bytes_for_bools(const Kernels& level, DType dtype, int64_t cols, Flush flush, uint64_t seed) {
  Random random(seed);
  const size_t size = size_of(dtype);
  const int64_t rows = 1 + random.below(9), stored = 2 * (cols / 4) + cols % 4;
  Buffer weight(rows * cols * size, flush), mask(rows * cols, flush), values(rows * stored * size, flush),
      bitmask(rows * ((cols + 7) / 8), flush), scores(rows * sizeof(float), flush);
  random.fill(weight.data(), rows * cols, dtype, Values::Ties);
  fill_bits(random, mask);
  level.pack24({.weight = weight.data(), .weight_stride = cols, .mask = mask.as<bool>(), .values = values.data(),
                .bitmask = bitmask.as<uint8_t>(), .cols = cols, .dtype = dtype, .stream = false},
               0, rows);
  level.block_scores({.weight = weight.data(), .weight_stride = cols, .scale = nullptr, .mask = mask.as<bool>(),
                      .scores = scores.as<float>(), .rows = rows, .cols = cols, .block_rows = 1, .block_cols = cols,
                      .dtype = dtype},
                     0, rows);
  for (int64_t row = 0; row < rows; ++row) {
    float sum = 0;
    for (int64_t i = row * cols; i < (row + 1) * cols; ++i)
      if (mask.data()[i]) sum += std::fabs(get(weight.data(), i, dtype));
    expect(scores.as<float>()[row] == sum, std::string("block_scores of any bytes for bools ") + level.simd_level);
  }
}

void tiered(const Kernels& level, DType dtype, int64_t tokens, int64_t block_rows, int64_t block_cols, Flush flush,
            uint64_t seed) {
  Random random(seed);
  const size_t item = size_of(dtype);
  const int64_t tall = 1 + random.below(3), wide = 1 + random.below(9), size = block_rows * block_cols, k = 5;
  const int64_t rows = tall * block_rows - random.below(8), cols = wide * block_cols - random.below(8);
  Buffer tiers(tall * wide, flush), starts((tall + 1) * 3 * sizeof(int32_t), flush);
  int32_t counts[3] = {};
  for (int64_t row = 0; row <= tall; ++row) {
    std::copy_n(counts, 3, starts.as<int32_t>() + 3 * row);
    for (int32_t& count : counts)
      if (row < tall) count += static_cast<int32_t>(random.below(wide + 1));  // not what the map says
  }
  for (size_t i = 0; i < tiers.size(); ++i) tiers.data()[i] = static_cast<char>(random.below(4));
  Buffer x(tokens * cols * item, flush), dense(counts[0] * size * item, flush), values(counts[1] * size / 2 * item, flush),
      bitmask(counts[1] * size / 8, flush), topk(counts[2] * k * item, flush),
      positions(counts[2] * k * (size <= 256 ? 1 : 2), flush), y(tokens * rows * item, flush);
  random.fill(x.data(), tokens * cols, dtype, Values::Special);
  random.fill(dense.data(), counts[0] * size, dtype, Values::Normal);
  random.fill(values.data(), counts[1] * size / 2, dtype, Values::Normal);
  random.fill(topk.data(), counts[2] * k, dtype, Values::Normal);
  fill_bits(random, bitmask);
  fill_bits(random, positions);
  level.linear_tiered({.x = x.data(), .tiers = tiers.as<uint8_t>(), .dense = dense.data(), .values = values.data(),
                       .bitmask = bitmask.as<uint8_t>(), .topk = topk.data(), .positions = positions.data(),
                       .starts = starts.as<int32_t>(), .bias = nullptr, .y = y.data(), .tokens = tokens, .rows = rows,
                       .cols = cols, .block_rows = block_rows, .block_cols = block_cols, .k = k, .threads = 2,
                       .dtype = dtype},
                      in_one_piece);
}

}  // namespace

TEST(malformed) {
  uint64_t seed = 0;
  for (const Kernels* level : levels())
    for (DType dtype : kDTypes)
      for (Flush flush : {Flush::Begin, Flush::End})
        for (int64_t tokens : {1, 2, 5, 15, 16, 17, 33, 130}) {
          for (int64_t cols : {1, 3, 4, 5, 6, 7, 8, 11, 15, 31, 39, 63, 64, 71, 127, 263, 1031})
            two_of_four(*level, dtype, tokens, cols, flush, ++seed);
          ++seed;
          bytes_for_bools(*level, dtype, 1 + static_cast<int64_t>(seed % 200), flush, seed);
          for (const auto& [rows, cols] : {std::pair{8, 8}, {16, 16}, {16, 24}, {32, 32}})
            for (int again = 0; again < 4; ++again) tiered(*level, dtype, tokens, rows, cols, flush, ++seed);
        }
}

// A level runs only where the processor has all that it was compiled for.
TEST(features) {
  for (const Kernels* level : {&sparsekit::kernels_scalar,
#if defined(__x86_64__)
                               &sparsekit::kernels_avx2, &sparsekit::kernels_avx512, &sparsekit::kernels_avx512_bf16
#endif
                              }) {
    const std::string what = std::string("features of ") + level->simd_level;
    expect(sparsekit::has_all(level->features, [](std::string_view) { return true; }), what);
    const bool needed = level != &sparsekit::kernels_scalar;
    for (std::string_view one : {"avx2", "fma", "f16c", "bmi", "bmi2", "lzcnt", "popcnt"})
      expect(sparsekit::has_all(level->features, [&](std::string_view name) { return name != one; }) != needed,
             what + " without " + std::string(one));
  }
  expect(!sparsekit::has_feature("no such feature"), "an unknown feature");
}
