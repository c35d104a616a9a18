// linear24q_int8: every token is rounded to 8 bits, and the products of a row with the columns of a tile are summed as
// integers, exactly, in two lanes: one of the columns whose number, modulo 16, is below 8, and one of the others. Lanes
// are scaled and summed by themselves, so that the order of additions, and with it the result, is the same at every
// level. The weight is read once for every kMaxTokens tokens.
#pragma once

#include "round_tokens_kernel.h"
#include "row_vectors.h"
#include "tile_lanes.h"

namespace sparsekit::SPARSEKIT_LEVEL {
namespace {

constexpr int64_t kTileGrain = 1024;  // products of a tile and a token in one piece: fewer are not worth a thread
// Bytes that are fetched ahead, into the L2 cache and then into the L1 cache: from memory, the hardware alone reads half
// as much in a second, and with one of the two a quarter less.
constexpr int64_t kFarAhead = 8192, kAheadOfTile = 1024;

// Where the inputs of a row of tiles come from: a group of columns begins a tile of its own, and a tail of cols % 4
// columns is stored as pairs of kept values, two columns to a group of four.
struct TileColumns {
  int64_t cols, group;
  int64_t full = cols / 4 * 4, groups = (cols + group - 1) / group;
  int64_t per_group = (group + kTileCols - 1) / kTileCols * kTileCols;

  int64_t places() const {
    if (groups == 0) return 0;
    const int64_t last = full - (groups - 1) * group, tail = (cols - full + 1) / 2 * 4;
    return (groups - 1) * per_group + (last + tail + kTileCols - 1) / kTileCols * kTileCols;
  }
  // Calls body(place, column, count) for every run of columns.
  template <class Body>
  void each_run(Body body) const {
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t begin = g * group, end = std::min(begin + group, full);
      if (begin < end) body(g * per_group, begin, end - begin);
    }
    const int64_t after = groups ? (groups - 1) * per_group + full - (groups - 1) * group : 0;
    for (int64_t col = full; col < cols; col += 2) body(after + 2 * (col - full), col, std::min<int64_t>(2, cols - col));
  }
};

struct RoundedTokens {
  const Linear24qInt8Args& args;
  TileColumns columns;
  int64_t places;
  int8_t* codes;  // [tokens, places]
  float* steps;   // [tokens]
};

template <class T>
void round_to_tiles(int64_t begin, int64_t end, void* context) {
  const auto& [a, columns, places, all_codes, steps] = *static_cast<const RoundedTokens*>(context);
  for (int64_t token = begin; token < end; ++token) {
    const T* x = static_cast<const T*>(a.x) + token * a.cols;
    int8_t* codes = all_codes + token * places;
    std::fill_n(codes, places, static_cast<int8_t>(kInputOffset));
    const float largest = largest_input(x, a.cols);
    steps[token] = largest / (a.type == QuantType::Nf4 ? 127 * 127 : 127);
    if (std::isnan(largest)) continue;
    columns.each_run([&](int64_t place, int64_t col, int64_t count) {
      round_inputs(x + col, count, 127 / largest, kInputOffset, codes + place);
    });
  }
}

#if defined(SPARSEKIT_AVX512) || defined(SPARSEKIT_AVX2)

// Multiplies 8 rows by kTokens tokens.
template <QuantType type, int kTokens>
void row_of_tiles(const uint8_t* tile, int64_t tiles, const int8_t* inputs, int64_t places, float (&y)[][kTileRows]) {
  Totals totals[kTokens][kTileParts];
  for (auto& of_token : totals)
    for (auto& of_part : of_token) of_part = zero_totals();
  for (int64_t i = 0; i < tiles; ++i, tile += tile_bytes(type), inputs += kTileCols) {
    for (int line = 0; line < tile_bytes(type); line += 64) {
      __builtin_prefetch(tile + kFarAhead + line, 0, 2);
      __builtin_prefetch(tile + kAheadOfTile + line);
    }
    for (int part = 0; part < kTileParts; ++part) {
      Bytes sums[kTokens];
      for (auto& of_token : sums) of_token = zero_sums();
      const Bytes index = load_index(tile, part);
#if defined(SPARSEKIT_VNNI)
      Bytes excess = zero_sums();  // from the offset of the inputs
#endif
      const auto step = [&]<int step>(std::integral_constant<int, step>) __attribute__((always_inline)) {
        const Bytes selected = select<step>(index);
        const Products products(load_codes<type>(tile, part, step));
#if defined(SPARSEKIT_VNNI)
        excess = products.add_to(excess, offsets());
#endif
        for (int t = 0; t < kTokens; ++t)
          sums[t] = products.add_to(sums[t], pick(inputs + t * places + step * kStepCols, selected));
      };
      step(std::integral_constant<int, 0>());
      step(std::integral_constant<int, 1>());
      step(std::integral_constant<int, 2>());
      step(std::integral_constant<int, 3>());
#if defined(SPARSEKIT_VNNI)
      for (auto& of_token : sums) of_token = subtract(of_token, excess);
#endif
      const Totals scales = scales_of(tile, part);
      for (int t = 0; t < kTokens; ++t) totals[t][part] = add_scaled(totals[t][part], sums[t], scales);
    }
  }
  for (int t = 0; t < kTokens; ++t) store_rows(y[t], totals[t]);
}

#else

template <QuantType type, int kTokens>
void row_of_tiles(const uint8_t* tile, int64_t tiles, const int8_t* inputs, int64_t places, float (&y)[][kTileRows]) {
  float totals[kTokens][kTileRows][2] = {};
  for (int64_t i = 0; i < tiles; ++i, tile += tile_bytes(type), inputs += kTileCols)
    for (int stored = 0; stored < kTileRows; ++stored) {
      int32_t sums[kTokens][2] = {};
      for (int step = 0; step < kSteps; ++step)
        for (int k = 0; k < 8; ++k) {
          const int at = 8 * stored + k;
          const int place = step * kStepCols + k / 2 * 4 + (tile[kIndexAt + at] >> 2 * step & 3);
          const uint8_t* codes = tile + kCodesAt;
          const int code = type == QuantType::Int8
                               ? static_cast<int8_t>(codes[64 * step + at])
                               : table_of(type)[codes[64 * (step / 2) + at] >> step % 2 * 4 & 15];
          for (int t = 0; t < kTokens; ++t) sums[t][k / 4] += code * inputs[t * places + place];
        }
      const int row = kStoredRow[stored];
      BF16 scale;
      std::memcpy(&scale, tile + 2 * row, sizeof scale);
      for (int t = 0; t < kTokens; ++t)
        for (int lane = 0; lane < 2; ++lane)
          totals[t][row][lane] += static_cast<float>(sums[t][lane]) * to_float(scale);
    }
  for (int t = 0; t < kTokens; ++t)
    for (int row = 0; row < kTileRows; ++row) y[t][row] = totals[t][row][0] + totals[t][row][1];
}

#endif

template <class T, QuantType type, int kTokens>
void rows_of_tiles(const RoundedTokens& rounded, int64_t row, int64_t token) {
  const auto& [a, columns, places, codes, steps] = rounded;
  const int64_t tiles = places / kTileCols;
  float y[kTokens][kTileRows];
  row_of_tiles<type, kTokens>(a.tiles + row / kTileRows * tiles * tile_bytes(type), tiles, codes + token * places, places,
                              y);
  for (int t = 0; t < kTokens; ++t)
    for (int64_t r = row; r < std::min(row + kTileRows, a.rows); ++r) {
      float value = y[t][r - row] * steps[token + t];
      if (a.bias) value += to_float(static_cast<const T*>(a.bias)[r]);
      static_cast<T*>(a.y)[(token + t) * a.rows + r] = from_float<T>(value);
    }
}

template <class T, QuantType type>
void tile_rows(int64_t begin, int64_t end, void* context) {
  const auto& rounded = *static_cast<const RoundedTokens*>(context);
  const TokenChunks chunks(rounded.args.tokens);
  for (int64_t row = begin * kTileRows; row < end * kTileRows; row += kTileRows)
    for (int64_t chunk = 0; chunk < chunks.count; ++chunk) {
      const auto times = [&]<int... i>(std::integer_sequence<int, i...>) {
        ((chunks.size(chunk) == i + 1 && (rows_of_tiles<T, type, i + 1>(rounded, row, chunks.begin(chunk)), true)) || ...);
      };
      times(std::make_integer_sequence<int, kMaxTokens>());
    }
}

}  // namespace

void linear24q_int8(const Linear24qInt8Args& a, ParallelFor parallel_for) {
  const TileColumns columns{a.cols, a.group};
  const int64_t places = columns.places();
  const std::unique_ptr<int8_t[]> codes(new int8_t[a.tokens * places]);
  const std::unique_ptr<float[]> steps(new float[a.tokens]);
  RoundedTokens rounded{a, columns, places, codes.get(), steps.get()};
  const int64_t blocks = (a.rows + kTileRows - 1) / kTileRows;
  dispatch(a.dtype, [&]<class T>(T*) {
    parallel_for(a.tokens, 1 + 32768 / (places + 1), round_to_tiles<T>, &rounded);
    const auto body = a.type == QuantType::Int8   ? tile_rows<T, QuantType::Int8>
                      : a.type == QuantType::Int4 ? tile_rows<T, QuantType::Int4>
                                                  : tile_rows<T, QuantType::Nf4>;
    parallel_for(blocks, 1 + kTileGrain / (places / kTileCols * a.tokens + 1), body, &rounded);
  });
}

}  // namespace sparsekit::SPARSEKIT_LEVEL
