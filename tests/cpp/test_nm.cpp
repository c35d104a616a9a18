// N:M masks and pruning against a sort.
#include <algorithm>
#include <numeric>

#include "check.h"

using namespace check;
using sparsekit::NmArgs;

namespace {

struct Case {
  DType dtype;
  int n, m;
  int64_t rows, cols, padding;
  bool scaled, in_place, prune, mask, bits, stream;
  Flush flush;
  Values values;
};

std::string describe(const Kernels& level, const Case& c) {
  return std::string("nm ") + level.simd_level + " " + name(c.dtype) + " " + std::to_string(c.n) + ":" +
         std::to_string(c.m) + " [" + std::to_string(c.rows) + ", " + std::to_string(c.cols) + "+" +
         std::to_string(c.padding) + "]" + (c.scaled ? " scaled" : "") + (c.in_place ? " in place" : "") +
         (c.mask ? " to bools" : "") + (c.bits ? " to bits" : "") +
         (c.stream ? " stream" : "") + (c.flush == Flush::End ? " end" : " begin") + " values " +
         std::to_string(static_cast<int>(c.values));
}

// NaN above all, then by magnitude; a stable sort leaves ties in index order.
std::vector<char> expected_mask(const void* weight, const float* scale, const Case& c) {
  std::vector<char> mask(static_cast<size_t>(c.rows * c.cols), 1);
  for (int64_t row = 0; row < c.rows; ++row)
    for (int64_t start = 0; start + c.m <= c.cols; start += c.m) {
      std::vector<float> score(static_cast<size_t>(c.m));
      for (int i = 0; i < c.m; ++i) {
        const float magnitude = std::fabs(get(weight, row * (c.cols + c.padding) + start + i, c.dtype));
        score[i] = std::fabs(scale ? magnitude * scale[start + i] : magnitude);
      }
      std::vector<int> order(score.size());
      std::iota(order.begin(), order.end(), 0);
      std::stable_sort(order.begin(), order.end(), [&](int a, int b) {
        if (std::isnan(score[a]) || std::isnan(score[b])) return std::isnan(score[a]) && !std::isnan(score[b]);
        return score[a] > score[b];
      });
      for (int place = c.n; place < c.m; ++place) mask[row * c.cols + start + order[place]] = 0;
    }
  return mask;
}

void run(const Kernels& level, const Case& c, uint64_t seed) {
  Random random(seed);
  const size_t size = size_of(c.dtype);
  const int64_t stride = c.cols + c.padding, span = (c.rows - 1) * stride + c.cols;
  Buffer weight(span * size, c.flush), scale(c.cols * 4, c.flush), mask(c.rows * c.cols, c.flush),
      bits(c.rows * ((c.cols + 7) / 8), c.flush), copy(c.rows * c.cols * size, c.flush);
  random.fill(weight.data(), span, c.dtype, c.values);
  random.fill(scale.data(), c.cols, DType::F32, c.values == Values::Bits ? Values::Bits : Values::Special);
  const std::vector<char> before = weight.copy();
  const std::vector<char> want = expected_mask(weight.data(), c.scaled ? scale.as<float>() : nullptr, c);
  Buffer& pruned = c.in_place ? weight : copy;
  const int64_t pruned_stride = c.in_place ? stride : c.cols;
  const NmArgs args{.weight = weight.data(),
                    .weight_stride = stride,
                    .pruned = c.prune ? pruned.data() : nullptr,
                    .pruned_stride = pruned_stride,
                    .scale = c.scaled ? scale.as<float>() : nullptr,
                    .mask = c.mask ? mask.as<bool>() : nullptr,
                    .bits = c.bits ? bits.as<uint8_t>() : nullptr,
                    .cols = c.cols,
                    .n = c.n,
                    .m = c.m,
                    .dtype = c.dtype,
                    .stream = c.stream};
  level.nm(args, c.rows / 2, c.rows);
  level.nm(args, 0, c.rows / 2);
  if (c.mask) expect(std::memcmp(mask.data(), want.data(), want.size()) == 0, describe(level, c) + ": mask");
  if (c.bits) expect(bits.copy() == as_bits(want, c.rows, c.cols), describe(level, c) + ": bits");
  if (!c.prune) return;
  std::vector<char> after = c.in_place ? before : std::vector<char>(copy.size());
  for (int64_t row = 0; row < c.rows; ++row)
    for (int64_t col = 0; col < c.cols; ++col) {
      char* to = after.data() + (row * pruned_stride + col) * size;
      if (want[row * c.cols + col])
        std::memcpy(to, before.data() + (row * stride + col) * size, size);
      else
        std::memset(to, 0, size);
    }
  expect(std::memcmp(pruned.data(), after.data(), after.size()) == 0, describe(level, c) + ": pruned");
}

void literal(const Kernels& level) {
  float weight[] = {1, -3, 2, 0, 0.0f, -0.0f, 0.0f, -0.0f, NAN, INFINITY, 5, NAN, 7};
  const float scale[] = {9, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
  const bool by_magnitude[] = {0, 1, 1, 0, 1, 1, 0, 0, 1, 0, 0, 1, 1}, by_scale[] = {1, 1, 0, 0};
  bool mask[13];
  uint8_t bits[2];
  NmArgs args{.weight = weight, .weight_stride = 13, .pruned = nullptr, .pruned_stride = 0, .scale = nullptr,
              .mask = mask, .bits = bits, .cols = 13, .n = 2, .m = 4, .dtype = DType::F32, .stream = false};
  level.nm(args, 0, 1);
  expect(std::equal(mask, mask + 13, by_magnitude), std::string(level.simd_level) + ": literal 2:4 mask");
  expect(bits[0] == 0b00110110 && bits[1] == 0b00011001, std::string(level.simd_level) + ": literal 2:4 bits");
  args.scale = scale;
  args.bits = nullptr;
  level.nm(args, 0, 1);
  expect(std::equal(mask, mask + 4, by_scale), std::string(level.simd_level) + ": literal 2:4 mask with a scale");
}

}  // namespace

TEST(nm) {
  constexpr std::pair<int, int> kPatterns[] = {{2, 4}, {1, 4}, {3, 4}, {4, 4},  {4, 8},   {1, 8},   {7, 8},
                                               {1, 1}, {1, 2}, {2, 3}, {5, 16}, {16, 32}, {31, 32}, {3, 31}};
  constexpr int64_t kCols[] = {1, 3, 4, 5, 8, 31, 32, 33, 63, 64, 65, 100, 127, 128, 192, 515, 1024};
  uint64_t seed = 0;
  for (const Kernels* level : levels()) {
    literal(*level);
    for (DType dtype : kDTypes)
      for (auto [n, m] : kPatterns)
        for (int64_t cols : kCols)
          for (Values values : {Values::Normal, Values::Ties, Values::Bits, Values::Special}) {
            Random random(++seed);
            const bool in_place = random.below(2), prune = in_place || random.below(2), bits = random.below(2);
            run(*level,
                {dtype, n, m, 1 + random.below(3), cols, random.below(2) * random.below(40), random.below(2) == 1,
                 in_place, prune, !bits || random.below(2), bits, random.below(2) == 1,
                 random.below(2) ? Flush::End : Flush::Begin, values},
                seed);
          }
  }
}
