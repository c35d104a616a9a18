// Tiers against the kernels that they are made of, in plain C++: 2:4, top-k per block, then block scores of the mask.
#include <algorithm>

#include "check.h"

using namespace check;

namespace {

struct Case {
  DType dtype;
  int64_t rows, cols, padding, block_rows, block_cols, k;
  bool scaled, scores_scaled, squared, nested, stream;
  Flush flush;
  Values values;
};

std::string describe(const Kernels& level, const Case& c) {
  return std::string("tier_prune ") + level.simd_level + " " + name(c.dtype) + " [" + std::to_string(c.rows) + ", " +
         std::to_string(c.cols) + "+" + std::to_string(c.padding) + "] block " + std::to_string(c.block_rows) + "x" +
         std::to_string(c.block_cols) + " k " + std::to_string(c.k) + (c.scaled ? " scaled" : "") +
         (c.scores_scaled ? " scores scaled" : "") + (c.squared ? " squared" : "") + (c.nested ? " nested" : "") +
         (c.stream ? " stream" : "") +
         (c.flush == Flush::End ? " end" : " begin") + " values " + std::to_string(static_cast<int>(c.values));
}

// tier_scores against the block scores of the masks.
void run_scores(const Kernels& level, const Case& c, void* weight, const float* scale, const float* score_scale,
                const bool* sparse24, const bool* topk) {
  const int64_t stride = c.cols + c.padding, count = c.rows * c.cols;
  const int64_t tall = (c.rows + c.block_rows - 1) / c.block_rows, wide = (c.cols + c.block_cols - 1) / c.block_cols;
  Buffer scores(3 * tall * wide * 4, c.flush), squares(count * 4, Flush::End), total(tall * wide * 4, Flush::End);
  for (auto [begin, end] : {std::pair{tall / 2, tall}, std::pair{int64_t{0}, tall / 2}})
    level.tier_scores({.weight = weight, .weight_stride = stride, .scale = c.scaled ? scale : nullptr,
                       .score_scale = c.scores_scaled ? score_scale : nullptr, .scores = scores.as<float>(),
                       .rows = c.rows, .cols = c.cols, .block_rows = c.block_rows, .block_cols = c.block_cols, .k = c.k,
                       .squared = c.squared, .dtype = c.dtype},
                      begin, end);
  for (int64_t i = 0; i < count; ++i) {
    const float magnitude = std::fabs(get(weight, i / c.cols * stride + i % c.cols, c.dtype));
    const float score = c.scores_scaled ? magnitude * score_scale[i % c.cols] : magnitude;
    squares.as<float>()[i] = score * score;
  }
  const bool* masks[] = {nullptr, sparse24, topk};
  for (int tier = 0; tier < 3; ++tier) {
    sparsekit::kernels_scalar.block_scores(
        {.weight = c.squared ? squares.data() : weight, .weight_stride = c.squared ? c.cols : stride,
         .scale = c.scores_scaled && !c.squared ? score_scale : nullptr, .mask = masks[tier],
         .scores = total.as<float>(), .rows = c.rows, .cols = c.cols, .block_rows = c.block_rows,
         .block_cols = c.block_cols, .dtype = c.squared ? DType::F32 : c.dtype},
        0, tall);
    for (int64_t i = 0; i < tall * wide; ++i) {
      const float got = scores.as<float>()[tier * tall * wide + i], expected = total.as<float>()[i];
      expect(std::memcmp(&got, &expected, 4) == 0 || (std::isnan(got) && std::isnan(expected)),
             describe(level, c) + ": scores of tier " + std::to_string(tier));
    }
  }
}

void run(const Kernels& level, const Case& c, uint64_t seed) {
  Random random(seed);
  const Kernels& plain = sparsekit::kernels_scalar;
  const size_t size = size_of(c.dtype);
  const int64_t stride = c.cols + c.padding, span = (c.rows - 1) * stride + c.cols, count = c.rows * c.cols;
  const int64_t tall = (c.rows + c.block_rows - 1) / c.block_rows, wide = (c.cols + c.block_cols - 1) / c.block_cols;
  Buffer weight(span * size, c.flush), scale(c.cols * 4, c.flush), score_scale(c.cols * 4, c.flush),
      tiers(tall * wide, c.flush), pruned(count * size, c.flush), mask(count, c.flush),
      scores(tall * wide * 4, c.flush);
  random.fill(weight.data(), span, c.dtype, c.values);
  random.fill(scale.data(), c.cols, DType::F32, Values::Special);
  random.fill(score_scale.data(), c.cols, DType::F32, Values::Special);
  const int64_t kinds = 1 + random.below(4);
  for (int64_t i = 0; i < tall * wide; ++i)
    tiers.as<uint8_t>()[i] = static_cast<uint8_t>(random.below(kinds == 4 ? 256 : kinds));
  for (auto [begin, end] : {std::pair{tall / 2, tall}, std::pair{int64_t{0}, tall / 2}})
    level.tier_prune({.weight = weight.data(), .weight_stride = stride, .tiers = tiers.as<uint8_t>(),
                      .scale = c.scaled ? scale.as<float>() : nullptr,
                      .score_scale = c.scores_scaled ? score_scale.as<float>() : nullptr, .pruned = pruned.data(),
                      .mask = mask.as<bool>(), .scores = scores.as<float>(), .rows = c.rows, .cols = c.cols,
                      .block_rows = c.block_rows, .block_cols = c.block_cols, .k = c.k, .nested = c.nested,
                      .dtype = c.dtype, .stream = c.stream},
                     begin, end);

  Buffer sparse24(count, Flush::End), topk(count, Flush::End), ranked(count * 4, Flush::End),
      total(tall * wide * 4, Flush::End);
  plain.nm({.weight = weight.data(), .weight_stride = stride, .pruned = nullptr, .pruned_stride = 0,
            .scale = c.scaled ? scale.as<float>() : nullptr, .mask = sparse24.as<bool>(), .bits = nullptr,
            .cols = c.cols, .n = 2, .m = 4, .dtype = c.dtype, .stream = false},
           0, c.rows);
  for (int64_t i = 0; i < count; ++i) {
    const float magnitude = std::fabs(get(weight.data(), i / c.cols * stride + i % c.cols, c.dtype));
    ranked.as<float>()[i] = c.scaled ? magnitude * scale.as<float>()[i % c.cols] : magnitude;
  }
  plain.block_topk({.score = ranked.data(), .score_stride = c.cols, .mask = topk.as<bool>(), .rows = c.rows,
                    .cols = c.cols, .block_rows = c.block_rows, .block_cols = c.block_cols, .k = c.k,
                    .dtype = DType::F32},
                   0, tall);
  run_scores(level, c, weight.data(), scale.as<float>(), score_scale.as<float>(), sparse24.as<bool>(), topk.as<bool>());
  if (c.nested) {
    for (int64_t i = 0; i < count; ++i)
      if (!sparse24.as<bool>()[i]) ranked.as<float>()[i] = 0;
    plain.block_topk({.score = ranked.data(), .score_stride = c.cols, .mask = topk.as<bool>(), .rows = c.rows,
                      .cols = c.cols, .block_rows = c.block_rows, .block_cols = c.block_cols, .k = c.k,
                      .dtype = DType::F32},
                     0, tall);
    for (int64_t i = 0; i < count; ++i) topk.as<bool>()[i] = topk.as<bool>()[i] && ranked.as<float>()[i] != 0;
  }
  std::vector<char> want(static_cast<size_t>(count)), kept(static_cast<size_t>(count) * size, 0);
  for (int64_t row = 0; row < c.rows; ++row)
    for (int64_t col = 0; col < c.cols; ++col) {
      const int64_t i = row * c.cols + col;
      const uint8_t tier = tiers.as<uint8_t>()[row / c.block_rows * wide + col / c.block_cols];
      want[i] = tier == 0 || (tier == 1 ? sparse24 : topk).as<bool>()[i];
      if (want[i]) std::memcpy(kept.data() + i * size, weight.data() + (row * stride + col) * size, size);
    }
  expect(mask.copy() == want, describe(level, c) + ": mask");
  expect(pruned.copy() == kept, describe(level, c) + ": pruned");
  std::memcpy(sparse24.data(), want.data(), want.size());
  plain.block_scores({.weight = weight.data(), .weight_stride = stride,
                      .scale = c.scores_scaled ? score_scale.as<float>() : nullptr, .mask = sparse24.as<bool>(),
                      .scores = total.as<float>(), .rows = c.rows, .cols = c.cols, .block_rows = c.block_rows,
                      .block_cols = c.block_cols, .dtype = c.dtype},
                     0, tall);
  for (int64_t i = 0; i < tall * wide; ++i) {
    const float got = scores.as<float>()[i], expected = total.as<float>()[i];
    expect(std::memcmp(&got, &expected, 4) == 0 || (std::isnan(got) && std::isnan(expected)),
           describe(level, c) + ": scores");
  }
}

// Three blocks of one row: dense, 2:4, the largest alone.
void literal(const Kernels& level) {
  const float weight[] = {1, -2, 3, -4, 1, -2, 3, -4, 1, -2, 3, -4}, scale[] = {9, 1, 1, 1, 9, 1, 1, 1, 9, 1, 1, 1};
  const float want[] = {1, -2, 3, -4, 1, 0, 0, -4, 1, 0, 0, 0}, sums[] = {10, 5, 1};
  const uint8_t tiers[] = {0, 1, 2};
  float pruned[12], scores[3];
  bool mask[12];
  level.tier_prune({.weight = weight, .weight_stride = 12, .tiers = tiers, .scale = scale, .score_scale = nullptr,
                    .pruned = pruned, .mask = mask, .scores = scores, .rows = 1, .cols = 12, .block_rows = 1,
                    .block_cols = 4, .k = 1, .nested = false, .dtype = DType::F32, .stream = false},
                   0, 1);
  expect(std::equal(pruned, pruned + 12, want) && std::equal(scores, scores + 3, sums),
         std::string(level.simd_level) + ": literal tier_prune");
  for (int i = 0; i < 12; ++i) expect(mask[i] == (want[i] != 0), std::string(level.simd_level) + ": literal tier mask");
}

}  // namespace

TEST(tiers) {
  constexpr std::pair<int64_t, int64_t> kBlocks[] = {{16, 16}, {4, 4}, {32, 16}, {16, 32}, {5, 12}, {1, 516}};
  constexpr int64_t kCols[] = {1, 4, 15, 16, 31, 48, 64, 65, 128, 200, 1030};
  uint64_t seed = 0;
  for (const Kernels* level : levels()) {
    literal(*level);
    for (DType dtype : kDTypes)
      for (auto [block_rows, block_cols] : kBlocks)
        for (int64_t cols : kCols)
          for (Values values : {Values::Normal, Values::Ties, Values::Bits, Values::Special}) {
            Random random(++seed);
            const int64_t size = block_rows * block_cols;
            const int64_t k[] = {10 % (size + 1), random.below(size + 1), 0, size};
            run(*level,
                {dtype, 1 + random.below(40), cols, random.below(2) * random.below(40), block_rows, block_cols,
                 k[random.below(4)], random.below(2) == 1, random.below(2) == 1, random.below(2) == 1,
                 random.below(2) == 1, random.below(2) == 1,
                 random.below(2) ? Flush::End : Flush::Begin, values},
                seed);
          }
  }
}
