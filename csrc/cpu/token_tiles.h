// What the kernels for many tokens share. Their vector lanes are tokens: a tile of x is in the L1 cache as
// [input][token], and a kept weight is broadcast and multiplied by the vectors of tokens of its input.
#pragma once

#include "float_lanes.h"

namespace sparsekit::SPARSEKIT_LEVEL {
namespace {

constexpr int64_t kLanesTokens = 16;  // from this many tokens on, these kernels are faster

// A tile of 8 vectors of tokens leaves a quarter of the L1 cache, where that is 32 KB, to the weight and the sums. At
// AVX2, 4096x4096 and 128 tokens, 16 KB took 1.4 times as long, and 4 or 6 vectors 1.2 times.
constexpr int kMaxVectors = 8;
constexpr int64_t kTileBytes = 24576;
constexpr int64_t kRun = kTileBytes / (kMaxVectors * kLanes * sizeof(float));  // columns that are summed separately
static_assert(kRun % 8 == 0 && kRun % kLanes == 0);  // whole bytes of the bitmask, and whole squares to transpose
constexpr int64_t kSumsBytes = 131072;  // a quarter of the L2 cache

// Divides the tokens into tiles and the rows into blocks, both as evenly as possible.
struct LanesPlan {
  int64_t vectors, tiles, widest, blocks, block_rows;

  // The blocks are multiples of `unit` rows.
  LanesPlan(int64_t tokens, int64_t rows, int threads, int64_t unit, int64_t max_vectors = kMaxVectors) {
    vectors = ceil_div(tokens, kLanes);
    tiles = ceil_div(vectors, max_vectors);
    widest = ceil_div(vectors, tiles);
    blocks = ceil_div(rows, kSumsBytes / (widest * kLanes * static_cast<int64_t>(sizeof(float))));
    const int64_t most = std::max(blocks, std::min(blocks + threads, rows / unit));
    while (blocks < most && idle_share(tiles * blocks, threads) > 1.0 / 16) ++blocks;
    block_rows = ceil_div(ceil_div(rows, blocks), unit) * unit;
    blocks = ceil_div(rows, block_rows);
  }

  static int64_t ceil_div(int64_t value, int64_t divisor) { return (value + divisor - 1) / divisor; }
  static double idle_share(int64_t items, int64_t threads) {
    const double slots = static_cast<double>(ceil_div(items, threads) * threads);
    return (slots - static_cast<double>(items)) / slots;
  }
  int64_t first_vector(int64_t tile) const { return vectors * tile / tiles; }
};

// Copies `inputs` columns of x, whose tokens are `stride` apart, as [input][token]. Lanes after the last token repeat
// it. Returns whether all values are finite.
template <class T>
bool load_tile(const T* from, int64_t stride, int64_t tokens, int vectors, int64_t inputs, float* tile) {
  const int64_t width = vectors * kLanes;
  Floats times_zero[4] = {zeros(), zeros(), zeros(), zeros()};  // NaN where an input was not finite
  float rest_times_zero = 0;
  for (int v = 0; v < vectors; ++v) {
    const T* x[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) x[lane] = from + std::min<int64_t>(v * kLanes + lane, tokens - 1) * stride;
    float* to = tile + v * kLanes;
    int64_t i = 0;
    for (; i + kLanes <= inputs; i += kLanes) {
      Floats square[kLanes];
      for (int lane = 0; lane < kLanes; ++lane) {
        square[lane] = load_lanes(x[lane] + i);
        times_zero[lane % 4] = multiply_add(square[lane], zeros(), times_zero[lane % 4]);
      }
      transpose(square);
      for (int lane = 0; lane < kLanes; ++lane) store_lanes(to + (i + lane) * width, square[lane]);
    }
    for (; i < inputs; ++i)
      for (int lane = 0; lane < kLanes; ++lane) {
        to[i * width + lane] = to_float(x[lane][i]);
        rest_times_zero += to[i * width + lane] * 0.0f;
      }
  }
  const Floats all = add(add(times_zero[0], times_zero[1]), add(times_zero[2], times_zero[3]));
  return !any_nan(all) && !std::isnan(rest_times_zero);
}

// Adds the bias to sums [row][token], rows `width` apart, and stores them as y [token][row], tokens `stride` apart.
template <class T>
void store_sums(const float* sums, int64_t width, int64_t rows, int64_t tokens, const T* bias, T* y, int64_t stride) {
  int64_t r = 0;
  for (; r + kLanes <= rows; r += kLanes) {
    const Floats shift = bias ? load_lanes(bias + r) : zeros();
    for (int64_t t = 0; t < tokens; t += kLanes) {
      Floats square[kLanes];
      for (int i = 0; i < kLanes; ++i) square[i] = load_lanes(sums + (r + i) * width + t);
      transpose(square);
      for (int lane = 0; lane < kLanes; ++lane)
        if (t + lane < tokens) store_lanes(y + (t + lane) * stride + r, add(square[lane], shift));
    }
  }
  for (; r < rows; ++r)
    for (int64_t t = 0; t < tokens; ++t)
      y[t * stride + r] = from_float<T>(sums[r * width + t] + (bias ? to_float(bias[r]) : 0.0f));
}

// The offsets, in bytes, of the four kept of eight inputs in a tile: four times 16 bits for every byte of the bitmask.
struct KeptOffsets {
  uint64_t of_byte[256];

  explicit KeptOffsets(int64_t stride) {
    for (int bits = 0; bits < 256; ++bits) {
      of_byte[bits] = 0;
      for (int input = 0, next = 0; input < 8; ++input)
        if (bits >> input & 1 && next < 4) of_byte[bits] |= static_cast<uint64_t>(input * stride) << 16 * next++;
    }
  }
};

// Columns [col, col + inputs) of some rows of a weight; strides are in elements.
struct WeightPiece {
  const float* values;
  int64_t values_stride;
  const uint8_t* bits;
  int64_t bits_stride;
  int64_t rows, inputs;
  const char* ahead;  // what to prefetch with the first row: values of rows to come
  int64_t ahead_stride, ahead_bytes;
};

// How many weight rows share a step: enough for 8 or more independent sums, which hide the latency of a multiply-add.
constexpr int rows_per_step(int vectors) {
#if defined(SPARSEKIT_AVX512)
  return vectors >= 4 ? 2 : 4;
#else
  return vectors >= 7 ? 1 : vectors >= 4 ? 2 : 4;
#endif
}

// Adds kRows rows' products to sums [row][token]. The products of every kRun columns are summed separately first: at
// 4096 columns one long sum had 3 times the error of the dense layer. A tile has a multiple of kRun columns, so that
// the order of additions does not depend on its width, and neither the threads nor the other tokens change a result.
template <int kVectors, int kRows, int64_t kRun>
inline __attribute__((always_inline)) void rows_times_tile(const WeightPiece& piece, int64_t row, const float* tile,
                                                           const KeptOffsets& offsets, bool first, float* sums) {
  constexpr int kTokens = kVectors * kLanes;
  const float* values[kRows];
  const uint8_t* bits[kRows];
  Floats sum[kRows][kVectors];
  sums += row * kTokens;
  for (int r = 0; r < kRows; ++r) {
    values[r] = piece.values + (row + r) * piece.values_stride;
    bits[r] = piece.bits + (row + r) * piece.bits_stride;
    for (int64_t byte = 0; byte < piece.ahead_bytes; byte += 64)
      __builtin_prefetch(piece.ahead + (row + r) * piece.ahead_stride + byte);
    for (int token = 0; token < kTokens; token += 16) __builtin_prefetch(sums + (kRows + r) * kTokens + token);
  }
  const char* inputs = reinterpret_cast<const char*>(tile);
  const auto add_products = [&](int r, Floats weight, const char* at) __attribute__((always_inline)) {
    const float* input = reinterpret_cast<const float*>(at);
    for (int v = 0; v < kVectors; ++v)
      sum[r][v] = multiply_add(weight, load_lanes(input + v * kLanes), sum[r][v]);
  };
  for (int64_t start = 0; start < piece.inputs; start += kRun) {
    const int64_t columns = std::min(kRun, piece.inputs - start), bytes = columns / 8;
    for (auto& of_row : sum)
      for (auto& lanes : of_row) lanes = zeros();
    for (int64_t byte = 0; byte < bytes; ++byte) {
      uint64_t offset[kRows];
      Quad quad[kRows];
      for (int r = 0; r < kRows; ++r) {
        offset[r] = offsets.of_byte[bits[r][byte]];
        quad[r] = load_quad(values[r] + 4 * byte);
      }
      const auto step = [&]<int i>(std::integral_constant<int, i>) __attribute__((always_inline)) {
        for (int r = 0; r < kRows; ++r)
          add_products(r, broadcast<i>(quad[r]), inputs + static_cast<uint16_t>(offset[r] >> 16 * i));
      };
      step(std::integral_constant<int, 0>());
      step(std::integral_constant<int, 1>());
      step(std::integral_constant<int, 2>());
      step(std::integral_constant<int, 3>());
      inputs += 8 * kTokens * sizeof(float);
    }
    for (int r = 0; r < kRows; ++r) {
      values[r] += 4 * bytes;
      bits[r] += bytes;
      const int64_t rest = columns % 8;
      int64_t left = rest / 4 * 2 + rest % 4;  // values that are stored, even if more bits are set
      for (int64_t i = 0; i < rest; ++i)
        if (*bits[r] >> i & 1 && left-- > 0)
          add_products(r, broadcast(*values[r]++), inputs + i * kTokens * sizeof(float));
      for (int v = 0; v < kVectors; ++v) {
        float* to = sums + r * kTokens + v * kLanes;
        store_lanes(to, first && start == 0 ? sum[r][v] : add(load_lanes(to), sum[r][v]));
      }
    }
  }
}

template <int kVectors, int64_t kRun>
void piece_times_tile(const WeightPiece& piece, const float* tile, const KeptOffsets& offsets, bool first,
                      float* sums) {
  constexpr int kRows = rows_per_step(kVectors);
  int64_t row = 0;
  for (; row + kRows <= piece.rows; row += kRows)
    rows_times_tile<kVectors, kRows, kRun>(piece, row, tile, offsets, first, sums);
  for (; row < piece.rows; ++row) rows_times_tile<kVectors, 1, kRun>(piece, row, tile, offsets, first, sums);
}

// piece_times_tile for 1 to kMaxVectors vectors of tokens.
template <int64_t kRun, int kMaxVectors>
constexpr auto kTimesTile = []<int... i>(std::integer_sequence<int, i...>) {
  return std::array{piece_times_tile<i + 1, kRun>...};
}(std::make_integer_sequence<int, kMaxVectors>());

}  // namespace
}  // namespace sparsekit::SPARSEKIT_LEVEL
