// The product of a 2:4 weight in row pairs, for many tokens: where two rows keep the same input, they share each load of it.
#pragma once

#include "row_pairs24_layout.h"

namespace sparsekit::SPARSEKIT_LEVEL {
namespace {

#if defined(SPARSEKIT_AVX512)
constexpr int kPairVectors = 8;  // 16 sums of the 32 registers
#else
constexpr int kPairVectors = 6;  // 12 sums of the 16 registers
#endif

// The products of two rows with a tile of inputs [input][vector], added to their sums; the first tile's are the sums.
template <int kVectors>
__attribute__((noinline)) void pair_times_tile(const uint16_t* offsets, const float* weights, int64_t shared,
                                               int64_t kept, const char* tile, bool first, float* sums0, float* sums1) {
  constexpr int64_t kScale = stride_of<Floats>(kVectors) / kUnit;
  Floats sum0[kVectors], sum1[kVectors];
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) sum0[v] = sum1[v] = zeros();
  const float* const after_shared = weights + 2 * shared;
  const float* const after = weights + 2 * kept;
  for (; weights != after_shared; weights += 2) {
    const float* input = reinterpret_cast<const float*>(tile + *offsets++ * kScale);
    const Floats weight0 = broadcast(weights[0]), weight1 = broadcast(weights[1]);
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      Floats lanes = load_lanes(input + v * kLanes);
      load_once(lanes);
      sum0[v] = multiply_add(weight0, lanes, sum0[v]);
      sum1[v] = multiply_add(weight1, lanes, sum1[v]);
    }
  }
  for (; weights != after; weights += 2, offsets += 2) {
    const float* input0 = reinterpret_cast<const float*>(tile + offsets[0] * kScale);
    const float* input1 = reinterpret_cast<const float*>(tile + offsets[1] * kScale);
    const Floats weight0 = broadcast(weights[0]), weight1 = broadcast(weights[1]);
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      sum0[v] = multiply_add(weight0, load_lanes(input0 + v * kLanes), sum0[v]);
      sum1[v] = multiply_add(weight1, load_lanes(input1 + v * kLanes), sum1[v]);
    }
  }
  if (!first) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      sum0[v] = add(load_lanes(sums0 + v * kLanes), sum0[v]);
      sum1[v] = add(load_lanes(sums1 + v * kLanes), sum1[v]);
    }
  }
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) {
    store_lanes(sums0 + v * kLanes, sum0[v]);
    store_lanes(sums1 + v * kLanes, sum1[v]);
  }
}

// The inputs of all tokens as [tile of tokens][input][token], and whether all of a tile of tokens are finite.
struct RowPairsTask {
  const LinearArranged24Args& args;
  RowPairsShape shape;
  TokenTiles tokens;
  Aligned<float> inputs;
  std::unique_ptr<bool[]> finite;  // [tile of tokens][tile of inputs]

  explicit RowPairsTask(const LinearArranged24Args& a)
      : args(a),
        shape(a.rows, a.cols),
        tokens(a.tokens, kLanes, kPairVectors, shape.blocks.count, a.threads),
        inputs(tokens.count * a.cols * stride(tokens.widest())),
        finite(new bool[tokens.count * shape.tiles]) {}
  static int64_t stride(int vectors) { return stride_of<Floats>(vectors) / static_cast<int64_t>(sizeof(float)); }
  float* tile(int64_t of_tokens, int64_t of_inputs) const {
    return inputs.get() + of_tokens * shape.cols * stride(tokens.widest()) +
           of_inputs * kPairInputs * stride(tokens.width(of_tokens));
  }
  bool all_finite(int64_t of_tokens) const {
    const bool* from = finite.get() + of_tokens * shape.tiles;
    return std::all_of(from, from + shape.tiles, [](bool each) { return each; });
  }
};

template <class T>
void load_row_pair_tiles(int64_t begin, int64_t end, void* context) {
  const auto& task = *static_cast<const RowPairsTask*>(context);
  const int64_t tiles = task.shape.tiles, cols = task.shape.cols;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t token = i / tiles, tile = i % tiles;
    const T* x = static_cast<const T*>(task.args.x) + task.tokens.begin(token) * cols + tile * kPairInputs;
    const int width = task.tokens.width(token);
    const int lanes = static_cast<int>(task.stride(width) / kLanes);  // vectors, with those that fill up the stride
    task.finite[i] = load_tile(x, cols, task.tokens.size(token), lanes, task.shape.inputs(tile), task.tile(token, tile));
  }
}

// Adds the products of a tile of inputs with the pairs of a block of rows, which begin at `at`, to sums [row][token]; those
// of the first tile are the sums. The row after the last one is the partner of an odd row. Each pair fetches `share` bytes
// of what is needed next. Returns where the pairs of the next tile begin.
template <class T, int kVectors>
const uint8_t* add_pairs(const uint8_t* at, int64_t pairs, int64_t kept, const char* inputs, const char* next, int64_t share,
                         bool first, float* sums) {
  constexpr int64_t kWidth = kVectors * kLanes, kAhead = 1024, kLine = 64;
  float converted[2 * kPairInputs];
  for (int64_t pair = 0; pair < pairs; ++pair, next += share) {
    const PairRecord<const uint8_t> record{at, kept};
    const PairHead head = record.head();
    const float* weights;
    if constexpr (std::is_same_v<T, float>) {
      weights = reinterpret_cast<const float*>(record.weights(head.shared));
    } else {
      convert_weights(reinterpret_cast<const T*>(record.weights(head.shared)), 2 * kept, converted);
      weights = converted;
    }
    const uint8_t* end = record.end<T>(head.shared);
    for (const uint8_t* line = at + kAhead; line < end + kAhead; line += kLine) __builtin_prefetch(line);
    for (int64_t i = 0; i < share; i += kLine) __builtin_prefetch(next + i, 0, 2);
    pair_times_tile<kVectors>(record.offsets(), weights, head.shared, kept, inputs, first, sums + head.first * kWidth,
                              sums + head.second * kWidth);
    at = end;
  }
  return at;
}

// The sums [row][token] of a block of rows.
template <class T, int kVectors>
void sum_row_pairs(const RowPairsTask& task, int64_t block, int64_t token, float* sums) {
  const RowPairsShape& shape = task.shape;
  const int64_t pairs = shape.pairs(block);
  const uint8_t* at = task.args.data + shape.start(task.args.data, block);
  for (int64_t tile = 0; tile < shape.tiles; ++tile) {
    const char* inputs = reinterpret_cast<const char*>(task.tile(token, tile));
    const int64_t bytes = shape.inputs(tile) * stride_of<Floats>(kVectors), share = LanesPlan::ceil_div(bytes / 64, pairs) * 64;
    at = add_pairs<T, kVectors>(at, pairs, kept_of(shape.inputs(tile)), inputs, inputs + bytes, share, tile == 0, sums);
  }
}

// Items [begin, end): a block of rows times a tile of tokens; the tiles of one block have consecutive items.
template <class T>
void row_pairs_items(int64_t begin, int64_t end, void* context) {
  const auto& task = *static_cast<const RowPairsTask*>(context);
  const LinearArranged24Args& a = task.args;
  const RowPairsShape& shape = task.shape;
  const Aligned<float> sums((shape.blocks.height + 1) * task.tokens.widest() * kLanes);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t block = item / task.tokens.count, token = item % task.tokens.count;
    const int64_t row = block * shape.blocks.height, rows = shape.blocks.size(block);
    const int64_t first = task.tokens.begin(token), tokens = task.tokens.size(token);
    const int width = task.tokens.width(token);
    if (shape.tiles == 0) std::fill_n(sums.get(), rows * width * kLanes, 0.0f);
    with_vectors<kPairVectors>(width, [&]<int kVectors>(std::integral_constant<int, kVectors>) {
      sum_row_pairs<T, kVectors>(task, block, token, sums.get());
    });
    T* y = static_cast<T*>(a.y) + first * a.rows + row;
    store_sums(sums.get(), width * kLanes, rows, tokens, a.bias ? static_cast<const T*>(a.bias) + row : nullptr, y, a.rows);
    if (task.all_finite(token)) continue;
    const int64_t bytes = (a.cols + 7) / 8;
    const std::unique_ptr<uint8_t[]> bits(new uint8_t[rows * bytes]);
    restore_block<T>(shape, a.data, block, nullptr, bits.get());
    multiply_dropped(static_cast<const T*>(a.x) + first * a.cols, tokens, a.cols, y, rows, a.rows,
                     [&](int64_t r, int64_t col) { return bits[r * bytes + col / 8] >> col % 8 & 1; });
  }
}

}  // namespace

void linear_row_pairs24(const LinearArranged24Args& a, ParallelFor parallel_for) {
  dispatch(a.dtype, [&]<class T>(T*) {
    RowPairsTask task(a);
    parallel_for(task.tokens.count * task.shape.tiles, 8, load_row_pair_tiles<T>, &task);
    parallel_for(task.tokens.count * task.shape.blocks.count, 1, row_pairs_items<T>, &task);
  });
}

}  // namespace sparsekit::SPARSEKIT_LEVEL
