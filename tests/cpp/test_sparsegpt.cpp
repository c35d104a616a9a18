// SparseGPT on consecutive columns against its definition, column by column.
#include <algorithm>

#include "check.h"

using namespace check;

namespace {

// Keeps an entry that fewer than n others of its group beat; ties go to the lower index.
std::vector<char> kept_of(const std::vector<float>& row, const float* factor, int64_t group, int n, int m) {
  const int64_t cols = static_cast<int64_t>(row.size());
  std::vector<char> kept(static_cast<size_t>(m), 1);
  if (group + m > cols) return kept;
  const auto score = [&](int i) { return std::fabs(row[group + i] / factor[(group + i) * cols + group + i]); };
  for (int i = 0; i < m; ++i) {
    int better = 0;
    for (int j = 0; j < m; ++j) better += score(j) > score(i) || (score(j) == score(i) && j < i);
    kept[i] = better < n;
  }
  return kept;
}

struct Case {
  int64_t rows, cols;
  int n, m;
  bool given;
  Flush flush;
};

void run(const Kernels& level, const Case& c, uint64_t seed) {
  const std::string what = std::string("sparsegpt ") + level.simd_level + " [" + std::to_string(c.rows) + ", " +
                           std::to_string(c.cols) + "] " + std::to_string(c.n) + ":" + std::to_string(c.m) +
                           (c.given ? " given" : "");
  Random random(seed);
  const int64_t count = c.rows * c.cols;
  Buffer weight(count * 4, c.flush), factor(c.cols * c.cols * 4, c.flush), given(count, c.flush);
  Buffer pruned(count * 4, c.flush), error(count * 4, c.flush), mask(count, c.flush);
  random.fill(weight.data(), count, DType::F32, random.below(2) ? Values::Normal : Values::Ties);
  for (int64_t i = 0; i < c.cols; ++i)
    for (int64_t j = 0; j < c.cols; ++j)
      factor.as<float>()[i * c.cols + j] = j < i ? 0 : j == i ? 1 + std::fabs(random.normal()) : 0.1f * random.normal();
  for (int64_t i = 0; i < count; ++i) given.as<bool>()[i] = random.below(2) == 1;
  const bool* chosen = c.given ? given.as<bool>() : nullptr;
  for (auto [begin, end] : {std::pair{c.rows / 2, c.rows}, std::pair{int64_t{0}, c.rows / 2}})
    level.sparsegpt({.weight = weight.as<float>(), .factor = factor.as<float>(), .given = chosen,
                     .pruned = pruned.as<float>(), .error = error.as<float>(), .mask = mask.as<bool>(),
                     .cols = c.cols, .n = c.n, .m = c.m},
                    begin, end);
  bool same = true;
  for (int64_t r = 0; r < c.rows; ++r) {
    std::vector<float> row(weight.as<float>() + r * c.cols, weight.as<float>() + (r + 1) * c.cols);
    std::vector<char> kept;
    for (int64_t col = 0; col < c.cols; ++col) {
      const int64_t at = r * c.cols + col;
      if (col % c.m == 0) kept = kept_of(row, factor.as<float>(), col, c.n, c.m);
      const bool keep = c.given ? given.as<bool>()[at] : kept[col % c.m];
      const float* later = factor.as<float>() + col * c.cols;
      const float lost = keep ? 0 : row[col] / later[col];
      for (int64_t i = col; i < c.cols && !keep; ++i) row[i] -= lost * later[i];
      same &= mask.as<bool>()[at] == keep && error.as<float>()[at] == lost;
      same &= keep || pruned.as<float>()[at] == 0;
    }
    for (int64_t col = 0; col < c.cols; ++col)
      same &= !mask.as<bool>()[r * c.cols + col] || pruned.as<float>()[r * c.cols + col] == row[col];
  }
  expect(same, what);
}

}  // namespace

TEST(sparsegpt) {
  constexpr std::pair<int, int> kPatterns[] = {{2, 4}, {1, 4}, {4, 8}, {3, 5}, {16, 32}};
  uint64_t seed = 0;
  for (const Kernels* level : levels())
    for (int64_t cols : {1, 4, 7, 16, 33, 128})
      for (auto [n, m] : kPatterns)
        for (bool given : {false, true})
          for (Flush flush : {Flush::Begin, Flush::End}) {
            ++seed;
            run(*level, {static_cast<int64_t>(1 + seed % 6), cols, n, m, given, flush}, seed);
          }
}
