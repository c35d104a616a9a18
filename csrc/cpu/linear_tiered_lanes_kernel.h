// linear_tiered for many tokens: the vector lanes are tokens, and dropped weights cost no arithmetic.
//
// A run is those blocks of a row of blocks that are multiplied by one tile of x. Their number is fixed, so that the
// order of additions does not depend on the tile's width, and neither the threads nor the other tokens change a result.
// Every thread allocates a tile of x, the sums of some rows of blocks, and the fp32 of a run's blocks.
#pragma once

#include "tiered_blocks.h"
#include "token_tiles.h"

namespace sparsekit::SPARSEKIT_LEVEL {
namespace {

// A kept entry of a top-k block, with the offsets of its row's sums and of its input in the tile, in floats.
struct TopkEntry {
  float value;
  int32_t sums, input;
};

// A run's blocks in fp32, sorted by form.
struct BlockRun {
  int64_t block_rows, block_cols;
  int64_t counts[kTiers];
  const int32_t* inputs[kTiers];  // the offset of every block's first input in the tile, in floats
  const float* dense;
  const float* values;
  const uint8_t* bits;
  const TopkEntry* entries;
  int64_t entry_count;
  const char* ahead[2];  // dense blocks and 2:4 values to prefetch, ahead_bytes with every row
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

struct TieredPlan {
  int64_t blocks, run_blocks;  // of a row of blocks
  LanesPlan lanes;

  explicit TieredPlan(const LinearTieredArgs& a)
      : blocks(LanesPlan::ceil_div(a.cols, a.block_cols)),
        run_blocks(std::max<int64_t>(1, kRun / a.block_cols)),
        lanes(a.tokens, a.rows, a.threads, a.block_rows, most_vectors(run_blocks * a.block_cols)) {}
  static int64_t most_vectors(int64_t inputs) {
    return std::min<int64_t>(kMaxVectors, kTileBytes / (inputs * kLanes * static_cast<int64_t>(sizeof(float))));
  }
};

// The working memory of a thread.
struct TieredScratch {
  float* tile;    // [input][token]
  float* sums;    // [row][token]
  float* floats;  // 16-bit blocks of a run
  TopkEntry* entries;
  int32_t* lists;   // of a run and of the next one
  int32_t* cursors;  // how many blocks of each form come before the run, for every row of blocks
};

// Some rows of blocks times a tile of tokens.
template <class T>
struct TieredLanesBlock {
  const LinearTieredArgs& a;
  const TieredPlan& plan;
  int vectors;
  int64_t token, tokens, row, rows;
  TieredScratch scratch;
  int64_t width = vectors * kLanes, size = a.block_rows * a.block_cols;
  int64_t block_row = row / a.block_rows, block_rows = LanesPlan::ceil_div(rows, a.block_rows);

  void run() {
    const KeptOffsets offsets(width * static_cast<int64_t>(sizeof(float)));
    const auto times_tile = kRunTimesTile<kMaxVectors>[vectors - 1];
    const T* x = static_cast<const T*>(a.x) + token * a.cols;
    T* y = static_cast<T*>(a.y) + token * a.rows + row;
    bool finite = true;
    std::fill_n(scratch.sums, block_rows * a.block_rows * width, 0.0f);
    std::copy_n(a.starts + kTiers * block_row, kTiers * (block_rows + 1), scratch.cursors);
    for (int64_t block = 0; block < plan.blocks; block += plan.run_blocks) {
      const int64_t blocks = std::min(plan.run_blocks, plan.blocks - block), col = block * a.block_cols;
      const int64_t inputs = std::min(blocks * a.block_cols, a.cols - col);
      finite &= load_tile(x + col, a.cols, tokens, vectors, inputs, scratch.tile);
      std::fill(scratch.tile + inputs * width, scratch.tile + blocks * a.block_cols * width, 0.0f);
      BlockRun now = listed(0, block, blocks);
      for (int64_t i = 0; i < block_rows; ++i) {
        BlockRun next{};
        if (i + 1 < block_rows) next = listed(i + 1, block, blocks);
        load_blocks(now, next, i);
        times_tile(now, scratch.tile, offsets, scratch.sums + i * a.block_rows * width);
        for (int tier = 0; tier < kTiers; ++tier) scratch.cursors[kTiers * i + tier] += now.counts[tier];
        now = next;
      }
    }
    store_sums(scratch.sums, width, rows, tokens, a.bias ? static_cast<const T*>(a.bias) + row : nullptr, y, a.rows);
    if (!finite)
      multiply_dropped(x, tokens, a.cols, y, rows, a.rows,
                       [this](int64_t r, int64_t col) { return stores(a, row + r, col); });
  }

  // The run of the i-th row of blocks, before its blocks are loaded.
  BlockRun listed(int64_t i, int64_t block, int64_t blocks) const {
    BlockRun run{};
    run.block_rows = a.block_rows;
    run.block_cols = a.block_cols;
    int32_t* lists[kTiers];
    for (int tier = 0; tier < kTiers; ++tier)
      run.inputs[tier] = lists[tier] = scratch.lists + (i % 2 * kTiers + tier) * (plan.run_blocks + 1);
    list_tiers(a.tiers + (block_row + i) * plan.blocks + block, blocks, static_cast<int32_t>(a.block_cols * width), lists,
               run.counts);
    const int32_t* cursor = scratch.cursors + kTiers * i;
    limit_counts(a, block_row + i, cursor, run.counts);
    run.bits = a.bitmask + cursor[kSparse24] * (size / 8);
    for (int64_t byte = 0; byte < run.counts[kSparse24] * (size / 8); byte += 64) __builtin_prefetch(run.bits + byte);
    return run;
  }

  void load_blocks(BlockRun& run, const BlockRun& next, int64_t i) const {
    const int32_t* cursor = scratch.cursors + kTiers * i;
    const T* dense = static_cast<const T*>(a.dense) + cursor[kDense] * size;
    const T* values = static_cast<const T*>(a.values) + cursor[kSparse24] * (size / 2);
    if constexpr (std::is_same_v<T, float>) {
      run.dense = dense;
      run.values = values;
    } else {
      run.dense = to_floats(dense, run.counts[kDense] * size, scratch.floats);
      run.values = to_floats(values, run.counts[kSparse24] * (size / 2), scratch.floats + run.counts[kDense] * size);
    }
    run.ahead[0] = reinterpret_cast<const char*>(static_cast<const T*>(a.dense) + cursor[kTiers + kDense] * size);
    run.ahead[1] =
        reinterpret_cast<const char*>(static_cast<const T*>(a.values) + cursor[kTiers + kSparse24] * (size / 2));
    run.ahead_bytes[0] = next.counts[kDense] * a.block_cols * static_cast<int64_t>(sizeof(T));
    run.ahead_bytes[1] = next.counts[kSparse24] * (a.block_cols / 2) * static_cast<int64_t>(sizeof(T));
    run.entries = scratch.entries;
    run.entry_count = run.counts[kTopk] * a.k;
    with_positions(a, [&](const auto* positions) {
      const BlockPositions in_block(a.block_rows, a.block_cols);
      const T* topk = static_cast<const T*>(a.topk) + cursor[kTopk] * a.k;
      positions += cursor[kTopk] * a.k;
      TopkEntry* entry = scratch.entries;
      for (int64_t b = 0; b < run.counts[kTopk]; ++b)
        for (int64_t e = 0; e < a.k; ++e, ++topk, ++positions) {
          const int64_t position = in_block.inside(*positions), row = in_block.row(position);
          const int64_t col = position - row * a.block_cols;
          *entry++ = {to_float(*topk), static_cast<int32_t>(row * width),
                      run.inputs[kTopk][b] + static_cast<int32_t>(col * width)};
        }
    });
  }

  static const float* to_floats(const T* from, int64_t count, float* to) {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) store_lanes(to + i, load_lanes(from + i));
    for (; i < count; ++i) to[i] = to_float(from[i]);
    return to;
  }
};

struct TieredLanesTask {
  const LinearTieredArgs& args;
  TieredPlan plan;
};

// Item i is some rows of blocks times a tile of tokens; the tiles of the same rows have consecutive items.
template <class T>
void tiered_lanes_items(int64_t begin, int64_t end, void* context) {
  const auto& [a, plan] = *static_cast<const TieredLanesTask*>(context);
  const LanesPlan& lanes = plan.lanes;
  constexpr int64_t kLine = 64 / sizeof(float), kTile = kTileBytes / sizeof(float);
  const int64_t sums = lanes.block_rows * lanes.widest * kLanes;
  const int64_t floats = std::is_same_v<T, float> ? 0 : plan.run_blocks * a.block_rows * a.block_cols;
  const std::unique_ptr<float[]> memory(new float[kLine + kTile + sums + floats]);
  const std::unique_ptr<TopkEntry[]> entries(new TopkEntry[plan.run_blocks * a.k]);
  const std::unique_ptr<int32_t[]> lists(new int32_t[2 * kTiers * (plan.run_blocks + 1)]);
  const std::unique_ptr<int32_t[]> cursors(new int32_t[kTiers * (lanes.block_rows / a.block_rows + 1)]);
  float* tile = memory.get() + (64 - reinterpret_cast<uintptr_t>(memory.get()) % 64) / sizeof(float);
  const TieredScratch scratch{tile, tile + kTile, tile + kTile + sums, entries.get(), lists.get(), cursors.get()};
  for (int64_t item = begin; item < end; ++item) {
    const int64_t part = item % lanes.tiles, row = item / lanes.tiles * lanes.block_rows;
    const int64_t token = lanes.first_vector(part) * kLanes, last = lanes.first_vector(part + 1) * kLanes;
    TieredLanesBlock<T>{.a = a,
                        .plan = plan,
                        .vectors = static_cast<int>((last - token) / kLanes),
                        .token = token,
                        .tokens = std::min(last, a.tokens) - token,
                        .row = row,
                        .rows = std::min(lanes.block_rows, a.rows - row),
                        .scratch = scratch}
        .run();
  }
}

template <class T>
void linear_tiered_lanes(const LinearTieredArgs& a, ParallelFor parallel_for) {
  TieredLanesTask task{a, TieredPlan(a)};
  parallel_for(task.plan.lanes.tiles * task.plan.lanes.blocks, 1, tiered_lanes_items<T>, &task);
}

}  // namespace
}  // namespace sparsekit::SPARSEKIT_LEVEL
