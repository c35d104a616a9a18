// linear24q against a sum in double, linear24q_int8 against the same integers summed one by one,
// and tile24 against tiles that are written entry by entry.
#include <algorithm>

#include "check.h"

using namespace check;
using sparsekit::QuantType;

namespace {

constexpr float kNf4[] = {-1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f,
                          -0.28444138169288635f, -0.18477343022833234f, -0.09105003625154495f, 0.0f,
                          0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
                          0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f};
constexpr int kRowOrder[] = {0, 1, 4, 5, 2, 3, 6, 7};

const char* name(QuantType type) { return type == QuantType::Int8 ? "int8" : type == QuantType::Int4 ? "int4" : "nf4"; }

// A weight by its codes and its kept columns.
struct Weight {
  int64_t rows, cols, group;
  QuantType type;
  int64_t kept = 2 * (cols / 4) + cols % 4, groups = (cols + group - 1) / group;
  std::vector<int> codes, columns;  // [rows, kept]; codes of 4 bits from 0 to 15
  std::vector<float> scales;        // [rows, groups]

  Weight(int64_t rows, int64_t cols, int64_t group, QuantType type, bool extreme, Random& random)
      : rows(rows), cols(cols), group(group), type(type) {
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t start = 0; start < cols; start += 4) {
        const int64_t a = random.below(4), b = (a + 1 + random.below(3)) % 4;
        for (int64_t i = start; i < std::min(start + 4, cols); ++i)
          if (start + 4 > cols || i - start == a || i - start == b) columns.push_back(static_cast<int>(i));
      }
      for (int64_t g = 0; g < groups; ++g) scales.push_back(static_cast<float>(random.below(100)) / 64);
    }
    for (int64_t i = 0; i < rows * kept; ++i)
      codes.push_back(type == QuantType::Int8 ? (extreme ? 127 : static_cast<int>(random.below(255)) - 127)
                                              : static_cast<int>(random.below(16)));
  }
  int64_t group_of(int64_t k) const { return columns[k] / group; }
  float scale(int64_t row, int64_t k) const { return scales[row * groups + group_of(k)]; }
  float level(int64_t k) const {
    const int code = codes[k];
    if (type == QuantType::Nf4) return kNf4[code];
    return static_cast<float>(type == QuantType::Int4 && code > 7 ? code - 16 : code);
  }
  int integer(int64_t k) const {
    return static_cast<int>(type == QuantType::Nf4 ? std::nearbyint(127 * level(k)) : level(k));
  }
  uint16_t scale_bits(int64_t row, int64_t g) const {
    return static_cast<uint16_t>(std::bit_cast<uint32_t>(scales[row * groups + g]) >> 16);
  }
};

struct Case {
  DType dtype;
  int64_t tokens;
  bool bias, extreme;
  Flush flush;
};

std::string describe(const char* op, const Kernels& level, const Case& c, const Weight& w) {
  return std::string(op) + " " + level.simd_level + " " + name(w.type) + " " + check::name(c.dtype) + " [" +
         std::to_string(c.tokens) + ", " + std::to_string(w.cols) + "] to " + std::to_string(w.rows) + " groups of " +
         std::to_string(w.group) + (c.bias ? " bias" : "") + (c.flush == Flush::End ? " end" : " begin");
}

// The weight in the layout of ops/quant24.py.
struct PackedBuffers {
  const int64_t stored, bytes;  // of a row
  Buffer values, scales, bitmask;

  PackedBuffers(const Weight& w, Flush flush)
      : stored(w.type == QuantType::Int8 ? w.kept : (w.kept + 1) / 2), bytes((w.cols + 7) / 8),
        values(w.rows * stored, flush), scales(w.rows * w.groups * 2, flush), bitmask(w.rows * bytes, flush) {
    std::memset(values.data(), 0, values.size());
    std::memset(bitmask.data(), 0, bitmask.size());
    for (int64_t row = 0; row < w.rows; ++row) {
      for (int64_t g = 0; g < w.groups; ++g) scales.as<uint16_t>()[row * w.groups + g] = w.scale_bits(row, g);
      for (int64_t k = 0; k < w.kept; ++k) {
        const int64_t at = row * w.kept + k, col = w.columns[at];
        bitmask.as<uint8_t>()[row * bytes + col / 8] |= static_cast<uint8_t>(1 << col % 8);
        if (w.type == QuantType::Int8)
          values.as<int8_t>()[at] = static_cast<int8_t>(w.codes[at]);
        else
          values.as<uint8_t>()[row * stored + k / 2] |= static_cast<uint8_t>(w.codes[at] << k % 2 * 4);
      }
    }
  }
};

void run_float(const Kernels& level, const Case& c, const Weight& w, Random& random) {
  const size_t size = size_of(c.dtype);
  PackedBuffers packed(w, c.flush);
  Buffer x(c.tokens * w.cols * size, c.flush), bias(w.rows * size, c.flush), y(c.tokens * w.rows * size, c.flush);
  random.fill(x.data(), c.tokens * w.cols, c.dtype, Values::Normal);
  random.fill(bias.data(), w.rows, c.dtype, Values::Normal);
  level.linear24q({.x = x.data(), .values = packed.values.as<uint8_t>(), .scales = packed.scales.as<uint16_t>(),
                   .bitmask = packed.bitmask.as<uint8_t>(), .bias = c.bias ? bias.data() : nullptr, .y = y.data(),
                   .tokens = c.tokens, .rows = w.rows, .cols = w.cols, .group = w.group, .type = w.type,
                   .dtype = c.dtype},
                  parallel_for);
  const double rounding = c.dtype == DType::F32 ? 0x1p-23 : c.dtype == DType::F16 ? 0x1p-10 : 0x1p-7;
  for (int64_t token = 0; token < c.tokens; ++token)
    for (int64_t row = 0; row < w.rows; ++row) {
      double sum = c.bias ? get(bias.data(), row, c.dtype) : 0.0, terms = std::fabs(sum);
      for (int64_t k = row * w.kept; k < (row + 1) * w.kept; ++k) {
        const double term =
            double{w.level(k)} * w.scale(row, k) * get(x.data(), token * w.cols + w.columns[k], c.dtype);
        sum += term;
        terms += std::fabs(term);
      }
      const double got = get(y.data(), token * w.rows + row, c.dtype);
      const double bound = rounding * std::fabs(sum) + 0x1p-24 + 0x1p-22 * std::sqrt(w.cols + 1.0) * terms;
      expect(std::isinf(got) || std::fabs(got - sum) <= bound, describe("linear24q", level, c, w) + " at token " +
                                                                   std::to_string(token) + ", row " +
                                                                   std::to_string(row));
    }
}

// The place of every column in a row of tiles, and the number of tiles.
int64_t places(const Weight& w, std::vector<int64_t>& place) {
  const int64_t full = w.cols / 4 * 4, per_group = (w.group + 63) / 64 * 64;
  int64_t end = 0;
  for (int64_t col = 0; col < w.cols; ++col) {
    const int64_t g = std::min(col, std::max<int64_t>(full - 1, 0)) / w.group, last = (w.cols - 1) / w.group;
    int64_t at = g * per_group + col - g * w.group;
    if (col >= full) at = last * per_group + full - last * w.group + (col - full) / 2 * 4 + (col - full) % 2;
    place.push_back(at);
    end = std::max(end, at + 1);
  }
  return (end + 63) / 64;
}

void run_int8(const Kernels& level, const Case& c, const Weight& w, Random& random) {
  const size_t size = size_of(c.dtype);
  std::vector<int64_t> place;
  const int64_t tiles = places(w, place), blocks = (w.rows + 7) / 8;
  const int64_t tile_bytes = 16 + 64 + (w.type == QuantType::Int8 ? 256 : 128);
  const int64_t per_group = (w.group + 63) / 64;
  Buffer x(c.tokens * w.cols * size, c.flush), data(blocks * tiles * tile_bytes, c.flush), bias(w.rows * size, c.flush),
      y(c.tokens * w.rows * size, c.flush);
  random.fill(x.data(), c.tokens * w.cols, c.dtype, Values::Normal);
  if (c.extreme)
    for (int64_t i = 0; i < c.tokens * w.cols; ++i) put(x.data(), i, c.dtype, i % 3 ? 2.0f : -2.0f);
  random.fill(bias.data(), w.rows, c.dtype, Values::Normal);
  std::memset(data.data(), 0, data.size());
  for (int64_t i = 0; i < blocks * tiles * 64; ++i)  // padding is at positions 0 and 1 of four
    data.data()[i / 64 * tile_bytes + 16 + i % 64] = i % 2 ? 0x55 : 0;
  if (w.type == QuantType::Nf4)  // code 7 is 0
    for (int64_t i = 0; i < blocks * tiles; ++i) std::memset(data.data() + i * tile_bytes + 80, 0x77, 128);
  for (int64_t row = 0; row < w.rows; ++row) {
    const int64_t stored = std::find(kRowOrder, kRowOrder + 8, row % 8) - kRowOrder;
    std::vector<int> used(static_cast<size_t>(tiles * 16), 0);  // of every four places
    for (int64_t k = row * w.kept; k < (row + 1) * w.kept; ++k) {
      const int64_t at = place[w.columns[k]], tile = at / 64, step = at % 64 / 16;
      uint8_t* to = data.as<uint8_t>() + (row / 8 * tiles + tile) * tile_bytes;
      const int64_t lane = 8 * stored + at % 16 / 4 * 2 + used[at / 4]++;
      to[16 + lane] = static_cast<uint8_t>((to[16 + lane] & ~(3 << 2 * step)) | at % 4 << 2 * step);
      uint8_t* code = to + 80 + (w.type == QuantType::Int8 ? 64 * step + lane : 64 * (step / 2) + lane);
      const int shift = static_cast<int>(step % 2 * 4);
      *code = static_cast<uint8_t>(w.type == QuantType::Int8 ? w.codes[k]
                                                             : (*code & ~(15 << shift)) | w.codes[k] << shift);
    }
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const uint16_t scale = w.scale_bits(row, std::min(tile / per_group, w.groups - 1));
      std::memcpy(data.data() + (row / 8 * tiles + tile) * tile_bytes + 2 * (row % 8), &scale, 2);
    }
  }
  PackedBuffers packed(w, c.flush);
  Buffer tiled(blocks * tiles * tile_bytes, c.flush);
  const sparsekit::Tile24Args args{.codes = packed.values.as<uint8_t>(), .scales = packed.scales.as<uint16_t>(),
                                   .bitmask = packed.bitmask.as<uint8_t>(), .tiles = tiled.as<uint8_t>(), .rows = w.rows,
                                   .cols = w.cols, .group = w.group, .tiles_of_row = tiles, .type = w.type};
  level.tile24(args, blocks / 2, blocks);
  level.tile24(args, 0, blocks / 2);
  expect(tiled.copy() == data.copy(), describe("tile24", level, c, w));
  level.linear24q_int8({.x = x.data(), .tiles = data.as<uint8_t>(), .bias = c.bias ? bias.data() : nullptr,
                        .y = y.data(), .tokens = c.tokens, .rows = w.rows, .cols = w.cols, .group = w.group,
                        .type = w.type, .dtype = c.dtype},
                       parallel_for);
  for (int64_t token = 0; token < c.tokens; ++token) {
    float largest = 1e-30f;
    for (int64_t i = 0; i < w.cols; ++i) largest = std::max(largest, std::fabs(get(x.data(), token * w.cols + i, c.dtype)));
    const float factor = 127 / largest, step = largest / (w.type == QuantType::Nf4 ? 127 * 127 : 127);
    for (int64_t row = 0; row < w.rows; ++row) {
      std::vector<int> sums(static_cast<size_t>(2 * tiles), 0);  // of both lanes of each tile
      for (int64_t k = row * w.kept; k < (row + 1) * w.kept; ++k) {
        const float input = get(x.data(), token * w.cols + w.columns[k], c.dtype);
        const int64_t at = place[w.columns[k]];
        sums[at / 64 * 2 + at % 16 / 8] += w.integer(k) * static_cast<int>(std::nearbyint(input * factor));
      }
      float lanes[2] = {};
      for (int64_t i = 0; i < 2 * tiles; ++i)
        lanes[i % 2] +=
            static_cast<float>(sums[i]) * w.scales[row * w.groups + std::min(i / 2 / per_group, w.groups - 1)];
      float sum = (lanes[0] + lanes[1]) * step;
      if (c.bias) sum += get(bias.data(), row, c.dtype);
      uint32_t expected = 0;
      put(&expected, 0, c.dtype, sum);
      expect(std::memcmp(&expected, y.data() + (token * w.rows + row) * size, size) == 0,
             describe("linear24q_int8", level, c, w) + " at token " + std::to_string(token) + ", row " +
                 std::to_string(row) + ": " + std::to_string(get(y.data(), token * w.rows + row, c.dtype)) + ", not " +
                 std::to_string(sum));
    }
  }
}

}  // namespace

TEST(linear24q) {
  constexpr int64_t kTokens[] = {1, 2, 3, 4, 5, 6, 7, 9, 15, 16, 17, 33, 70};
  constexpr int64_t kCols[] = {1, 3, 4, 8, 31, 60, 63, 64, 65, 100, 128, 191, 260, 515};
  constexpr int64_t kRows[] = {1, 3, 7, 8, 9, 16, 21, 33};
  constexpr int64_t kGroups[] = {64, 8, 24, 64, 128, 200};
  uint64_t seed = 0;
  for (const Kernels* level : levels(true))
    for (QuantType type : {QuantType::Int8, QuantType::Int4, QuantType::Nf4})
      for (int64_t tokens : kTokens)
        for (int64_t cols : kCols) {
          Random random(++seed);
          const bool extreme = random.below(4) == 0;
          const Weight weight(kRows[random.below(8)], cols, kGroups[random.below(6)], type, extreme, random);
          const Case c{kDTypes[random.below(3)], tokens, random.below(2) == 1, extreme,
                       random.below(2) ? Flush::End : Flush::Begin};
          run_float(*level, c, weight, random);
          run_int8(*level, c, weight, random);
        }
}
