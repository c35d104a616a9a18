// The arranged forms of a 2:4 weight: what is restored is what was arranged, and the product of random weights is that of
// a sum in double, with a bound from the sizes of its terms.
#include "arranging.h"

using namespace check;
using sparsekit::Arranged24Kernels;
using sparsekit::arranged24_kernels;

namespace {

std::string describe(const Arranged24Kernels& level, const Case& c, const std::string& what) {
  return what + (c.row_pairs ? " row pairs " : " input pairs ") + std::string(level.simd_level) + " " + name(c.dtype) + " " +
         std::to_string(c.rows) + " x " + std::to_string(c.cols) + (c.flush == Flush::End ? " end" : " begin");
}

void product(const Arranged24Kernels& level, const Case& c, Buffer& values, const std::vector<int64_t>& column, Buffer& data,
             int64_t tokens, Random& random) {
  const size_t item = size_of(c.dtype);
  const int64_t stored = static_cast<int64_t>(column.size()) / c.rows;
  Buffer x(tokens * c.cols * item, c.flush), bias(c.rows * item, c.flush), y(tokens * c.rows * item, c.flush);
  random.fill(x.data(), tokens * c.cols, c.dtype, Values::Normal);
  random.fill(bias.data(), c.rows, c.dtype, Values::Normal);
  const int64_t odd = random.below(2) ? random.below(tokens * c.cols) : -1;  // an input that is not finite, or none
  if (odd >= 0) put(x.data(), odd, c.dtype, INFINITY);
  (c.row_pairs ? level.linear_row_pairs : level.linear_input_pairs)(
      {.x = x.data(), .data = data.as<uint8_t>(), .bias = bias.data(), .y = y.data(), .tokens = tokens, .rows = c.rows,
       .cols = c.cols, .threads = 1 + static_cast<int>(random.below(5)), .dtype = c.dtype},
      parallel_for);
  const double rounding = c.dtype == DType::F32 ? 0x1p-23 : c.dtype == DType::F16 ? 0x1p-10 : 0x1p-7;
  const double smallest = c.dtype == DType::F16 ? 0x1p-24 : 0.0;
  for (int64_t token = 0; token < tokens; ++token)
    for (int64_t row = 0; row < c.rows; ++row) {
      double sum = get(bias.data(), row, c.dtype), terms = std::fabs(sum);
      bool keeps_odd = false;
      for (int64_t k = row * stored; k < (row + 1) * stored; ++k) {
        const double term = double{get(values.data(), k, c.dtype)} * get(x.data(), token * c.cols + column[k], c.dtype);
        keeps_odd |= token * c.cols + column[k] == odd;
        sum += term;
        terms += std::fabs(term);
      }
      const double got = get(y.data(), token * c.rows + row, c.dtype);
      const double bound = rounding * std::fabs(sum) + smallest + 0x1p-22 * std::sqrt(c.cols + 1.0) * terms;
      const bool holds = odd < 0 || odd / c.cols != token ? std::fabs(got - sum) <= bound
                         : keeps_odd                      ? std::isinf(got) && got == sum
                                                          : std::isnan(got);
      if (holds) continue;
      return expect(false, describe(level, c, "linear") + " at token " + std::to_string(token) + " of " +
                               std::to_string(tokens) + ", row " + std::to_string(row) + ": " + std::to_string(got) +
                               ", not " + std::to_string(sum));
    }
}

void run(const Arranged24Kernels& level, const Case& c, const std::vector<int64_t>& counts, uint64_t seed) {
  Random random(seed);
  const Weight w{.rows = c.rows, .cols = c.cols};
  Buffer values(c.rows * w.stored * size_of(c.dtype), c.flush), bitmask(c.rows * w.bytes, c.flush);
  random.fill(values.data(), c.rows * w.stored, c.dtype, Values::Normal);
  std::memset(bitmask.data(), 0, bitmask.size());
  std::vector<int64_t> column;
  for (int64_t row = 0; row < c.rows; ++row)
    for (int64_t start = 0; start < c.cols; start += 4) {
      const int64_t a = random.below(4), b = (a + 1 + random.below(3)) % 4;
      for (int64_t i = start; i < std::min(start + 4, c.cols); ++i)
        if (start + 4 > c.cols || i - start == a || i - start == b) {
          bitmask.as<uint8_t>()[row * w.bytes + i / 8] |= static_cast<uint8_t>(1 << i % 8);
          column.push_back(i);
        }
    }
  const auto data = arrange(level, c, w, values, bitmask);
  Buffer values_again(values.size(), c.flush), bitmask_again(bitmask.size(), c.flush);
  (c.row_pairs ? level.restore_row_pairs : level.restore_input_pairs)(
      {.data = data->as<uint8_t>(), .values = values_again.data(), .bitmask = bitmask_again.as<uint8_t>(),
       .rows = c.rows, .cols = c.cols, .dtype = c.dtype},
      0, w.blocks);
  expect(values.copy() == values_again.copy() && bitmask.copy() == bitmask_again.copy(), describe(level, c, "restored"));
  for (int64_t tokens : counts) product(level, c, values, column, *data, tokens, random);
  for (size_t i = 0; i < bitmask.size(); ++i) bitmask.data()[i] = static_cast<char>(random.bits());
  arrange(level, c, w, values, bitmask);  // of any bits: nothing outside of the buffers is read or written
}

}  // namespace

TEST(arranged24) {
  constexpr int64_t kCols[] = {1, 2, 3, 4, 5, 8, 12, 31, 48, 49, 60, 63, 64, 65, 66, 67, 95, 100, 130, 195, 260, 1030};
  constexpr int64_t kRows[] = {1, 2, 3, 4, 5, 16, 17, 33, 64, 65};
  uint64_t seed = 0;
  for (const Kernels* level : levels())
    for (DType dtype : kDTypes)
      for (bool row_pairs : {false, true})
        for (int64_t cols : kCols) {
          Random random(++seed);
          const std::vector<int64_t> counts{1 + random.below(8), 9 + random.below(24), 33 + random.below(100)};
          run(arranged24_kernels(*level), {dtype, kRows[random.below(10)], cols, row_pairs, random.below(2) ? Flush::End : Flush::Begin},
              counts, seed);
        }
  for (const Kernels* level : levels())
    for (bool row_pairs : {false, true}) run(arranged24_kernels(*level), {DType::F32, 523, 52, row_pairs, Flush::End}, {3}, ++seed);
}
