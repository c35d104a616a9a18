// linear24. For few tokens the weight is read once and expanded in registers, and several rows share every load of x.
// For many tokens the vector lanes are tokens, so that dropped weights cost no arithmetic.
#pragma once

#include "row_vectors.h"
#include "token_tiles.h"

namespace sparsekit::SPARSEKIT_LEVEL {
namespace {

// How many weight rows are worked on at once: rows * tokens sums, the rows' weights and one vector of x stay in
// registers (32 with AVX-512, else 16).
#if defined(SPARSEKIT_AVX512)
constexpr int rows_at_once(int) { return 4; }
#else
constexpr int rows_at_once(int tokens) { return tokens <= 2 ? 4 : 3; }
#endif

constexpr int64_t kGrain = 65536;  // products of one piece: fewer are not worth a thread
constexpr int64_t kPrefetchBytes = 1024;

// Copies x as [chunk][vector][token of the chunk][column of the vector], so that one pointer walks it. Columns after
// the last whole vector are left out.
template <class T>
void pack_inputs(const Linear24Args& a, typename RowVector<T>::Input* packed) {
  constexpr int kCols = RowVector<T>::kCols;
  const TokenChunks chunks(a.tokens);
  for (int64_t chunk = 0; chunk < chunks.count; ++chunk)
    for (int64_t col = 0; col + kCols <= a.cols; col += kCols)
      for (int64_t token = chunks.begin(chunk); token < chunks.begin(chunk + 1); ++token) {
        const T* x = static_cast<const T*>(a.x) + token * a.cols + col;
        for (int i = 0; i < kCols; ++i) *packed++ = RowVector<T>::input(x[i]);
      }
}

// Multiplies kRows rows from `row` by kTokens tokens from `token`. The order of additions does not depend on kRows and
// kTokens, so that neither the threads nor the other tokens change a result.
template <class T, int kRows, int kTokens>
void rows_times_tokens(const Linear24Args& a, const typename RowVector<T>::Input* inputs, int64_t row, int64_t token) {
  using S = RowVector<T>;
  constexpr int kLine = std::max<int>(2 * 64 / sizeof(T), S::kCols);  // columns of a cache line of values
  const int64_t stored = 2 * (a.cols / 4) + a.cols % 4, bytes = (a.cols + 7) / 8;
  const T* values[kRows];
  const uint8_t* bits[kRows];
  for (int r = 0; r < kRows; ++r) {
    values[r] = static_cast<const T*>(a.values) + (row + r) * stored;
    bits[r] = a.bitmask + (row + r) * bytes;
  }
  decltype(S::zero()) sums[kRows][kTokens];
  for (auto& of_row : sums)
    for (auto& sum : of_row) sum = S::zero();

  const auto add_vector = [&](int offset) __attribute__((always_inline)) {
    decltype(S::expand(values[0], bits[0])) weights[kRows];
    for (int r = 0; r < kRows; ++r) weights[r] = S::expand(values[r] + offset / 2, bits[r] + offset / 8);
    for (int t = 0; t < kTokens; ++t) {
      const auto input = S::load(inputs + offset * kTokens + t * S::kCols);
      for (int r = 0; r < kRows; ++r) sums[r][t] = S::madd(weights[r], input, sums[r][t]);
    }
  };
  const auto advance = [&](int cols) __attribute__((always_inline)) {
    for (int r = 0; r < kRows; ++r) values[r] += cols / 2, bits[r] += cols / 8;
    inputs += cols * kTokens;
  };
  constexpr int64_t kAhead = kPrefetchBytes / sizeof(T);
  int64_t col = 0;
  for (; col + kLine <= a.cols; col += kLine) {
    // The next rows belong to this group and are read already: prefetch those of the next group.
    const int64_t ahead = kAhead + (col / 2 + kAhead < stored ? 0 : (kRows - 1) * stored);
    for (int r = 0; r < kRows; ++r) __builtin_prefetch(values[r] + ahead);
    for (int offset = 0; offset < kLine; offset += S::kCols) add_vector(offset);
    advance(kLine);
  }
  for (; col + S::kCols <= a.cols; col += S::kCols) {
    add_vector(0);
    advance(S::kCols);
  }

  for (int r = 0; r < kRows; ++r)
    for (int t = 0; t < kTokens; ++t) {
      const T* x = static_cast<const T*>(a.x) + (token + t) * a.cols + col;
      float sum = S::total(sums[r][t]);
      for (int64_t i = 0, next = 0; i < a.cols - col; ++i) {
        const bool kept = bits[r][i / 8] >> i % 8 & 1 && next < stored - col / 2;
        sum += (kept ? to_float(values[r][next++]) : 0.0f) * to_float(x[i]);
      }
      if (a.bias) sum += to_float(static_cast<const T*>(a.bias)[row + r]);
      static_cast<T*>(a.y)[(token + t) * a.rows + row + r] = from_float<T>(sum);
    }
}

template <class T>
struct RowsTask {
  const Linear24Args& args;
  const typename RowVector<T>::Input* inputs;
};

// All tokens of the row groups [begin, end), in chunks of kTokens or one less.
template <class T, int kTokens>
void row_groups(int64_t begin, int64_t end, void* context) {
  constexpr int kRows = rows_at_once(kTokens);
  const auto& task = *static_cast<const RowsTask<T>*>(context);
  const Linear24Args& a = task.args;
  const auto* inputs = task.inputs;  // clang 14 captures no structured binding
  const int64_t packed_cols = a.cols / RowVector<T>::kCols * RowVector<T>::kCols, last = std::min(end * kRows, a.rows);
  const TokenChunks chunks(a.tokens);
  const auto all_tokens = [&]<int kHeight>(std::integral_constant<int, kHeight>, int64_t row) {
    for (int64_t chunk = 0; chunk < chunks.count; ++chunk) {
      const int64_t token = chunks.begin(chunk);
      if (chunks.size(chunk) == kTokens)
        rows_times_tokens<T, kHeight, kTokens>(a, inputs + token * packed_cols, row, token);
      else
        rows_times_tokens<T, kHeight, std::max(kTokens - 1, 1)>(a, inputs + token * packed_cols, row, token);
    }
  };
  int64_t row = begin * kRows;
  for (; row + kRows <= last; row += kRows) all_tokens(std::integral_constant<int, kRows>(), row);
  for (; row < last; ++row) all_tokens(std::integral_constant<int, 1>(), row);
}

template <class T, int kTokens = 1>
void linear24_rows(const Linear24Args& a, ParallelFor parallel_for) {
  if constexpr (kTokens < kMaxTokens)
    if (TokenChunks(a.tokens).largest() > kTokens) return linear24_rows<T, kTokens + 1>(a, parallel_for);
  using Input = typename RowVector<T>::Input;
  std::unique_ptr<Input[]> packed;
  const Input* inputs;
  if constexpr (std::is_same_v<Input, T>) inputs = static_cast<const T*>(a.x);
  if (a.tokens > 1 || !std::is_same_v<Input, T>) {
    packed.reset(new Input[a.tokens * a.cols]);
    pack_inputs<T>(a, packed.get());
    inputs = packed.get();
  }
  RowsTask<T> task{a, inputs};
  constexpr int kRows = rows_at_once(kTokens);
  const int64_t grain = 1 + kGrain / (a.cols * a.tokens * kRows + 1);
  parallel_for((a.rows + kRows - 1) / kRows, grain, row_groups<T, kTokens>, &task);
}

// Many tokens. Every thread allocates a tile of x, the sums of a block of rows, and the fp32 of 16-bit values: at most
// kTileBytes + kSumsBytes + kTileBytes, whatever the shape.

constexpr int64_t kRowsAhead = 2;      // of the weight, in steps of rows_per_step
constexpr int64_t kRowsConverted = 8;  // of 16-bit values at once

// The working memory of a thread.
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

// Computes item i, a block of rows times a tile of tokens; the tiles of one block of rows have consecutive items.
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
  // A row has at most kTile / kLanes / 2 values in a tile, and a tail.
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

void linear24(const Linear24Args& a, ParallelFor parallel_for) {
  dispatch(a.dtype, [&]<class T>(T*) {
    if (a.tokens >= kLanesTokens)
      linear24_lanes<T>(a, parallel_for);
    else
      linear24_rows<T>(a, parallel_for);
  });
}

}  // namespace sparsekit::SPARSEKIT_LEVEL
