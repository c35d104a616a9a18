// The 2:4 weight in input pairs, for few tokens: a vector holds some tokens times the two kept inputs of a group, so that
// one multiply-add with an operand from memory does both kept values of a group. x is stored for all six patterns of every
// group, and the weight as where to find its pattern.
//
// Two kept values of a group are an entry; a tail of less than a group gives one entry or two, the last of which may have
// a weight of zero. The bytes are, block by block of rows, tile by tile of 16 entries, and row by row: the two weights of
// each entry, then an uint16 for each, (6 * entry of the tile + pattern) * kUnit. Entries and rows are filled up with
// zeros to multiples of four.
#pragma once

#include "arranged24.h"

namespace sparsekit::SPARSEKIT_LEVEL {
namespace {

constexpr int64_t kEntries = 16;  // of a tile: 12 KB of two vectors of AVX-512
constexpr int kInputPairVectors = 4;

struct InputPairsShape {
  RowBlocks blocks;
  int64_t cols, full, entries, tiles, entry_bytes;

  InputPairsShape(int64_t rows, int64_t cols, DType dtype)
      : blocks(rows),
        cols(cols),
        full(cols / 4),
        entries(full + (cols % 4 + 1) / 2),
        tiles(LanesPlan::ceil_div(entries, kEntries)),
        entry_bytes(dtype == DType::F32 ? 10 : 6) {}
  // Stored entries of a tile, and the first input of an entry and how many it has.
  int64_t stored(int64_t tile) const { return std::min(kEntries, (entries + 3) / 4 * 4 - tile * kEntries); }
  int64_t input(int64_t entry) const { return entry <= full ? 4 * entry : 4 * full + 2; }
  int64_t inputs(int64_t entry) const {
    return entry < full ? 4 : entry < entries ? std::min<int64_t>(2, cols - input(entry)) : 0;
  }
  int64_t stored_rows(int64_t block) const { return (blocks.size(block) + 3) / 4 * 4; }
  // Where the record of a row of a block is.
  int64_t at(int64_t block, int64_t tile, int64_t row) const {
    const int64_t row_bytes = (entries + 3) / 4 * 4 * entry_bytes;
    return block * blocks.height * row_bytes +
           (stored_rows(block) * tile * kEntries + row * stored(tile)) * entry_bytes;
  }
};

// Calls body(entry, weights, offset) for every entry of a row.
template <class T, class Byte, class Body>
void each_entry(const InputPairsShape& shape, Byte* data, int64_t block, int64_t row, const Body& body) {
  constexpr bool kConst = std::is_const_v<Byte>;
  for (int64_t tile = 0; tile < shape.tiles; ++tile) {
    Byte* record = data + shape.at(block, tile, row);
    const int64_t stored = shape.stored(tile);
    auto weights = reinterpret_cast<std::conditional_t<kConst, const T, T>*>(record);
    auto offsets = reinterpret_cast<std::conditional_t<kConst, const uint16_t, uint16_t>*>(
        record + 2 * stored * static_cast<int64_t>(sizeof(T)));
    for (int64_t i = 0; i < stored; ++i) body(tile * kEntries + i, weights + 2 * i, offsets + i);
  }
}

template <class T>
void arrange_row(const InputPairsShape& shape, const T* values, const uint8_t* bitmask, uint8_t* data, int64_t block,
                 int64_t row) {
  each_entry<T>(shape, data, block, row, [&](int64_t entry, T* weights, uint16_t* offset) {
    const int64_t inputs = values ? shape.inputs(entry) : 0, input = shape.input(entry);
    const int pattern = inputs == 4 ? kPatternOf[kept_bits(bitmask + input / 8, input % 8, 4)] : 0;
    for (int64_t i = 0; i < 2; ++i) weights[i] = i < inputs ? *values++ : T{};
    *offset = static_cast<uint16_t>((entry % kEntries * kPatterns + pattern) * kUnit);
  });
}

// Writes the bitmask of a row, which is zero before, and its values unless they are null.
template <class T>
void restore_row(const InputPairsShape& shape, const uint8_t* data, int64_t block, int64_t row, T* values,
                 uint8_t* bitmask) {
  each_entry<T>(shape, data, block, row, [&](int64_t entry, const T* weights, const uint16_t* offset) {
    const int64_t inputs = shape.inputs(entry), input = shape.input(entry), pattern = *offset / kUnit % kPatterns;
    const int64_t kept[2] = {input + kFirstKept[pattern], input + kSecondKept[pattern]};
    for (int64_t i = 0; i < std::min<int64_t>(2, inputs); ++i) {
      bitmask[kept[i] / 8] |= static_cast<uint8_t>(1 << kept[i] % 8);
      if (values) *values++ = weights[i];
    }
  });
}

// The inputs of all tokens as [tile of tokens][tile of entries][entry][pattern][vector of tokens and two inputs].
template <class T>
struct InputPairsTask {
  using P = PairVector<T>;
  using Vector = typename P::Vector;

  const LinearArranged24Args& args;
  InputPairsShape shape;
  TokenTiles tokens;
  int64_t piece;  // rows of a work item
  Aligned<char> inputs;
  std::unique_ptr<bool[]> finite;  // [tile of tokens][tile of entries]

  explicit InputPairsTask(const LinearArranged24Args& a)
      : args(a),
        shape(a.rows, a.cols, a.dtype),
        tokens(a.tokens, P::kTokens, kInputPairVectors, shape.blocks.count, 1),
        piece(shape.blocks.height),
        inputs(tokens.count * shape.tiles * tile_bytes(tokens.widest())),
        finite(new bool[tokens.count * shape.tiles]) {
    while (piece > 32 && LanesPlan::idle_share(items(), a.threads) > 1.0 / 16) piece = (piece / 2 + 15) / 16 * 16;
  }
  static int64_t tile_bytes(int vectors) { return kEntries * kPatterns * stride_of<Vector>(vectors); }
  char* tile(int64_t of_tokens, int64_t of_entries) const {
    return inputs.get() + of_tokens * shape.tiles * tile_bytes(tokens.widest()) +
           of_entries * tile_bytes(tokens.width(of_tokens));
  }
  int64_t pieces() const { return LanesPlan::ceil_div(shape.blocks.height, piece); }  // of a block
  int64_t items() const { return tokens.count * shape.blocks.count * pieces(); }
};

template <class T>
void expand_input_tiles(int64_t begin, int64_t end, void* context) {
  using P = PairVector<T>;
  const auto& task = *static_cast<const InputPairsTask<T>*>(context);
  const InputPairsShape& shape = task.shape;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t token = i / shape.tiles, tile = i % shape.tiles, tokens = task.tokens.size(token);
    const int64_t lanes = task.tokens.width(token) * P::kTokens, stride = stride_of<typename P::Vector>(task.tokens.width(token));
    const T* x = static_cast<const T*>(task.args.x) + task.tokens.begin(token) * shape.cols;
    char* to = task.tile(token, tile);
    bool finite = true;
    for (int64_t entry = tile * kEntries; entry < tile * kEntries + shape.stored(tile); ++entry) {
      const int64_t input = shape.input(entry), inputs = shape.inputs(entry);
      for (int64_t lane = 0; lane < lanes; ++lane)
        finite &= P::expand(x + std::min(lane, tokens - 1) * shape.cols + input, inputs,
                            to + lane * 2 * static_cast<int64_t>(sizeof(typename P::Weight)), stride);
      to += kPatterns * stride;
    }
    task.finite[i] = finite;
  }
}

// Adds the products of kRows rows with a tile to their sums. There are two sums for each row and vector, of the even and
// of the odd entries whatever the number of vectors, which hide the latency of a multiply-add.
template <class P, int kVectors, int kRows>
inline __attribute__((always_inline)) void entries_times_tile(const typename P::Weight* const (&weights)[kRows],
                                                              const uint8_t* const (&offsets)[kRows], int64_t entries,
                                                              const char* tile, bool first, float* sums) {
  using Vector = typename P::Vector;
  constexpr int64_t kScale = stride_of<Vector>(kVectors) / kUnit;
  Floats sum[kRows][kVectors][2];
  for (auto& of_row : sum)
    for (auto& of_vector : of_row) of_vector[0] = of_vector[1] = P::zero();
  for (int64_t entry = 0; entry < entries; entry += 4) {
    uint64_t four[kRows];
    for (int r = 0; r < kRows; ++r) std::memcpy(&four[r], offsets[r] + 2 * entry, sizeof four[r]);
    const auto step = [&]<int i>(std::integral_constant<int, i>) __attribute__((always_inline)) {
      for (int r = 0; r < kRows; ++r) {
        const auto weight = P::weights(weights[r] + 2 * (entry + i));
        const char* inputs = tile + static_cast<uint16_t>(four[r] >> 16 * i) * kScale;
        for (int v = 0; v < kVectors; ++v)
          sum[r][v][i % 2] =
              P::madd(weight, P::inputs(inputs + v * static_cast<int64_t>(sizeof(Vector))), sum[r][v][i % 2]);
      }
    };
    step(std::integral_constant<int, 0>());
    step(std::integral_constant<int, 1>());
    step(std::integral_constant<int, 2>());
    step(std::integral_constant<int, 3>());
  }
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVectors; ++v) {
      float* to = sums + (r * kVectors + v) * kLanes;
      const Floats both = add(sum[r][v][0], sum[r][v][1]);
      store_lanes(to, first ? both : add(load_lanes(to), both));
    }
}

constexpr int input_pair_rows(int vectors) {
#if defined(SPARSEKIT_AVX512)
  return vectors <= 2 ? 4 : 2;
#else
  return vectors == 1 ? 4 : vectors < 4 ? 2 : 1;
#endif
}

// The sums [row][vector][lane] of the rows [begin, end) of a block; `begin` is a multiple of four.
template <class T, int kVectors>
void sum_input_pairs(const InputPairsTask<T>& task, int64_t block, int64_t begin, int64_t end, int64_t token,
                     float* sums) {
  using P = PairVector<T>;
  using Weight = typename P::Weight;
  constexpr int kRows = input_pair_rows(kVectors);
  constexpr int64_t kAhead = 3072;
  const InputPairsShape& shape = task.shape;
  Weight converted[kRows][2 * kEntries];
  for (int64_t tile = 0; tile < shape.tiles; ++tile) {
    const int64_t entries = shape.stored(tile), bytes = entries * shape.entry_bytes;
    const char* inputs = task.tile(token, tile);
    for (int64_t row = begin; row < end; row += kRows) {
      const uint8_t* record = task.args.data + shape.at(block, tile, row);
      for (int64_t byte = 0; byte < kRows * bytes; byte += 64) __builtin_prefetch(record + kAhead + byte);
      const Weight* weights[kRows];
      const uint8_t* offsets[kRows];
      for (int r = 0; r < kRows; ++r, record += bytes) {
        const T* stored = reinterpret_cast<const T*>(record);
        offsets[r] = record + 2 * entries * static_cast<int64_t>(sizeof(T));
        if constexpr (std::is_same_v<T, Weight>) {
          weights[r] = stored;
        } else {
          convert_weights(stored, 2 * entries, converted[r]);
          weights[r] = converted[r];
        }
      }
      float* to = sums + (row - begin) * kVectors * kLanes;
      entries_times_tile<P, kVectors, kRows>(weights, offsets, entries, inputs, tile == 0, to);
    }
  }
}

// Items [begin, end): a piece of a block of rows times a tile of tokens.
template <class T>
void input_pairs_items(int64_t begin, int64_t end, void* context) {
  const auto& task = *static_cast<const InputPairsTask<T>*>(context);
  const LinearArranged24Args& a = task.args;
  const InputPairsShape& shape = task.shape;
  const Aligned<float> sums(task.piece * kInputPairVectors * kLanes);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t token = item % task.tokens.count, piece = item / task.tokens.count % task.pieces();
    const int64_t block = item / task.tokens.count / task.pieces(), first_row = piece * task.piece;
    const int64_t rows = std::min(task.piece, shape.blocks.size(block) - first_row);
    if (rows <= 0) continue;
    const int64_t first = task.tokens.begin(token), tokens = task.tokens.size(token);
    const int width = task.tokens.width(token);
    if (shape.tiles == 0) std::fill_n(sums.get(), rows * width * kLanes, 0.0f);
    with_vectors<kInputPairVectors>(width, [&]<int kVectors>(std::integral_constant<int, kVectors>) {
      sum_input_pairs<T, kVectors>(task, block, first_row, first_row + rows, token, sums.get());
    });
    int64_t lanes = 0;
    for (int64_t row = 0; row < rows; ++row)
      lanes = PairVector<T>::finish(sums.get() + row * width * kLanes, width, sums.get() + row * lanes);
    const int64_t row = block * shape.blocks.height + first_row;
    T* y = static_cast<T*>(a.y) + first * a.rows + row;
    store_sums(sums.get(), lanes, rows, tokens, a.bias ? static_cast<const T*>(a.bias) + row : nullptr, y, a.rows);
    const bool* finite = task.finite.get() + token * shape.tiles;
    if (std::all_of(finite, finite + shape.tiles, [](bool each) { return each; })) continue;
    const int64_t bytes = (a.cols + 7) / 8;
    const std::unique_ptr<uint8_t[]> bits(new uint8_t[rows * bytes]());
    for (int64_t r = 0; r < rows; ++r)
      restore_row<T>(shape, a.data, block, first_row + r, nullptr, bits.get() + r * bytes);
    multiply_dropped(static_cast<const T*>(a.x) + first * a.cols, tokens, a.cols, y, rows, a.rows,
                     [&](int64_t r, int64_t col) { return bits[r * bytes + col / 8] >> col % 8 & 1; });
  }
}

}  // namespace

// Blocks of rows [begin, end).
void arrange_input_pairs24(const Arrange24Args& a, int64_t begin, int64_t end) {
  const InputPairsShape shape(a.rows, a.cols, a.dtype);
  const int64_t stored = 2 * shape.full + a.cols % 4, bytes = (a.cols + 7) / 8;
  dispatch(a.dtype, [&]<class T>(T*) {
    for (int64_t block = begin; block < end; ++block)
      for (int64_t r = 0; r < shape.stored_rows(block); ++r) {
        const int64_t row = block * shape.blocks.height + r;
        const T* values = r < shape.blocks.size(block) ? static_cast<const T*>(a.values) + row * stored : nullptr;
        arrange_row(shape, values, a.bitmask + row * bytes, a.data, block, r);
      }
  });
}

// Blocks of rows [begin, end).
void restore_input_pairs24(const RestoreArranged24Args& a, int64_t begin, int64_t end) {
  const InputPairsShape shape(a.rows, a.cols, a.dtype);
  const int64_t stored = 2 * shape.full + a.cols % 4, bytes = (a.cols + 7) / 8;
  dispatch(a.dtype, [&]<class T>(T*) {
    for (int64_t block = begin; block < end; ++block)
      for (int64_t r = 0; r < shape.blocks.size(block); ++r) {
        const int64_t row = block * shape.blocks.height + r;
        std::fill_n(a.bitmask + row * bytes, bytes, uint8_t{0});
        restore_row(shape, a.data, block, r, static_cast<T*>(a.values) + row * stored, a.bitmask + row * bytes);
      }
  });
}

void linear_input_pairs24(const LinearArranged24Args& a, ParallelFor parallel_for) {
  dispatch(a.dtype, [&]<class T>(T*) {
    InputPairsTask<T> task(a);
    parallel_for(task.tokens.count * task.shape.tiles, 8, expand_input_tiles<T>, &task);
    parallel_for(task.items(), 1, input_pairs_items<T>, &task);
  });
}

}  // namespace sparsekit::SPARSEKIT_LEVEL
