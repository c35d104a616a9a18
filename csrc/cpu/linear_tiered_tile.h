// The blocks of a row of blocks that meet a tile of x, times that tile, which lies [input][token] in the L1 cache.
#pragma once

#include "linear24_tile.h"
#include "tiered_blocks.h"

namespace sparsekit::SPARSEKIT_LEVEL {
namespace {

// A kept entry of a top-k block: where its row's sums begin, and its input in the tile, in floats.
struct TopkEntry {
  float value;
  int32_t sums, input;
};

// Blocks in fp32, those of a form one after the other.
struct BlockRun {
  int64_t block_rows, block_cols;
  int64_t counts[kTiers];
  const int32_t* inputs[kTiers];  // where the first input of every block lies in the tile, in floats
  const float* dense;
  const float* values;
  const uint8_t* bits;
  const TopkEntry* entries;
  int64_t entry_count;
  const char* ahead[2];  // dense blocks and values to prefetch, so many bytes with every row
  int64_t ahead_bytes[2];
};

// Adds kRows rows' products with the dense and the 2:4 blocks to sums [row][token].
template <int kVectors, int kRows>
inline __attribute__((always_inline)) void rows_times_run(const BlockRun& run, int64_t row, const float* tile,
                                                          const KeptOffsets& offsets, float* sums) {
  constexpr int kTokens = kVectors * kLanes;
  sums += row * kTokens;
  for (int i = 0; i < 2; ++i)
    for (int64_t byte = row * run.ahead_bytes[i]; byte < (row + kRows) * run.ahead_bytes[i]; byte += 64)
      __builtin_prefetch(run.ahead[i] + byte);
  for (int token = 0; token < kRows * kTokens; token += 16) __builtin_prefetch(sums + kRows * kTokens + token);
  Floats sum[kRows][kVectors];
  for (auto& of_row : sum)
    for (auto& lanes : of_row) lanes = zeros();
  const auto add_products = [&](int r, Floats weight, const float* input) __attribute__((always_inline)) {
    for (int v = 0; v < kVectors; ++v)
      sum[r][v] = multiply_add(weight, load_lanes(input + v * kLanes), sum[r][v]);
  };

  const int64_t size = run.block_rows * run.block_cols;
  const float* dense = run.dense + row * run.block_cols;
  for (int64_t i = 0; i < run.counts[kDense]; ++i, dense += size) {
    const float* inputs = tile + run.inputs[kDense][i];
    for (int64_t col = 0; col < run.block_cols; col += 4, inputs += 4 * kTokens) {
      Quad quad[kRows];
      for (int r = 0; r < kRows; ++r) quad[r] = load_quad(dense + r * run.block_cols + col);
      const auto step = [&]<int j>(std::integral_constant<int, j>) __attribute__((always_inline)) {
        for (int r = 0; r < kRows; ++r) add_products(r, broadcast<j>(quad[r]), inputs + j * kTokens);
      };
      step(std::integral_constant<int, 0>());
      step(std::integral_constant<int, 1>());
      step(std::integral_constant<int, 2>());
      step(std::integral_constant<int, 3>());
    }
  }

  const float* values = run.values + row * (run.block_cols / 2);
  const uint8_t* bits = run.bits + row * (run.block_cols / 8);
  for (int64_t i = 0; i < run.counts[kSparse24]; ++i, values += size / 2, bits += size / 8) {
    const char* inputs = reinterpret_cast<const char*>(tile + run.inputs[kSparse24][i]);
    for (int64_t byte = 0; byte < run.block_cols / 8; ++byte, inputs += 8 * kTokens * sizeof(float)) {
      uint64_t offset[kRows];
      Quad quad[kRows];
      for (int r = 0; r < kRows; ++r) {
        offset[r] = offsets.of_byte[bits[r * (run.block_cols / 8) + byte]];
        quad[r] = load_quad(values + r * (run.block_cols / 2) + 4 * byte);
      }
      const auto step = [&]<int j>(std::integral_constant<int, j>) __attribute__((always_inline)) {
        for (int r = 0; r < kRows; ++r)
          add_products(r, broadcast<j>(quad[r]),
                       reinterpret_cast<const float*>(inputs + static_cast<uint16_t>(offset[r] >> 16 * j)));
      };
      step(std::integral_constant<int, 0>());
      step(std::integral_constant<int, 1>());
      step(std::integral_constant<int, 2>());
      step(std::integral_constant<int, 3>());
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVectors; ++v) {
      float* to = sums + r * kTokens + v * kLanes;
      store_lanes(to, add(load_lanes(to), sum[r][v]));
    }
}

template <int kVectors>
void run_times_tile(const BlockRun& run, const float* tile, const KeptOffsets& offsets, float* sums) {
  constexpr int kRows = rows_per_step(kVectors);
  int64_t row = 0;
  for (; row + kRows <= run.block_rows; row += kRows)
    rows_times_run<kVectors, kRows>(run, row, tile, offsets, sums);
  for (; row < run.block_rows; ++row) rows_times_run<kVectors, 1>(run, row, tile, offsets, sums);
  for (int64_t i = 0; i < run.entry_count; ++i) {
    const TopkEntry entry = run.entries[i];
    const Floats weight = broadcast(entry.value);
    for (int v = 0; v < kVectors; ++v) {
      float* to = sums + entry.sums + v * kLanes;
      store_lanes(to, multiply_add(weight, load_lanes(tile + entry.input + v * kLanes), load_lanes(to)));
    }
  }
}

// run_times_tile for 1 to kMaxVectors vectors of tokens.
template <int kMaxVectors>
constexpr auto kRunTimesTile = []<int... i>(std::integer_sequence<int, i...>) {
  return std::array{run_times_tile<i + 1>...};
}(std::make_integer_sequence<int, kMaxVectors>());

}  // namespace
}  // namespace sparsekit::SPARSEKIT_LEVEL
