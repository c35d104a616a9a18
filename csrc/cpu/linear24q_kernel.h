// linear24q: a thread dequantizes some rows of the weight into its caches, and multiplies them by the kernels of
// linear24, whatever the dtype in fp32.
#pragma once

#include "dequantize24.h"
#include "linear24_kernel.h"

namespace sparsekit::SPARSEKIT_LEVEL {
namespace {

constexpr int64_t kFewTokensBytes = 65536;  // of dequantized values, which are read once; twice the L1 cache
constexpr int64_t kManyTokensRows = 96;     // that share the arrangement of x as [input][token]

struct DequantizedTask {
  const Linear24qArgs& args;
  const Linear24Args& floats;  // x, bias and y in fp32; no values
  const float* inputs;         // x, or a copy for RowVector
  int64_t block_rows;
  LanesPlan plan;
};

// Few tokens times `rows` rows; `a` begins at the first of them.
template <int kTokens = 1>
void times_few_tokens(const Linear24Args& a, const float* inputs, int64_t rows) {
  const TokenChunks chunks(a.tokens);
  if constexpr (kTokens < kMaxTokens)
    if (chunks.largest() > kTokens) return times_few_tokens<kTokens + 1>(a, inputs, rows);
  constexpr int kRows = rows_at_once(kTokens);
  const int64_t packed_cols = a.cols / RowVector<float>::kCols * RowVector<float>::kCols;
  const auto all_tokens = [&]<int kHeight>(std::integral_constant<int, kHeight>, int64_t row) {
    for (int64_t chunk = 0; chunk < chunks.count; ++chunk) {
      const int64_t token = chunks.begin(chunk);
      if (chunks.size(chunk) == kTokens)
        rows_times_tokens<float, kHeight, kTokens>(a, inputs + token * packed_cols, row, token);
      else
        rows_times_tokens<float, kHeight, std::max(kTokens - 1, 1)>(a, inputs + token * packed_cols, row, token);
    }
  };
  int64_t row = 0;
  for (; row + kRows <= rows; row += kRows) all_tokens(std::integral_constant<int, kRows>(), row);
  for (; row < rows; ++row) all_tokens(std::integral_constant<int, 1>(), row);
}

// Many tokens times `rows` rows.
inline void times_many_tokens(const Linear24Args& a, const LanesPlan& plan, int64_t rows, const LanesScratch& scratch) {
  for (int64_t tile = 0; tile < plan.tiles; ++tile) {
    const int64_t token = plan.first_vector(tile) * kLanes, end = plan.first_vector(tile + 1) * kLanes;
    LanesBlock<float>{.a = a,
                      .vectors = static_cast<int>((end - token) / kLanes),
                      .token = token,
                      .tokens = std::min(end, a.tokens) - token,
                      .row = 0,
                      .rows = rows,
                      .scratch = scratch}
        .run();
  }
}

inline void dequantized_blocks(int64_t begin, int64_t end, void* context) {
  const auto& task = *static_cast<const DequantizedTask*>(context);
  const Linear24qArgs& q = task.args;
  const int64_t stored = 2 * (q.cols / 4) + q.cols % 4;
  constexpr int64_t kLine = 64 / sizeof(float), kTile = kTileBytes / sizeof(float);
  const bool many = q.tokens >= kLanesTokens;
  const int64_t lanes_size = many ? kTile + task.block_rows * task.plan.widest * kLanes : 0;
  const std::unique_ptr<float[]> memory(new float[kLine + lanes_size + task.block_rows * stored]);
  float* tile = memory.get() + (64 - reinterpret_cast<uintptr_t>(memory.get()) % 64) / sizeof(float);
  float* values = tile + lanes_size;
  for (int64_t block = begin; block < end; ++block) {
    const int64_t row = block * task.block_rows, rows = std::min(task.block_rows, q.rows - row);
    for (int64_t r = 0; r < rows; ++r) dequantize_row(q, row + r, values + r * stored);
    Linear24Args a = task.floats;
    a.values = values;
    a.bitmask = q.bitmask + row * ((q.cols + 7) / 8);
    if (a.bias) a.bias = static_cast<const float*>(a.bias) + row;
    a.y = static_cast<float*>(a.y) + row;
    if (many)
      times_many_tokens(a, task.plan, rows, {tile, nullptr, tile + kTile});
    else
      times_few_tokens(a, task.inputs, rows);
  }
}

// A copy as floats, or the same memory if it has floats already.
template <class T>
const float* as_floats(const void* from, int64_t count, std::unique_ptr<float[]>& copy) {
  if (std::is_same_v<T, float> || !from) return static_cast<const float*>(from);
  copy.reset(new float[count]);
  for (int64_t i = 0; i < count; ++i) copy[i] = to_float(static_cast<const T*>(from)[i]);
  return copy.get();
}

template <class T>
void linear24q_of(const Linear24qArgs& q, ParallelFor parallel_for) {
  std::unique_ptr<float[]> x, bias, y, packed;
  Linear24Args floats{.x = as_floats<T>(q.x, q.tokens * q.cols, x),
                      .values = nullptr,
                      .bitmask = nullptr,
                      .bias = as_floats<T>(q.bias, q.rows, bias),
                      .y = q.y,
                      .tokens = q.tokens,
                      .rows = q.rows,
                      .cols = q.cols,
                      .threads = 1,
                      .dtype = DType::F32};
  if (!std::is_same_v<T, float>) {
    y.reset(new float[q.tokens * q.rows]);
    floats.y = y.get();
  }
  const float* inputs = static_cast<const float*>(floats.x);
  const bool many = q.tokens >= kLanesTokens;
  if (!many && q.tokens > 1) {
    packed.reset(new float[q.tokens * q.cols]);
    pack_inputs<float>(floats, packed.get());
    inputs = packed.get();
  }
  const int64_t few = std::max<int64_t>(1, kFewTokensBytes / (12 * (2 * q.cols + 8))) * 12;  // 12: of 3 or 4 at once
  DequantizedTask task{q, floats, inputs, many ? kManyTokensRows : few, LanesPlan(q.tokens, q.rows, 1, 1)};
  const int64_t blocks = (q.rows + task.block_rows - 1) / task.block_rows;
  parallel_for(blocks, 1 + kGrain / (q.cols * q.tokens * task.block_rows + 1), dequantized_blocks, &task);
  if (!std::is_same_v<T, float>)
    for (int64_t i = 0; i < q.tokens * q.rows; ++i) static_cast<T*>(q.y)[i] = from_float<T>(y[i]);
}

}  // namespace

void linear24q(const Linear24qArgs& a, ParallelFor parallel_for) {
  dispatch(a.dtype, [&]<class T>(T*) { linear24q_of<T>(a, parallel_for); });
}

}  // namespace sparsekit::SPARSEKIT_LEVEL
