// linear24 against a sum in double, with a bound from the sizes of its terms.
#include <algorithm>

#include "check.h"

using namespace check;
using sparsekit::Linear24Args;

namespace {

struct Case {
  DType dtype;
  int64_t tokens, rows, cols;
  bool bias;
  int threads;
  Flush flush;
};

void run(const Kernels& level, const Case& c, uint64_t seed) {
  const std::string what = std::string("linear24 ") + level.simd_level + " " + name(c.dtype) + " [" +
                           std::to_string(c.tokens) + ", " + std::to_string(c.cols) + "] to " + std::to_string(c.rows) +
                           (c.bias ? " bias" : "") + (c.flush == Flush::End ? " end" : " begin");
  Random random(seed);
  const size_t size = size_of(c.dtype);
  const int64_t stored = 2 * (c.cols / 4) + c.cols % 4, bytes = (c.cols + 7) / 8;
  Buffer x(c.tokens * c.cols * size, c.flush), values(c.rows * stored * size, c.flush), bitmask(c.rows * bytes, c.flush),
      bias(c.rows * size, c.flush), y(c.tokens * c.rows * size, c.flush);
  random.fill(x.data(), c.tokens * c.cols, c.dtype, Values::Normal);
  random.fill(values.data(), c.rows * stored, c.dtype, Values::Normal);
  random.fill(bias.data(), c.rows, c.dtype, Values::Normal);
  std::vector<int64_t> column;  // of every value
  std::memset(bitmask.data(), 0, bitmask.size());
  for (int64_t row = 0; row < c.rows; ++row)
    for (int64_t start = 0; start < c.cols; start += 4) {
      const int64_t a = random.below(4), b = (a + 1 + random.below(3)) % 4;
      for (int64_t i = start; i < std::min(start + 4, c.cols); ++i)
        if (start + 4 > c.cols || i - start == a || i - start == b) {
          bitmask.as<uint8_t>()[row * bytes + i / 8] |= static_cast<uint8_t>(1 << i % 8);
          column.push_back(i);
        }
    }
  const Linear24Args args{.x = x.data(), .values = values.data(), .bitmask = bitmask.as<uint8_t>(),
                          .bias = c.bias ? bias.data() : nullptr, .y = y.data(), .tokens = c.tokens, .rows = c.rows,
                          .cols = c.cols, .threads = c.threads, .dtype = c.dtype};
  level.linear24(args, parallel_for);
  const double rounding = c.dtype == DType::F32 ? 0x1p-23 : c.dtype == DType::F16 ? 0x1p-10 : 0x1p-7;
  const double smallest = c.dtype == DType::F16 ? 0x1p-24 : 0.0;  // below 2^-14 an fp16 has no more digits than that
  for (int64_t token = 0; token < c.tokens; ++token)
    for (int64_t row = 0; row < c.rows; ++row) {
      double sum = c.bias ? get(bias.data(), row, c.dtype) : 0.0, size_of_terms = std::fabs(sum);
      for (int64_t k = row * stored; k < (row + 1) * stored; ++k) {
        const double term = double{get(values.data(), k, c.dtype)} * get(x.data(), token * c.cols + column[k], c.dtype);
        sum += term;
        size_of_terms += std::fabs(term);
      }
      const double got = get(y.data(), token * c.rows + row, c.dtype);
      const double bound = rounding * std::fabs(sum) + smallest + 0x1p-22 * std::sqrt(c.cols + 1.0) * size_of_terms;
      if (!(std::fabs(got - sum) <= bound)) {
        expect(false, what + " at token " + std::to_string(token) + ", row " + std::to_string(row) + ": " +
                          std::to_string(got) + ", not " + std::to_string(sum));
        return;
      }
    }
}

// Sums of two products, of which the nearest value is known: ties go to the even one.
void rounding(const Kernels& level, DType dtype, int64_t tokens) {
  constexpr int64_t kRows = 21, kCols = 4;
  const float ulp = dtype == DType::F32 ? 0x1p-23f : dtype == DType::F16 ? 0x1p-10f : 0x1p-7f;
  const float largest = dtype == DType::F16 ? 65504.0f : 0x1.fep127f;
  const float sums[][3] = {{1, ulp / 2, 1},           {1, 1.5f * ulp, 1 + 2 * ulp},     {1, ulp, 1 + ulp},
                           {-1, -ulp / 2, -1},        {-1, -1.5f * ulp, -1 - 2 * ulp},  {largest, largest, INFINITY},
                           {-INFINITY, 1, -INFINITY}, {INFINITY, -INFINITY, NAN},       {NAN, 1, NAN}};
  const size_t size = size_of(dtype);
  Buffer x(tokens * kCols * size, Flush::End), values(kRows * 2 * size, Flush::End), bitmask(kRows, Flush::End),
      y(tokens * kRows * size, Flush::End);
  for (int64_t token = 0; token < tokens; ++token)
    for (int64_t col = 0; col < kCols; ++col) put(x.data(), token * kCols + col, dtype, col < 2 ? sums[token % 9][col] : 1);
  for (int64_t i = 0; i < 2 * kRows; ++i) put(values.data(), i, dtype, 1);
  std::memset(bitmask.data(), 0b0011, kRows);
  level.linear24({.x = x.data(), .values = values.data(), .bitmask = bitmask.as<uint8_t>(), .bias = nullptr,
                  .y = y.data(), .tokens = tokens, .rows = kRows, .cols = kCols, .threads = 1, .dtype = dtype},
                 parallel_for);
  for (int64_t i = 0; i < tokens * kRows; ++i) {
    const float got = get(y.data(), i, dtype), want = sums[i / kRows % 9][2];
    expect(got == want || (std::isnan(got) && std::isnan(want)),
           std::string("linear24 ") + level.simd_level + " " + name(dtype) + " rounding of " +
               std::to_string(sums[i / kRows % 9][0]) + " + " + std::to_string(sums[i / kRows % 9][1]));
  }
}

}  // namespace

TEST(linear24) {
  constexpr int64_t kTokens[] = {1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 128, 129, 200};
  constexpr int64_t kCols[] = {1, 3, 4, 5, 8, 12, 31, 32, 60, 63, 64, 65, 68, 100, 127, 128, 130, 192, 260, 320, 1030};
  constexpr int64_t kRows[] = {1, 2, 3, 4, 5, 7, 8, 13, 16, 17, 33, 64, 65};
  uint64_t seed = 0;
  for (const Kernels* level : levels())
    for (DType dtype : kDTypes) {
      for (int64_t tokens : {9, 41}) rounding(*level, dtype, tokens);
      for (int64_t tokens : kTokens)
        for (int64_t cols : kCols) {
          Random random(++seed);
          run(*level,
              {dtype, tokens, kRows[random.below(13)], cols, random.below(2) == 1, 1 + static_cast<int>(random.below(3)),
               random.below(2) ? Flush::End : Flush::Begin},
              seed);
        }
    }
}
