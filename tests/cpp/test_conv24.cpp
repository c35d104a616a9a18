// conv2d24, and the same by an arranged weight, against a sum in double, with a bound from the sizes of its terms.
#include "arranging.h"

using namespace check;
using sparsekit::ConvShape;

namespace {

// The weight [output][tap][input] in order, of whole groups, as one of a linear layer.
std::unique_ptr<Buffer> arrange_taps(const sparsekit::Arranged24Kernels& level, const ConvShape& s, Buffer& values,
                                     const std::vector<double>& kept, Flush flush) {
  const Weight w{.rows = s.outputs, .cols = s.kernel_height * s.kernel_width * s.inputs};
  Buffer bits(w.rows * w.bytes, flush);
  std::memset(bits.data(), 0, bits.size());
  for (int64_t row = 0; row < w.rows; ++row)
    for (int64_t col = 0; col < w.cols; ++col)
      if (kept[row * w.cols + col] != 0)
        bits.as<uint8_t>()[row * w.bytes + col / 8] |= static_cast<uint8_t>(1 << col % 8);
  return arrange(level, {DType::F32, w.rows, w.cols, true, flush}, w, values, bits);
}

void run(const Kernels& level, DType dtype, const ConvShape& s, bool bias, int threads, Flush flush, uint64_t seed) {
  const int64_t taps = s.kernel_height * s.kernel_width, stored = 2 * (s.inputs / 4) + s.inputs % 4;
  const int64_t bytes = (s.inputs + 7) / 8;
  Random random(seed);
  const size_t size = size_of(dtype);
  Buffer x(s.images * s.inputs * s.height * s.width * size, flush), values(s.outputs * taps * stored * size, flush),
      bitmask(s.outputs * taps * bytes, flush), shift(s.outputs * size, flush),
      y(s.images * s.outputs * s.out_height * s.out_width * size, flush);
  random.fill(x.data(), x.size() / size, dtype, Values::Normal);
  random.fill(values.data(), values.size() / size, dtype, Values::Normal);
  random.fill(shift.data(), s.outputs, dtype, Values::Normal);
  std::memset(bitmask.data(), 0, bitmask.size());
  std::vector<double> weight(s.outputs * taps * s.inputs);  // [output][tap][input]
  for (int64_t row = 0, next = 0; row < s.outputs * taps; ++row)
    for (int64_t start = 0; start < s.inputs; start += 4) {
      const int64_t a = random.below(4), b = (a + 1 + random.below(3)) % 4;
      for (int64_t i = start; i < std::min(start + 4, s.inputs); ++i)
        if (start + 4 > s.inputs || i - start == a || i - start == b) {
          bitmask.as<uint8_t>()[row * bytes + i / 8] |= static_cast<uint8_t>(1 << i % 8);
          weight[row * s.inputs + i] = get(values.data(), next++, dtype);
        }
    }
  level.conv2d24({.x = x.data(), .values = values.data(), .bitmask = bitmask.as<uint8_t>(),
                  .bias = bias ? shift.data() : nullptr, .y = y.data(), .shape = s, .threads = threads, .dtype = dtype},
                 parallel_for);
  const auto expect_sums = [&](const std::string& what) {
    const double rounding = dtype == DType::F32 ? 0x1p-23 : dtype == DType::F16 ? 0x1p-10 : 0x1p-7;
    const double smallest = dtype == DType::F16 ? 0x1p-24 : 0.0;  // below 2^-14 an fp16 has no more digits than that
    for (int64_t at = 0; at < s.images * s.outputs * s.out_height * s.out_width; ++at) {
      const int64_t out_x = at % s.out_width, out_y = at / s.out_width % s.out_height;
      const int64_t output = at / (s.out_width * s.out_height) % s.outputs,
                    image = at / (s.out_width * s.out_height * s.outputs);
      double sum = bias ? get(shift.data(), output, dtype) : 0.0, size_of_terms = std::fabs(sum);
      for (int64_t tap = 0; tap < taps; ++tap) {
        const int64_t in_y = out_y * s.stride_y - s.padding_y + tap / s.kernel_width * s.dilation_y;
        const int64_t in_x = out_x * s.stride_x - s.padding_x + tap % s.kernel_width * s.dilation_x;
        if (in_y < 0 || in_y >= s.height || in_x < 0 || in_x >= s.width) continue;
        for (int64_t i = 0; i < s.inputs; ++i) {
          const int64_t from = ((image * s.inputs + i) * s.height + in_y) * s.width + in_x;
          const double term = weight[(output * taps + tap) * s.inputs + i] * get(x.data(), from, dtype);
          sum += term;
          size_of_terms += std::fabs(term);
        }
      }
      const double got = get(y.data(), at, dtype), terms = static_cast<double>(taps * s.inputs) + 1;
      const double bound = rounding * std::fabs(sum) + smallest + 0x1p-22 * std::sqrt(terms) * size_of_terms;
      if (!(std::fabs(got - sum) <= bound))
        return expect(false, what + std::string(" ") + level.simd_level + " " + name(dtype) + ", shape of seed " +
                                 std::to_string(seed) + ", at " + std::to_string(at) + ": " + std::to_string(got) +
                                 ", not " + std::to_string(sum));
    }
  };
  expect_sums("conv2d24");
  if (dtype != DType::F32 || s.inputs % 4) return;
  const sparsekit::Arranged24Kernels& arranged = sparsekit::arranged24_kernels(level);
  const auto data = arrange_taps(arranged, s, values, weight, flush);
  std::memset(y.data(), 255, y.size());
  arranged.conv2d_row_pairs({.x = x.as<float>(), .data = data->as<uint8_t>(),
                             .bias = bias ? shift.as<float>() : nullptr, .y = y.as<float>(), .shape = s,
                             .threads = threads},
                            parallel_for);
  expect_sums("arranged_conv2d24");
}

}  // namespace

TEST(conv24) {
  constexpr int64_t kInputs[] = {1, 3, 4, 7, 8, 12, 16, 33, 64, 100, 104, 200};
  constexpr int64_t kSizes[] = {1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 20, 33};
  uint64_t seed = 0;
  for (const Kernels* level : levels())
    for (DType dtype : kDTypes)
      for (int i = 0; i < 60; ++i) {
        Random random(++seed);
        ConvShape s{.images = 1 + random.below(3), .inputs = kInputs[i % 12], .height = kSizes[random.below(13)],
                    .width = kSizes[random.below(13)], .outputs = kSizes[random.below(13)], .out_height = 0,
                    .out_width = 0, .kernel_height = 1 + random.below(3), .kernel_width = 1 + random.below(3),
                    .stride_y = 1 + random.below(2), .stride_x = 1 + random.below(3), .padding_y = random.below(3),
                    .padding_x = random.below(4), .dilation_y = 1 + random.below(2), .dilation_x = 1 + random.below(3)};
        if (i % 4 == 0) s.stride_y = s.stride_x = s.dilation_y = s.dilation_x = 1;
        // The kernel has to fit into the padded image.
        s.height = std::max(s.height, s.dilation_y * (s.kernel_height - 1) + 1 - 2 * s.padding_y);
        s.width = std::max(s.width, s.dilation_x * (s.kernel_width - 1) + 1 - 2 * s.padding_x);
        s.out_height = (s.height + 2 * s.padding_y - s.dilation_y * (s.kernel_height - 1) - 1) / s.stride_y + 1;
        s.out_width = (s.width + 2 * s.padding_x - s.dilation_x * (s.kernel_width - 1) - 1) / s.stride_x + 1;
        run(*level, dtype, s, random.below(2) == 1, 1 + static_cast<int>(random.below(3)),
            random.below(2) ? Flush::End : Flush::Begin, seed);
      }
}
