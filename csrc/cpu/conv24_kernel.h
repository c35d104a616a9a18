// conv2d24. The vector lanes are positions, of all images one after the other, so that vectors are full on small maps
// too. A tile is in the L1 cache as [tap and input channel][position]: what the convolution of these positions reads,
// in the order of the weight, times which it is the product of linear24. The whole of it, im2col, is never in memory.
#pragma once

#include "tap_pieces.h"
#include "token_tiles.h"

namespace sparsekit::SPARSEKIT_LEVEL {
namespace {

constexpr int64_t kChannelsConverted = 8;             // of 16-bit values at once

// The working memory of a thread.
struct ConvScratch {
  float* tile;    // [input][position]
  float* values;  // [output channel][kept]
  float* sums;    // [output channel][position]
};

// A block of output channels times a tile of positions.
template <class T>
struct ConvBlock {
  const Conv24Args& a;
  int vectors;
  int64_t position, positions, row, rows;
  ConvScratch scratch;
  bool finite;  // whether x is everywhere
  int64_t width = vectors * kLanes, most_inputs = kMaxVectors / vectors * kRun;  // of the tile
  int64_t taps = a.shape.kernel_height * a.shape.kernel_width;
  int64_t tap_values = 2 * (a.shape.inputs / 4) + a.shape.inputs % 4, tap_bytes = (a.shape.inputs + 7) / 8;
  // Taps of whole bytes follow one another as the columns of one row of a weight.
  int64_t joined = a.shape.inputs % 8 == 0 ? taps : 1;

  void run() const {
    const KeptOffsets offsets(width * static_cast<int64_t>(sizeof(float)));
    const auto times_tile = kTimesTile<kRun, kMaxVectors>[vectors - 1];
    const int64_t cols = joined * a.shape.inputs;
    if (a.shape.inputs == 0) std::fill_n(scratch.sums, rows * width, 0.0f);
    for (int64_t tap = 0; tap < taps; tap += joined)
      for (int64_t col = 0; col < cols; col += most_inputs) {
        const int64_t inputs = std::min(most_inputs, cols - col);
        load(tap, col, inputs);
        const int64_t step = std::is_same_v<T, float> ? rows : kChannelsConverted;
        for (int64_t r = 0; r < rows; r += step)
          times_tile(piece(r, std::min(step, rows - r), tap, col, inputs), scratch.tile, offsets, tap + col == 0,
                     scratch.sums + r * width);
      }
    store();
    if (!finite) multiply_dropped_taps();
  }

  // Copies columns [col, col + inputs) of the taps from `tap` on.
  void load(int64_t tap, int64_t col, int64_t inputs) const {
    const int64_t plane = a.shape.height * a.shape.width;
    for (int64_t i = 0; i < inputs;) {
      const int64_t first = (col + i) % a.shape.inputs, count = std::min(a.shape.inputs - first, inputs - i);
      const TapPieces found(a.shape, tap + (col + i) / a.shape.inputs, position, positions, width);
      const T* from = static_cast<const T*>(a.x) + first * plane;
      for (const int64_t end = i + count; i < end; ++i, from += plane) {
        float* to = scratch.tile + i * width;
        for (int g = 0; g < found.gaps; ++g) std::fill_n(to + found.gap[g].lane, found.gap[g].count, 0.0f);
        for (int p = 0; p < found.pieces; ++p) {
          const Piece& each = found.piece[p];
          copy_piece(from + each.input, each.step, each.count, to + each.lane);
        }
      }
    }
  }

  WeightPiece piece(int64_t first, int64_t count, int64_t tap, int64_t col, int64_t inputs) const {
    const int64_t stored = taps * tap_values, begin = tap * tap_values + col / 2;
    const int64_t kept = col + inputs < joined * a.shape.inputs ? inputs / 2 : joined * tap_values - col / 2;
    const T* values = static_cast<const T*>(a.values) + (row + first) * stored + begin;
    WeightPiece piece{.values = scratch.values,
                      .values_stride = kept,
                      .bits = a.bitmask + (row + first) * taps * tap_bytes + tap * tap_bytes + col / 8,
                      .bits_stride = taps * tap_bytes,
                      .rows = count,
                      .inputs = inputs,
                      .ahead = reinterpret_cast<const char*>(values + 2 * rows_per_step(vectors) * stored),
                      .ahead_stride = stored * static_cast<int64_t>(sizeof(T)),
                      .ahead_bytes = kept * static_cast<int64_t>(sizeof(T))};
    if constexpr (std::is_same_v<T, float>) {
      piece.values = values;
      piece.values_stride = stored;
    } else {
      piece.ahead += kChannelsConverted * stored * static_cast<int64_t>(sizeof(T));
      for (int64_t r = 0; r < count; ++r) {
        int64_t i = 0;
        for (; i + kLanes <= kept; i += kLanes)
          store_lanes(scratch.values + r * kept + i, load_lanes(values + r * stored + i));
        for (; i < kept; ++i) scratch.values[r * kept + i] = to_float(values[r * stored + i]);
      }
    }
    return piece;
  }

  // Calls body(lane, count, y) for the positions of each image, where y is theirs in the first output channel.
  template <class Body>
  void each_image(Body body) const {
    const int64_t plane = a.shape.out_height * a.shape.out_width;
    for (int64_t lane = 0; lane < positions;) {
      const int64_t image = (position + lane) / plane, at = (position + lane) % plane;
      const int64_t count = std::min(plane - at, positions - lane);
      body(lane, count, static_cast<T*>(a.y) + (image * a.shape.outputs + row) * plane + at);
      lane += count;
    }
  }

  void store() const {
    each_image([&](int64_t lane, int64_t count, T* y) {
      for (int64_t r = 0; r < rows; ++r, y += a.shape.out_height * a.shape.out_width) {
        const float shift = a.bias ? to_float(static_cast<const T*>(a.bias)[row + r]) : 0.0f;
        const float* sums = scratch.sums + r * width + lane;
        int64_t i = 0;
        for (; i + kLanes <= count; i += kLanes) store_lanes(y + i, add(load_lanes(sums + i), broadcast(shift)));
        for (; i < count; ++i) y[i] = from_float<T>(sums[i] + shift);
      }
    });
  }

  // multiply_dropped for a convolution: where a dropped weight meets an input that is Inf or NaN, the result is NaN.
  void multiply_dropped_taps() const {
    const int64_t plane = a.shape.out_height * a.shape.out_width;
    for (int64_t tap = 0; tap < taps; ++tap) {
      const TapPieces found(a.shape, tap, position, positions, width);
      for (int p = 0; p < found.pieces; ++p)
        for (int i = 0; i < found.piece[p].count; ++i) {
          const int64_t at = position + found.piece[p].lane + i;
          T* y = static_cast<T*>(a.y) + (at / plane * a.shape.outputs + row) * plane + at % plane;
          const T* x = static_cast<const T*>(a.x) + found.piece[p].input + i * found.piece[p].step;
          for (int64_t channel = 0; channel < a.shape.inputs; ++channel, x += a.shape.height * a.shape.width) {
            if (all_finite(x, 1)) continue;
            for (int64_t r = 0; r < rows; ++r)
              if (!(a.bitmask[((row + r) * taps + tap) * tap_bytes + channel / 8] >> channel % 8 & 1))
                y[r * plane] = from_float<T>(std::numeric_limits<float>::quiet_NaN());
          }
        }
    }
  }
};

struct ConvTask {
  const Conv24Args& args;
  int64_t positions;
  bool finite;
  LanesPlan plan;
};

// Items [begin, end): an item is a block of output channels times a tile of positions.
template <class T>
void conv_items(int64_t begin, int64_t end, void* context) {
  const auto& [a, positions, finite, plan] = *static_cast<const ConvTask*>(context);
  constexpr int64_t kLine = 64 / sizeof(float), kTile = kTileBytes / sizeof(float);
  constexpr int64_t kValues = std::is_same_v<T, float> ? 0 : kChannelsConverted * (kTile / kLanes / 2 + kLine);
  const int64_t size = kLine + kTile + kValues + plan.block_rows * plan.widest * kLanes;
  const std::unique_ptr<float[]> memory(new float[size]);
  float* tile = memory.get() + (64 - reinterpret_cast<uintptr_t>(memory.get()) % 64) / sizeof(float);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t i = item % plan.tiles, row = item / plan.tiles * plan.block_rows;
    const int64_t position = plan.first_vector(i) * kLanes, next = plan.first_vector(i + 1) * kLanes;
    const ConvBlock<T> block{.a = a,
                             .vectors = static_cast<int>((next - position) / kLanes),
                             .position = position,
                             .positions = std::min(next, positions) - position,
                             .row = row,
                             .rows = std::min(plan.block_rows, a.shape.outputs - row),
                             .scratch = {tile, tile + kTile, tile + kTile + kValues},
                             .finite = finite};
    block.run();
  }
}

}  // namespace

void conv2d24(const Conv24Args& a, ParallelFor parallel_for) {
  const int64_t positions = a.shape.images * a.shape.out_height * a.shape.out_width;
  dispatch(a.dtype, [&]<class T>(T*) {
    const ConvShape& shape = a.shape;
    const int64_t count = shape.images * shape.inputs * shape.height * shape.width;
    const bool finite = all_finite(static_cast<const T*>(a.x), count);
    ConvTask task{a, positions, finite, LanesPlan(positions, a.shape.outputs, a.threads, 4)};
    parallel_for(task.plan.tiles * task.plan.blocks, 1, conv_items<T>, &task);
  });
}

}  // namespace sparsekit::SPARSEKIT_LEVEL
