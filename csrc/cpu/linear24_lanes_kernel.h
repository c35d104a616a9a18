// linear24 for many tokens: the tokens are the vector lanes.
//
// Each kept value is broadcast and multiplied with the input that its mask bit names, of a vector of tokens: half of the
// arithmetic is really skipped. Per thread it allocates a tile of x, the sums of a block of rows, and 16-bit values in
// fp32: kTileBytes + kSumsBytes + kTileBytes at most, whatever the shape.
#pragma once

#include "dropped_inputs.h"
#include "linear24_tile.h"
#include "token_lanes.h"

namespace sparsekit::SPARSEKIT_LEVEL {
namespace {

constexpr int64_t kRowsAhead = 2;      // of the weight, in steps of rows_per_step
constexpr int64_t kRowsConverted = 8;  // of 16-bit values at once

// Where a thread keeps what it works on.
struct LanesScratch {
  float* tile;    // [input][token]
  float* values;  // [row][kept]
  float* sums;    // [row][token]
};

// A block of rows times a tile of tokens.
template <class T>
struct LanesBlock {
  const Linear24Args& a;
  int vectors;
  int64_t token, tokens, row, rows;
  LanesScratch scratch;
  int64_t width = vectors * kLanes, most_inputs = kMaxVectors / vectors * kRun;  // of the tile
  int64_t stored = 2 * (a.cols / 4) + a.cols % 4, bytes = (a.cols + 7) / 8;

  void run() {
    const KeptOffsets offsets(width * static_cast<int64_t>(sizeof(float)));
    const auto times_tile = kTimesTile<kRun, kMaxVectors>[vectors - 1];
    const T* x = static_cast<const T*>(a.x) + token * a.cols;
    T* y = static_cast<T*>(a.y) + token * a.rows + row;
    bool finite = true;
    if (a.cols == 0) std::fill_n(scratch.sums, rows * width, 0.0f);
    for (int64_t col = 0; col < a.cols; col += most_inputs) {
      const int64_t inputs = std::min(most_inputs, a.cols - col);
      finite &= load_tile(x + col, a.cols, tokens, vectors, inputs, scratch.tile);
      const int64_t step = std::is_same_v<T, float> ? rows : kRowsConverted;
      for (int64_t r = 0; r < rows; r += step)
        times_tile(piece(r, std::min(step, rows - r), col, inputs), scratch.tile, offsets, col == 0,
                   scratch.sums + r * width);
    }
    store_sums(scratch.sums, width, rows, tokens, a.bias ? static_cast<const T*>(a.bias) + row : nullptr, y, a.rows);
    if (!finite)
      multiply_dropped(x, tokens, a.cols, y, rows, a.rows, [this](int64_t r, int64_t col) {
        return a.bitmask[(row + r) * bytes + col / 8] >> col % 8 & 1;
      });
  }

  WeightPiece piece(int64_t first, int64_t count, int64_t col, int64_t inputs) const {
    const T* values = static_cast<const T*>(a.values) + (row + first) * stored + col / 2;
    const T* ahead = values + kRowsAhead * rows_per_step(vectors) * stored;
    const int64_t kept = inputs < most_inputs ? stored - col / 2 : inputs / 2;
    WeightPiece piece{.values = scratch.values,
                      .values_stride = kept,
                      .bits = a.bitmask + (row + first) * bytes + col / 8,
                      .bits_stride = bytes,
                      .rows = count,
                      .inputs = inputs,
                      .ahead = reinterpret_cast<const char*>(ahead),
                      .ahead_stride = stored * static_cast<int64_t>(sizeof(T)),
                      .ahead_bytes = kept * static_cast<int64_t>(sizeof(T))};
    if constexpr (std::is_same_v<T, float>) {
      piece.values = values;
      piece.values_stride = stored;
    } else {
      piece.ahead += kRowsConverted * stored * static_cast<int64_t>(sizeof(T));
      for (int64_t r = 0; r < count; ++r) {
        int64_t i = 0;
        for (; i + kLanes <= kept; i += kLanes)
          store_lanes(scratch.values + r * kept + i, load_lanes(values + r * stored + i));
        for (; i < kept; ++i) scratch.values[r * kept + i] = to_float(values[r * stored + i]);
      }
    }
    return piece;
  }
};

struct LanesTask {
  const Linear24Args& args;
  LanesPlan plan;
};

// Item i is a block of rows times a tile of tokens, all the tiles of a block one after the other.
template <class T>
void lanes_item(const LanesTask& task, int64_t item, const LanesScratch& scratch) {
  const auto& [a, plan] = task;
  const int64_t tile = item % plan.tiles, row = item / plan.tiles * plan.block_rows;
  const int64_t token = plan.first_vector(tile) * kLanes, end = plan.first_vector(tile + 1) * kLanes;
  LanesBlock<T>{.a = a,
                .vectors = static_cast<int>((end - token) / kLanes),
                .token = token,
                .tokens = std::min(end, a.tokens) - token,
                .row = row,
                .rows = std::min(plan.block_rows, a.rows - row),
                .scratch = scratch}
      .run();
}

template <class T>
void lanes_items(int64_t begin, int64_t end, void* context) {
  const auto& task = *static_cast<const LanesTask*>(context);
  constexpr int64_t kLine = 64 / sizeof(float), kTile = kTileBytes / sizeof(float);
  // At most kTile / kLanes / 2 values of a row go with a tile, and a tail.
  constexpr int64_t kValues = std::is_same_v<T, float> ? 0 : kRowsConverted * (kTile / kLanes / 2 + kLine);
  const int64_t size = kLine + kTile + kValues + task.plan.block_rows * task.plan.widest * kLanes;
  const std::unique_ptr<float[]> memory(new float[size]);
  float* tile = memory.get() + (64 - reinterpret_cast<uintptr_t>(memory.get()) % 64) / sizeof(float);
  const LanesScratch scratch{tile, tile + kTile, tile + kTile + kValues};
  for (int64_t item = begin; item < end; ++item) lanes_item<T>(task, item, scratch);
}

template <class T>
void linear24_lanes(const Linear24Args& a, ParallelFor parallel_for) {
  LanesTask task{a, LanesPlan(a.tokens, a.rows, a.threads, 16)};  // whole cache lines of y
  parallel_for(task.plan.tiles * task.plan.blocks, 1, lanes_items<T>, &task);
}

}  // namespace
}  // namespace sparsekit::SPARSEKIT_LEVEL
