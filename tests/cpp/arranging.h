// Arranges 2:4 weights as the library does, for the tests of what reads them.
#pragma once

#include <memory>

#include "../../csrc/cpu/arranged24_kernels.h"
#include "check.h"

namespace check {

struct Weight {
  int64_t rows, cols, stored = 2 * (cols / 4) + cols % 4, bytes = (cols + 7) / 8;
  int64_t even = 2 * ((rows + 511) / 512), height = (rows + 16 * even - 1) / (16 * even) * 16;
  int64_t blocks = (rows + height - 1) / height, tiles = (cols + 47) / 48;

  int64_t size(int64_t block) const { return std::min(height, rows - block * height); }
};

struct Case {
  DType dtype;
  int64_t rows, cols;
  bool row_pairs;
  Flush flush;
};

inline std::unique_ptr<Buffer> arrange(const sparsekit::Arranged24Kernels& level, const Case& c, const Weight& w,
                                       Buffer& values, Buffer& bitmask) {
  const size_t item = size_of(c.dtype);
  Buffer pairs(c.row_pairs ? w.blocks * w.tiles * w.height / 2 * 3 * 2 : 0, c.flush);
  std::vector<int64_t> starts;
  int64_t nbytes = 0;
  if (c.row_pairs) {
    level.match_row_pairs({.bitmask = bitmask.as<uint8_t>(), .pairs = pairs.as<int16_t>(), .rows = w.rows, .cols = w.cols},
                            0, w.blocks);
    nbytes = 8 * (w.blocks + 1);
    for (int64_t block = 0; block < w.blocks; ++block) {
      starts.push_back(nbytes);
      for (int64_t tile = 0; tile < w.tiles; ++tile)
        for (int64_t pair = 0; pair < (w.size(block) + 1) / 2; ++pair) {
          const int64_t inputs = std::min<int64_t>(48, w.cols - 48 * tile), kept = 2 * (inputs / 4) + inputs % 4;
          const int64_t shared = pairs.as<int16_t>()[((block * w.tiles + tile) * w.height / 2 + pair) * 3 + 2];
          nbytes += 8 + 4 * kept - 2 * shared + 2 * kept * static_cast<int64_t>(item);
        }
    }
    starts.push_back(nbytes);
  } else {
    const int64_t entries = (w.cols / 4 + (w.cols % 4 + 1) / 2 + 3) / 4 * 4;
    for (int64_t block = 0; block < w.blocks; ++block)
      nbytes += (w.size(block) + 3) / 4 * 4 * entries * (2 * static_cast<int64_t>(item) + 2);
  }
  auto data = std::make_unique<Buffer>(nbytes, c.flush);
  std::copy(starts.begin(), starts.end(), reinterpret_cast<int64_t __attribute__((aligned(1)))*>(data->data()));
  const sparsekit::Arrange24Args args{.values = values.data(), .bitmask = bitmask.as<uint8_t>(), .pairs = pairs.as<int16_t>(),
                           .data = data->as<uint8_t>(), .rows = w.rows, .cols = w.cols, .dtype = c.dtype};
  (c.row_pairs ? level.arrange_row_pairs : level.arrange_input_pairs)(args, 0, w.blocks);
  return data;
}

}  // namespace check
