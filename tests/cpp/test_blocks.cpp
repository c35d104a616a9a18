// Block scores in the documented order of additions, and top-k per block against a sort: the same bits at every level.
#include <algorithm>
#include <bit>
#include <numeric>

#include "check.h"

using namespace check;

namespace {

struct Case {
  DType dtype;
  int64_t rows, cols, padding, block_rows, block_cols, k;
  bool scaled, masked;
  Flush flush;
  Values values;
};

std::string describe(const char* op, const Kernels& level, const Case& c) {
  return std::string(op) + " " + level.simd_level + " " + name(c.dtype) + " [" + std::to_string(c.rows) + ", " +
         std::to_string(c.cols) + "+" + std::to_string(c.padding) + "] block " + std::to_string(c.block_rows) + "x" +
         std::to_string(c.block_cols) + " k " + std::to_string(c.k) + (c.scaled ? " scaled" : "") +
         (c.masked ? " masked" : "") + (c.flush == Flush::End ? " end" : " begin") + " values " +
         std::to_string(static_cast<int>(c.values));
}

void run(const Kernels& level, const Case& c, uint64_t seed) {
  Random random(seed);
  const int64_t stride = c.cols + c.padding, span = (c.rows - 1) * stride + c.cols;
  const int64_t tall = (c.rows + c.block_rows - 1) / c.block_rows, wide = (c.cols + c.block_cols - 1) / c.block_cols;
  Buffer weight(span * size_of(c.dtype), c.flush), scale(c.cols * 4, c.flush), counted(c.rows * c.cols, c.flush),
      scores(tall * wide * 4, c.flush), mask(c.rows * c.cols, c.flush);
  random.fill(weight.data(), span, c.dtype, c.values);
  random.fill(scale.data(), c.cols, DType::F32, Values::Normal);
  for (int64_t i = 0; i < c.rows * c.cols; ++i) counted.as<bool>()[i] = random.below(2);
  for (auto [begin, end] : {std::pair{tall / 2, tall}, std::pair{int64_t{0}, tall / 2}}) {
    level.block_scores({.weight = weight.data(), .weight_stride = stride, .scale = c.scaled ? scale.as<float>() : nullptr,
                        .mask = c.masked ? counted.as<bool>() : nullptr, .scores = scores.as<float>(), .rows = c.rows,
                        .cols = c.cols, .block_rows = c.block_rows, .block_cols = c.block_cols, .dtype = c.dtype},
                       begin, end);
    level.block_topk({.score = weight.data(), .score_stride = stride, .mask = mask.as<bool>(), .rows = c.rows,
                      .cols = c.cols, .block_rows = c.block_rows, .block_cols = c.block_cols, .k = c.k,
                      .dtype = c.dtype},
                     begin, end);
  }
  for (int64_t tile = 0; tile < tall * wide; ++tile) {
    const int64_t top = tile / wide * c.block_rows, left = tile % wide * c.block_cols;
    const int64_t height = std::min(c.block_rows, c.rows - top), width = std::min(c.block_cols, c.cols - left);
    std::vector<float> total(std::bit_ceil(static_cast<size_t>(c.block_cols)), 0.0f);
    std::vector<float> magnitude;
    for (int64_t i = top; i < top + height; ++i)
      for (int64_t j = left; j < left + width; ++j) {
        const float entry = std::fabs(get(weight.data(), i * stride + j, c.dtype));
        magnitude.push_back(entry);
        const float score = c.scaled ? entry * scale.as<float>()[j] : entry;
        total[j - left] += !c.masked || counted.as<bool>()[i * c.cols + j] ? score : 0.0f;
      }
    for (size_t half = total.size() / 2; half > 0; half /= 2)
      for (size_t j = 0; j < half; ++j) total[j] += total[j + half];
    const float got = scores.as<float>()[tile];
    expect(std::memcmp(&got, total.data(), 4) == 0 || (std::isnan(got) && std::isnan(total[0])),
           describe("block_scores", level, c));
    std::vector<int64_t> order(magnitude.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
      if (std::isnan(magnitude[a]) || std::isnan(magnitude[b]))
        return std::isnan(magnitude[a]) && !std::isnan(magnitude[b]);
      return magnitude[a] > magnitude[b];
    });
    for (int64_t place = 0; place < height * width; ++place) {
      const int64_t i = top + order[place] / width, j = left + order[place] % width;
      expect(mask.data()[i * c.cols + j] == (place < c.k), describe("block_topk", level, c));
    }
  }
}

// Zeros under a negative scale score -0.0, and sum to it unless a zero of the padding is added.
void negative_zeros(const Kernels& level) {
  struct Block {
    int64_t rows, block_rows, block_cols;
    bool negative;
  };
  const float minus_zero = -0.0f;
  float unscaled = NAN;
  level.block_scores({.weight = &minus_zero, .weight_stride = 1, .scale = nullptr, .mask = nullptr, .scores = &unscaled,
                      .rows = 1, .cols = 1, .block_rows = 1, .block_cols = 1, .dtype = DType::F32},
                     0, 1);
  expect(unscaled == 0.0f && !std::signbit(unscaled), std::string("block_scores ") + level.simd_level + " of -0.0");
  for (const auto [rows, block_rows, block_cols, negative] :
       {Block{1, 1, 1, true}, Block{2, 2, 2, true}, Block{16, 16, 16, true}, Block{1, 2, 2, false},
        Block{2, 2, 3, false}, Block{15, 16, 16, false}}) {
    const std::vector<float> weight(static_cast<size_t>(rows * block_cols), 0.0f);
    const std::vector<float> scale(static_cast<size_t>(block_cols), -1.0f);
    float score = NAN;
    level.block_scores({.weight = weight.data(), .weight_stride = block_cols, .scale = scale.data(), .mask = nullptr,
                        .scores = &score, .rows = rows, .cols = block_cols, .block_rows = block_rows,
                        .block_cols = block_cols, .dtype = DType::F32},
                       0, 1);
    expect(score == 0.0f && std::signbit(score) == negative,
           std::string("block_scores ") + level.simd_level + " negative zeros [" + std::to_string(rows) + ", " +
               std::to_string(block_cols) + "] in a block of " + std::to_string(block_rows) + " rows");
  }
}

}  // namespace

TEST(blocks) {
  constexpr std::pair<int64_t, int64_t> kBlocks[] = {{16, 16}, {8, 8}, {4, 4}, {32, 16}, {16, 32}, {5, 3}, {1, 517}};
  constexpr int64_t kCols[] = {1, 7, 15, 16, 17, 31, 32, 48, 65, 128, 200, 5000};
  uint64_t seed = 0;
  for (const Kernels* level : levels()) {
    negative_zeros(*level);
    for (DType dtype : kDTypes)
      for (auto [block_rows, block_cols] : kBlocks)
        for (int64_t cols : kCols)
          for (Values values : {Values::Normal, Values::Ties, Values::Bits, Values::Special}) {
            Random random(++seed);
            const int64_t size = block_rows * block_cols;
            const int64_t k[] = {10 % (size + 1), random.below(size + 1), 0, size, size / 2};
            run(*level,
                {dtype, 1 + random.below(cols > 1000 ? 4 : 40), cols, random.below(2) * random.below(40), block_rows, block_cols,
                 k[random.below(5)], random.below(2) == 1, random.below(2) == 1,
                 random.below(2) ? Flush::End : Flush::Begin, values},
                seed);
          }
  }
}
