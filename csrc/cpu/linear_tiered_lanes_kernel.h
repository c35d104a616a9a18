// linear_tiered for many tokens: the tokens are the vector lanes, and every form's own arithmetic is all that is done.
//
// A run is the blocks of a row of blocks that meet one tile of x, a fixed number of them, so that the order of additions
// is the same whatever the tile's width, and neither the threads nor the other tokens change a result. Per thread it
// allocates a tile of x, the sums of some rows of blocks, and a run's blocks in fp32.
#pragma once

#include "dropped_inputs.h"
#include "linear_tiered_tile.h"
#include "token_lanes.h"

namespace sparsekit::SPARSEKIT_LEVEL {
namespace {

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

// Where a thread keeps what it works on.
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

  // The run of the i-th row of blocks, without its blocks.
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
      const Places places(a.block_rows, a.block_cols);
      const T* topk = static_cast<const T*>(a.topk) + cursor[kTopk] * a.k;
      positions += cursor[kTopk] * a.k;
      TopkEntry* entry = scratch.entries;
      for (int64_t b = 0; b < run.counts[kTopk]; ++b)
        for (int64_t e = 0; e < a.k; ++e, ++topk, ++positions) {
          const int64_t position = places.inside(*positions), row = places.row(position);
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

// Item i is some rows of blocks times a tile of tokens, all the tiles of the rows one after the other.
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
