// Packing and unpacking 2:4 against a loop over entries.
#include <algorithm>

#include "check.h"

using namespace check;
using sparsekit::Pack24Args;
using sparsekit::Unpack24Args;

namespace {

int64_t values_per_row(int64_t cols) { return 2 * (cols / 4) + cols % 4; }

// Two random entries of every group set, all of the tail.
std::vector<char> random_mask(Random& random, int64_t rows, int64_t cols) {
  std::vector<char> mask(static_cast<size_t>(rows * cols), 1);
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t start = 0; start + 4 <= cols; start += 4) {
      const int64_t a = random.below(4), b = (a + 1 + random.below(3)) % 4;
      for (int64_t i = 0; i < 4; ++i) mask[row * cols + start + i] = i == a || i == b;
    }
  return mask;
}

struct Case {
  DType dtype;
  int64_t rows, cols, padding;
  bool masked, stream;
  Flush flush;
};

void run(const Kernels& level, const Case& c, uint64_t seed) {
  const std::string what = std::string("pack24 ") + level.simd_level + " " + name(c.dtype) + " [" + std::to_string(c.rows) +
                           ", " + std::to_string(c.cols) + "+" + std::to_string(c.padding) + "]" +
                           (c.masked ? " masked" : "") + (c.stream ? " stream" : "") +
                           (c.flush == Flush::End ? " end" : " begin");
  Random random(seed);
  const size_t size = size_of(c.dtype);
  const int64_t stride = c.cols + c.padding, span = (c.rows - 1) * stride + c.cols, stored = values_per_row(c.cols);
  Buffer weight(span * size, c.flush), mask(c.rows * c.cols, c.flush), values(c.rows * stored * size, c.flush),
      bitmask(c.rows * ((c.cols + 7) / 8), c.flush), dense(c.rows * c.cols * size, c.flush);
  const std::vector<char> keep = random_mask(random, c.rows, c.cols);
  std::memcpy(mask.data(), keep.data(), keep.size());
  random.fill(weight.data(), span, c.dtype, Values::Special);
  for (int64_t row = 0; row < c.rows; ++row)
    for (int64_t col = 0; col < c.cols; ++col)
      if (!c.masked) {  // what is dropped is a zero of either sign, what is kept is none
        float value = get(weight.data(), row * stride + col, c.dtype);
        if (value == 0) value = 1;
        put(weight.data(), row * stride + col, c.dtype, keep[row * c.cols + col] ? value : random.below(2) ? 0.0f : -0.0f);
      }
  const Pack24Args pack{.weight = weight.data(), .weight_stride = stride, .mask = c.masked ? mask.as<bool>() : nullptr,
                        .values = values.data(), .bitmask = bitmask.as<uint8_t>(), .cols = c.cols, .dtype = c.dtype,
                        .stream = c.stream};
  expect(level.pack24(pack, 0, c.rows) == -1, what + ": a bad group");
  std::vector<char> want(values.size()), bits(bitmask.size(), 0), back(dense.size(), 0);
  char* next = want.data();
  for (int64_t row = 0; row < c.rows; ++row)
    for (int64_t col = 0; col < c.cols; ++col) {
      if (!keep[row * c.cols + col]) continue;
      std::memcpy(next, weight.data() + (row * stride + col) * size, size);
      std::memcpy(back.data() + (row * c.cols + col) * size, next, size);
      next += size;
      bits[row * ((c.cols + 7) / 8) + col / 8] |= static_cast<char>(1 << col % 8);
    }
  expect(std::memcmp(values.data(), want.data(), want.size()) == 0, what + ": values");
  expect(std::memcmp(bitmask.data(), bits.data(), bits.size()) == 0, what + ": bitmask");
  const Unpack24Args unpack{.values = values.data(), .bitmask = bitmask.as<uint8_t>(), .weight = dense.data(),
                            .cols = c.cols, .dtype = c.dtype, .stream = c.stream};
  level.unpack24(unpack, 0, c.rows);
  expect(std::memcmp(dense.data(), back.data(), back.size()) == 0, what + ": unpack");
}

// All 16 patterns of a group, by weight and by mask: what is kept, and whether it is bad.
void groups(const Kernels& level, DType dtype, int64_t start) {
  constexpr int kKept[16] = {0b1100, 0b0101, 0b0110, 0b0011, 0b1100, 0b0101, 0b0110, 0b0011,
                             0b1100, 0b1001, 0b1010, 0b0011, 0b1100, 0b0101, 0b0110, 0b0011};
  const int64_t cols = 132;
  for (int pattern = 0; pattern < 16; ++pattern)
    for (bool masked : {false, true}) {
      const std::string what = std::string("pack24 ") + level.simd_level + " " + name(dtype) + " group " +
                               std::to_string(pattern) + " at " + std::to_string(start) + (masked ? " masked" : "");
      Buffer weight(cols * size_of(dtype), Flush::End), mask(cols, Flush::End), values(cols / 2 * size_of(dtype), Flush::End),
          bitmask((cols + 7) / 8, Flush::End), dense(cols * size_of(dtype), Flush::End);
      for (int64_t i = 0; i < cols; ++i) {
        const bool kept = i / 4 == start / 4 ? pattern >> i % 4 & 1 : i % 4 < 2;
        put(weight.data(), i, dtype, kept || masked ? static_cast<float>(i + 1) : 0.0f);
        mask.as<bool>()[i] = kept;
      }
      const int count = __builtin_popcount(static_cast<unsigned>(pattern));
      const bool bad = count > 2 || (masked && count < 2);
      const int64_t first = level.pack24({.weight = weight.data(), .weight_stride = cols,
                                          .mask = masked ? mask.as<bool>() : nullptr, .values = values.data(),
                                          .bitmask = bitmask.as<uint8_t>(), .cols = cols, .dtype = dtype,
                                          .stream = false}, 0, 1);
      expect(first == (bad ? start / 4 : -1), what + ": first bad group is " + std::to_string(first));
      const int kept = bitmask.as<uint8_t>()[start / 8] >> start % 8 & 15;
      expect(kept == kKept[pattern], what + ": kept " + std::to_string(kept));
      for (int i = 0, k = 0; i < 4; ++i)
        if (kKept[pattern] >> i & 1) {
          expect(get(values.data(), start / 2 + k, dtype) == get(weight.data(), start + i, dtype), what + ": values");
          ++k;
        }
      // A bitmask that breaks 2:4 reads no values but its own group's.
      bitmask.as<uint8_t>()[start / 8] &= static_cast<uint8_t>(start % 8 ? 0x0f : 0xf0);
      bitmask.as<uint8_t>()[start / 8] |= static_cast<uint8_t>(pattern << start % 8);
      level.unpack24({.values = values.data(), .bitmask = bitmask.as<uint8_t>(), .weight = dense.data(), .cols = cols,
                      .dtype = dtype, .stream = false}, 0, 1);
      for (int64_t i = 0, k = 0; i < cols; ++i) {
        const bool set = i / 4 == start / 4 ? kKept[pattern] >> i % 4 & 1 : i % 4 < 2;
        expect(get(dense.data(), i, dtype) == (set ? get(values.data(), k, dtype) : 0.0f), what + ": unpack");
        k += set;
      }
    }
}

// Of many bad groups the one of the lowest row, and the leftmost there, is told.
void first_bad_group(const Kernels& level, DType dtype) {
  const int64_t rows = 4, cols = 200;
  Buffer weight(rows * cols * size_of(dtype), Flush::End), values(rows * cols / 2 * size_of(dtype), Flush::End),
      bitmask(rows * cols / 8, Flush::End);
  std::memset(weight.data(), 0, weight.size());
  for (auto [row, start] : {std::pair{1, 68}, {1, 76}, {1, 132}, {1, 196}, {2, 0}, {3, 64}})
    for (int i = 0; i < 3; ++i) put(weight.data(), row * cols + start + i, dtype, 1.0f);
  const int64_t first = level.pack24({.weight = weight.data(), .weight_stride = cols, .mask = nullptr,
                                      .values = values.data(), .bitmask = bitmask.as<uint8_t>(), .cols = cols,
                                      .dtype = dtype, .stream = false}, 0, rows);
  expect(first == (cols + 68) / 4, std::string("pack24 ") + level.simd_level + " " + name(dtype) + " first bad group is " +
                                       std::to_string(first));
}

// A tail keeps all it has, zeros and what the mask leaves out included.
void tails(const Kernels& level, DType dtype) {
  for (int64_t cols : {1, 2, 3, 5, 6, 7, 65, 66, 67})
    for (bool masked : {false, true}) {
      const int64_t stored = 2 * (cols / 4) + cols % 4, bytes = (cols + 7) / 8;
      Buffer weight(cols * size_of(dtype), Flush::End), mask(cols, Flush::End), values(stored * size_of(dtype), Flush::End),
          bitmask(bytes, Flush::End);
      for (int64_t i = 0; i < cols; ++i) {
        mask.as<bool>()[i] = i < cols / 4 * 4 && i % 4 < 2;
        put(weight.data(), i, dtype, mask.as<bool>()[i] ? 1.0f : 0.0f);
      }
      level.pack24({.weight = weight.data(), .weight_stride = cols, .mask = masked ? mask.as<bool>() : nullptr,
                    .values = values.data(), .bitmask = bitmask.as<uint8_t>(), .cols = cols, .dtype = dtype,
                    .stream = false}, 0, 1);
      const int want = cols % 8 < 4 ? (1 << cols % 4) - 1 : ((1 << cols % 4) - 1) << 4 | 0b0011;
      expect(bitmask.as<uint8_t>()[bytes - 1] == want,
             std::string("pack24 ") + level.simd_level + " " + name(dtype) + " tail of " + std::to_string(cols));
    }
}

}  // namespace

TEST(pack24) {
  constexpr int64_t kCols[] = {1, 2, 3, 4, 5, 7, 8, 12, 31, 60, 63, 64, 65, 68, 100, 127, 128, 192, 255, 517, 1024};
  uint64_t seed = 0;
  for (const Kernels* level : levels())
    for (DType dtype : kDTypes) {
      for (int64_t start : {0, 4, 60, 64, 100, 124, 128}) groups(*level, dtype, start);
      first_bad_group(*level, dtype);
      tails(*level, dtype);
      for (int64_t cols : kCols)
        for (int repeat = 0; repeat < 12; ++repeat) {
          Random random(++seed);
          run(*level,
              {dtype, 1 + random.below(4), cols, random.below(2) * random.below(40), repeat % 2 == 1,
               random.below(2) == 1, random.below(2) ? Flush::End : Flush::Begin},
              seed);
        }
    }
}
