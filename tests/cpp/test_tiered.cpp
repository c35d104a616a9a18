// linear_tiered against a sum in double, with a bound from the sizes of its terms.
#include <algorithm>

#include "check.h"

using namespace check;
using sparsekit::LinearTieredArgs;

namespace {

struct Case {
  DType dtype;
  int64_t tokens, rows, cols, block_rows, block_cols, k;
  bool bias;
  int threads;
  Flush flush;
};

std::string describe(const Kernels& level, const Case& c) {
  return std::string("linear_tiered ") + level.simd_level + " " + name(c.dtype) + " [" + std::to_string(c.tokens) + ", " +
         std::to_string(c.cols) + "] to " + std::to_string(c.rows) + " in blocks of " + std::to_string(c.block_rows) +
         "x" + std::to_string(c.block_cols) + ", k " + std::to_string(c.k) + (c.bias ? " bias" : "") +
         (c.flush == Flush::End ? " end" : " begin");
}

void run(const Kernels& level, const Case& c, uint64_t seed) {
  Random random(seed);
  const size_t item = size_of(c.dtype);
  const int64_t block_rows = (c.rows + c.block_rows - 1) / c.block_rows;
  const int64_t block_cols = (c.cols + c.block_cols - 1) / c.block_cols, size = c.block_rows * c.block_cols;
  const int64_t padded = block_cols * c.block_cols;
  const bool bytes = size <= 256;
  Buffer tiers(block_rows * block_cols, c.flush), starts((block_rows + 1) * 3 * sizeof(int32_t), c.flush);
  int32_t count[3] = {};
  const int64_t mix = random.below(4);  // one form alone, or all of them
  for (int64_t row = 0; row < block_rows; ++row) {
    std::copy_n(count, 3, starts.as<int32_t>() + 3 * row);
    for (int64_t col = 0; col < block_cols; ++col) {
      const int64_t tier = mix < 3 ? mix : random.below(3);
      tiers.as<uint8_t>()[row * block_cols + col] = static_cast<uint8_t>(tier);
      ++count[tier];
    }
  }
  std::copy_n(count, 3, starts.as<int32_t>() + 3 * block_rows);
  Buffer x(c.tokens * c.cols * item, c.flush), dense(count[0] * size * item, c.flush),
      values(count[1] * size / 2 * item, c.flush), bitmask(count[1] * size / 8, c.flush),
      topk(count[2] * c.k * item, c.flush), positions(count[2] * c.k * (bytes ? 1 : 2), c.flush),
      bias(c.rows * item, c.flush), y(c.tokens * c.rows * item, c.flush);
  random.fill(x.data(), c.tokens * c.cols, c.dtype, Values::Normal);
  random.fill(dense.data(), count[0] * size, c.dtype, Values::Normal);
  random.fill(values.data(), count[1] * size / 2, c.dtype, Values::Normal);
  random.fill(topk.data(), count[2] * c.k, c.dtype, Values::Normal);
  random.fill(bias.data(), c.rows, c.dtype, Values::Normal);
  std::vector<double> weight(block_rows * c.block_rows * padded);
  int64_t next[3] = {};
  for (int64_t block = 0; block < block_rows * block_cols; ++block) {
    const uint8_t tier = tiers.as<uint8_t>()[block];
    const int64_t i = next[tier]++;
    double* at = &weight[block / block_cols * c.block_rows * padded + block % block_cols * c.block_cols];
    const auto entry = [&](int64_t position) -> double& {
      return at[position / c.block_cols * padded + position % c.block_cols];
    };
    if (tier == 0)
      for (int64_t e = 0; e < size; ++e) entry(e) = get(dense.data(), i * size + e, c.dtype);
    if (tier == 1)
      for (int64_t group = 0; group < size / 4; ++group) {
        const int64_t a = random.below(4), b = (a + 1 + random.below(3)) % 4;
        uint8_t& byte = bitmask.as<uint8_t>()[i * size / 8 + group / 2];
        byte = static_cast<uint8_t>((group % 2 ? byte : 0) | (1 << a | 1 << b) << group % 2 * 4);
        entry(4 * group + std::min(a, b)) = get(values.data(), i * size / 2 + 2 * group, c.dtype);
        entry(4 * group + std::max(a, b)) = get(values.data(), i * size / 2 + 2 * group + 1, c.dtype);
      }
    if (tier == 2)
      for (int64_t e = 0; e < c.k; ++e) {  // a stretch of the block, so that the last entry of one is met
        const int64_t position = size - c.k + e, index = i * c.k + e;
        if (bytes)
          positions.as<uint8_t>()[index] = static_cast<uint8_t>(position);
        else
          positions.as<int16_t>()[index] = static_cast<int16_t>(position);
        entry(position) = get(topk.data(), index, c.dtype);
      }
  }
  level.linear_tiered({.x = x.data(), .tiers = tiers.as<uint8_t>(), .dense = dense.data(), .values = values.data(),
                       .bitmask = bitmask.as<uint8_t>(), .topk = topk.data(), .positions = positions.data(),
                       .starts = starts.as<int32_t>(), .bias = c.bias ? bias.data() : nullptr, .y = y.data(),
                       .tokens = c.tokens, .rows = c.rows, .cols = c.cols, .block_rows = c.block_rows,
                       .block_cols = c.block_cols, .k = c.k, .threads = c.threads, .dtype = c.dtype},
                      parallel_for);
  const double rounding = c.dtype == DType::F32 ? 0x1p-23 : c.dtype == DType::F16 ? 0x1p-10 : 0x1p-7;
  const double smallest = c.dtype == DType::F16 ? 0x1p-24 : 0.0;  // below 2^-14 an fp16 has no more digits than that
  for (int64_t token = 0; token < c.tokens; ++token)
    for (int64_t row = 0; row < c.rows; ++row) {
      double sum = c.bias ? get(bias.data(), row, c.dtype) : 0.0, size_of_terms = std::fabs(sum);
      for (int64_t col = 0; col < c.cols; ++col) {
        const double term = weight[row * padded + col] * get(x.data(), token * c.cols + col, c.dtype);
        sum += term;
        size_of_terms += std::fabs(term);
      }
      const double got = get(y.data(), token * c.rows + row, c.dtype);
      const double bound = rounding * std::fabs(sum) + smallest + 0x1p-22 * std::sqrt(c.cols + 1.0) * size_of_terms;
      if (!(std::fabs(got - sum) <= bound)) {
        expect(false, describe(level, c) + " at token " + std::to_string(token) + ", row " + std::to_string(row) + ": " +
                          std::to_string(got) + ", not " + std::to_string(sum));
        return;
      }
    }
}

}  // namespace

TEST(tiered) {
  constexpr int64_t kTokens[] = {1, 2, 3, 4, 5, 7, 9, 15, 16, 17, 31, 33, 64, 65, 100, 129};
  constexpr int64_t kSides[] = {1, 7, 16, 17, 31, 33, 64, 100, 130, 263};
  constexpr int64_t kBlocks[][2] = {{16, 16}, {16, 16}, {8, 8},     {8, 24},  {32, 32},
                                    {9, 40},  {64, 64}, {128, 128}, {16, 104}};
  uint64_t seed = 0;
  for (const Kernels* level : levels())
    for (DType dtype : kDTypes)
      for (int64_t tokens : kTokens)
        for (const auto& [block_rows, block_cols] : kBlocks) {
          Random random(++seed);
          const int64_t most = random.below(4) ? 10 : block_rows * block_cols;
          run(*level,
              {dtype, tokens, kSides[random.below(10)], kSides[random.below(10)], block_rows, block_cols,
               random.below(most + 1), random.below(2) == 1, 1 + static_cast<int>(random.below(3)),
               random.below(2) ? Flush::End : Flush::Begin},
              seed);
        }
}
