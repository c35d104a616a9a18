// Products whose tokens are the vector lanes: how tokens and rows are shared out, the tile of x that lies in the L1
// cache, and the way back from the sums.
#pragma once

#include "float_lanes.h"

namespace sparsekit::SPARSEKIT_LEVEL {
namespace {

constexpr int64_t kLanesTokens = 16;  // so many are worth it

// A tile of 8 vectors of tokens leaves a quarter of the L1 cache, where that is 32 KB, to the weight and the sums. At
// AVX2, 4096x4096 and 128 tokens, 16 KB took 1.4 times as long, and 4 or 6 vectors 1.2 times.
constexpr int kMaxVectors = 8;
constexpr int64_t kTileBytes = 24576;
constexpr int64_t kRun = kTileBytes / (kMaxVectors * kLanes * sizeof(float));  // columns that are summed by themselves
static_assert(kRun % 8 == 0 && kRun % kLanes == 0);  // whole bytes of the bitmask, whole squares to transpose
constexpr int64_t kSumsBytes = 131072;  // a quarter of the L2 cache

// The tokens in tiles and the rows in blocks, both as even as they come.
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

// `inputs` columns of x, whose tokens are `stride` apart, as [input][token]; the lanes past the last token repeat it.
// Returns whether all are finite.
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

// Sums [row][token], rows `width` apart, to y [token][row], tokens `stride` apart, with the bias.
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

}  // namespace
}  // namespace sparsekit::SPARSEKIT_LEVEL
