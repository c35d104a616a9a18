// A weight with zeros where a mask drops entries: every level against the definition, entry by entry.
#include "check.h"

using namespace check;

namespace {

void run(const Kernels& level, DType dtype, int64_t rows, int64_t cols, int64_t full, int64_t taps, uint64_t seed) {
  Random random(seed);
  const size_t size = size_of(dtype);
  const int64_t count = rows * cols * taps;
  const Flush flush = seed % 2 ? Flush::Begin : Flush::End;
  Buffer weight(count * size, flush), masked(count * size, flush), bits((rows * taps * full + 7) / 8, flush);
  random.fill(weight.data(), count, dtype, Values::Bits);
  for (size_t i = 0; i < bits.size(); ++i) bits.as<uint8_t>()[i] = static_cast<uint8_t>(random.bits());
  const int64_t pieces = taps == 1 ? rows : rows * ((cols + 7) / 8);
  for (auto [begin, end] : {std::pair{pieces / 2, pieces}, std::pair{int64_t{0}, pieces / 2}})
    level.masked({.weight = weight.data(), .bits = bits.as<uint8_t>(), .masked = masked.data(), .cols = cols,
                  .full = full, .taps = taps, .dtype = dtype},
                 begin, end);
  bool right = true;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t row = i / (cols * taps), col = i / taps % cols, bit = (row * taps + i % taps) * full + col;
    const bool kept = col >= full || (bits.as<uint8_t>()[bit / 8] >> bit % 8 & 1);
    const char zero[4] = {};
    right &= std::memcmp(masked.data() + i * size, kept ? weight.data() + i * size : zero, size) == 0;
  }
  expect(right, std::string("masked ") + level.simd_level + " " + name(dtype) + " [" + std::to_string(rows) + ", " +
                    std::to_string(cols) + ", " + std::to_string(taps) + "] " + std::to_string(full));
}

}  // namespace

TEST(masked) {
  uint64_t seed = 0;
  for (const Kernels* level : levels())
    for (DType dtype : {DType::F32, DType::BF16, DType::F16})
      for (int64_t taps : {1, 2, 9, 64, 70})
        for (int64_t cols : {1, 4, 12, 63, 64, 68, 200})
          for (int64_t full : {cols / 4 * 4, cols / 7 * 7, cols, int64_t{0}})
            run(*level, dtype, 1 + static_cast<int64_t>(seed % 3), cols, full, taps, seed), ++seed;
}
