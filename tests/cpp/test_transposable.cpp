// Transposable masks against a search through every choice of two columns for each of four rows.
#include <algorithm>
#include <array>
#include <bit>

#include "check.h"

using namespace check;

namespace {

// Rows of kept columns as bits, in the order of ties.
std::vector<std::array<int, 4>> patterns() {
  constexpr int kPairs[] = {0b0011, 0b0101, 0b1001, 0b0110, 0b1010, 0b1100};
  std::vector<std::array<int, 4>> found;
  for (int a : kPairs)
    for (int b : kPairs)
      for (int c : kPairs)
        for (int d : kPairs) {
          int columns[4] = {};
          for (int row : {a, b, c, d})
            for (int i = 0; i < 4; ++i) columns[i] += row >> i & 1;
          if (std::all_of(columns, columns + 4, [](int count) { return count == 2; })) found.push_back({a, b, c, d});
        }
  return found;
}

struct Case {
  DType dtype;
  int64_t rows, cols, padding;
  bool stream;
  Flush flush;
  Values values;
};

void run(const Kernels& level, const Case& c, uint64_t seed) {
  static const auto kPatterns = patterns();
  const std::string what = std::string("transposable ") + level.simd_level + " " + name(c.dtype) + " [" +
                           std::to_string(c.rows) + ", " + std::to_string(c.cols) + "+" + std::to_string(c.padding) +
                           "]" + (c.stream ? " stream" : "") + (c.flush == Flush::End ? " end" : " begin") +
                           " values " + std::to_string(static_cast<int>(c.values));
  Random random(seed);
  const int64_t stride = c.cols + c.padding, span = (c.rows - 1) * stride + c.cols;
  const int64_t tall = c.rows / 4 * 4, wide = c.cols / 4 * 4;
  Buffer score(span * size_of(c.dtype), c.flush), mask(c.rows * c.cols, c.flush);
  random.fill(score.data(), span, c.dtype, c.values);
  const int64_t strips = (c.rows + 3) / 4;
  for (auto [begin, end] : {std::pair{strips / 2, strips}, std::pair{int64_t{0}, strips / 2}})
    level.transposable({.score = score.data(), .score_stride = stride, .mask = mask.as<bool>(), .rows = c.rows,
                        .cols = c.cols, .dtype = c.dtype, .stream = c.stream},
                       begin, end);
  const auto magnitude = [&](int64_t row, int64_t col) {
    const float value = std::fabs(get(score.data(), row * stride + col, c.dtype));
    return std::isnan(value) ? INFINITY : value;
  };
  std::vector<char> want(static_cast<size_t>(c.rows * c.cols), 1);
  for (int64_t top = 0; top < tall; top += 4)
    for (int64_t left = 0; left < wide; left += 4) {
      float best = -1;
      std::array<int, 4> kept{};
      for (const auto& pattern : kPatterns) {
        float row[4];
        for (int i = 0; i < 4; ++i) {
          const unsigned kept_bits = static_cast<unsigned>(pattern[i]);
          const int lower = std::countr_zero(kept_bits), upper = std::bit_width(kept_bits) - 1;
          row[i] = magnitude(top + i, left + lower) + magnitude(top + i, left + upper);
        }
        const float total = (row[0] + row[1]) + (row[2] + row[3]);
        if (total > best) best = total, kept = pattern;
      }
      for (int i = 0; i < 16; ++i)
        want[(top + i / 4) * c.cols + left + i % 4] = static_cast<char>(kept[i / 4] >> i % 4 & 1);
    }
  // At the edges 2 of 4, NaN above Inf, ties to the lower index.
  const auto two_of_four = [&](auto at) {
    for (int i = 0; i < 4; ++i) {
      int before = 0;
      for (int j = 0; j < 4; ++j) {
        const auto [row, col] = at(j);
        const auto [own_row, own_col] = at(i);
        const float own = get(score.data(), own_row * stride + own_col, c.dtype);
        const float other = get(score.data(), row * stride + col, c.dtype);
        const bool equal = (std::isnan(own) && std::isnan(other)) || std::fabs(own) == std::fabs(other);
        before += equal ? j < i : !std::isnan(own) && (std::isnan(other) || std::fabs(other) > std::fabs(own));
      }
      const auto [row, col] = at(i);
      want[row * c.cols + col] = before < 2;
    }
  };
  for (int64_t row = tall; row < c.rows; ++row)
    for (int64_t left = 0; left < wide; left += 4) two_of_four([&](int64_t i) { return std::pair{row, left + i}; });
  for (int64_t col = wide; col < c.cols; ++col)
    for (int64_t top = 0; top < tall; top += 4) two_of_four([&](int64_t i) { return std::pair{top + i, col}; });
  expect(mask.copy() == want, what);
}

void literal(const Kernels& level) {
  const float score[] = {0, 0, 1, 1, 0, 0, 1, -1, 1, 1, 0, 0, -1, 1, 0, 0};
  const bool want[] = {0, 0, 1, 1, 0, 0, 1, 1, 1, 1, 0, 0, 1, 1, 0, 0};
  const float zeros[16] = {};
  const bool first[] = {1, 1, 0, 0, 1, 1, 0, 0, 0, 0, 1, 1, 0, 0, 1, 1};
  bool mask[16];
  level.transposable({.score = score, .score_stride = 4, .mask = mask, .rows = 4, .cols = 4, .dtype = DType::F32,
                      .stream = false}, 0, 1);
  expect(std::equal(mask, mask + 16, want), std::string(level.simd_level) + ": literal transposable");
  level.transposable({.score = zeros, .score_stride = 4, .mask = mask, .rows = 4, .cols = 4, .dtype = DType::F32,
                      .stream = false}, 0, 1);
  expect(std::equal(mask, mask + 16, first), std::string(level.simd_level) + ": transposable of zeros");
}

// Sums that round: many patterns are equal only after rounding, and the earliest of them stays.
void rounding(const Kernels& level) {
  for (uint64_t seed = 1; seed <= 50; ++seed) {
    Random random(seed);
    std::vector<float> score(4 * 256);
    for (float& value : score)
      value = std::ldexp(static_cast<float>(1 + random.below(7)), static_cast<int>(random.below(3)) * 12);
    bool mask[4 * 256];
    level.transposable({.score = score.data(), .score_stride = 256, .mask = mask, .rows = 4, .cols = 256,
                        .dtype = DType::F32, .stream = false}, 0, 1);
    bool plain[4 * 256];
    static const auto kPatterns = patterns();
    for (int64_t left = 0; left < 256; left += 4) {
      float best = -1;
      for (const auto& pattern : kPatterns) {
        float row[4];
        for (int i = 0; i < 4; ++i) {
          row[i] = 0;
          for (int j = 0; j < 4; ++j)
            if (pattern[i] >> j & 1) row[i] += score[i * 256 + left + j];
        }
        const float total = (row[0] + row[1]) + (row[2] + row[3]);
        if (total <= best) continue;
        best = total;
        for (int i = 0; i < 16; ++i) plain[i / 4 * 256 + left + i % 4] = pattern[i / 4] >> i % 4 & 1;
      }
    }
    expect(std::equal(mask, mask + 4 * 256, plain), std::string(level.simd_level) + ": transposable sums that round");
  }
}

}  // namespace

TEST(transposable) {
  constexpr int64_t kCols[] = {1, 3, 4, 6, 8, 15, 16, 17, 31, 32, 36, 64, 65, 127, 128, 200};
  uint64_t seed = 0;
  for (const Kernels* level : levels()) {
    literal(*level);
    rounding(*level);
    for (DType dtype : kDTypes)
      for (int64_t cols : kCols)
        for (Values values : {Values::Normal, Values::Ties, Values::Bits, Values::Special})
          for (int repeat = 0; repeat < 2; ++repeat) {
            Random random(++seed);
            run(*level,
                {dtype, 1 + random.below(14), cols, random.below(2) * random.below(40), random.below(2) == 1,
                 random.below(2) ? Flush::End : Flush::Begin, values},
                seed);
          }
  }
}
