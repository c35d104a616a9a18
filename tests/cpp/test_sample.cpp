// Random N:M masks and the step of their logits: every level against plain C++, which the Python tests hold to the
// definition.
#include "check.h"

using namespace check;

namespace {

struct Case {
  DType dtype;
  int n, m;
  int64_t rows, cols, padding;
  bool step;
  Flush flush;
  Values values;
};

struct Result {
  std::vector<char> bits, logits;
};

Result run(const Kernels& level, const Case& c, uint64_t seed) {
  Random random(seed);
  const size_t size = size_of(c.dtype);
  const int64_t stride = c.cols + c.padding, span = (c.rows - 1) * stride + c.cols, row_bytes = (c.cols + 7) / 8;
  Buffer logits(span * size, c.flush), drawn(c.rows * row_bytes, c.flush), bits(c.rows * row_bytes, c.flush);
  random.fill(logits.data(), span, c.dtype, c.values);
  for (int64_t i = 0; i < c.rows * row_bytes; ++i) drawn.as<uint8_t>()[i] = static_cast<uint8_t>(random.bits());
  const std::vector<char> before = logits.copy();
  const int64_t width = 64 / (8 * c.m) ? 64 / (8 * c.m) * 8 * c.m : 8 * c.m;
  const int64_t pieces = c.rows * ((c.cols + width - 1) / width);
  for (auto [begin, end] : {std::pair{pieces / 2, pieces}, std::pair{int64_t{0}, pieces / 2}})
    level.sample({.logits = logits.data(), .drawn = c.step ? drawn.as<uint8_t>() : nullptr, .bits = bits.as<uint8_t>(),
                  .stride = stride, .cols = c.cols, .width = width, .seed = random.bits(), .offset = seed,
                  .step = 0.5f, .n = c.n, .m = c.m, .dtype = c.dtype},
                 begin, end);
  const std::string what = std::string("sample ") + level.simd_level + " " + name(c.dtype) + " " +
                           std::to_string(c.n) + ":" + std::to_string(c.m) + " [" + std::to_string(c.rows) + ", " +
                           std::to_string(c.cols) + "+" + std::to_string(c.padding) + "]";
  const std::vector<char> after = logits.copy();
  bool right = c.step || after == before;
  for (int64_t row = 0; row < c.rows; ++row) {
    const uint8_t* of_row = bits.as<uint8_t>() + row * row_bytes;
    const int64_t full = c.cols / c.m * c.m;
    for (int64_t start = 0; start < full; start += c.m) {
      int kept = 0;
      for (int64_t i = start; i < start + c.m; ++i) kept += of_row[i / 8] >> i % 8 & 1;
      right &= kept == c.n;
    }
    for (int64_t i = full; i < 8 * row_bytes; ++i) right &= (of_row[i / 8] >> i % 8 & 1) == (i < c.cols);
    for (int64_t i = full; i < stride && row * stride + i < span; ++i)  // the tail, and what lies between rows
      right &= std::memcmp(&after[(row * stride + i) * size], &before[(row * stride + i) * size], size) == 0;
  }
  expect(right, what);
  return {bits.copy(), after};
}

// Equal but for the payloads of NaNs.
bool same(const std::vector<char>& a, const std::vector<char>& b, DType dtype) {
  for (size_t i = 0; i < a.size() / size_of(dtype); ++i) {
    const float x = get(a.data(), i, dtype), y = get(b.data(), i, dtype);
    if (!(std::isnan(x) && std::isnan(y)) && std::memcmp(&x, &y, 4) != 0) return false;
  }
  return true;
}

}  // namespace

TEST(sample) {
  constexpr std::pair<int, int> kPatterns[] = {{2, 4}, {1, 4}, {4, 8}, {2, 7}, {16, 32}, {1, 1}};
  uint64_t seed = 0;
  for (auto [n, m] : kPatterns)
    for (int64_t cols : {1, 7, 32, 63, 96, 200})
      for (DType dtype : {DType::F32, DType::BF16})
        for (bool step : {false, true})
          for (Values values : {Values::Normal, Values::Special}) {
            ++seed;
            const Case c{dtype, n, m, static_cast<int64_t>(1 + seed % 3), cols, static_cast<int64_t>(seed % 2), step,
                         seed % 4 < 2 ? Flush::Begin : Flush::End, values};
            const Result plain = run(*levels().front(), c, seed);
            for (const Kernels* level : levels()) {
              const Result result = run(*level, c, seed);
              expect(result.bits == plain.bits && same(result.logits, plain.logits, dtype),
                     std::string("sample differs at ") + level->simd_level + " " + std::to_string(seed));
            }
          }
}
