// The convolution by a 2:4 weight in row pairs. It is the product of row_pairs24_kernel.h whose inputs are those at every
// tap, and whose tokens are positions. A tile of it is gathered into the L1 cache and multiplied by all rows, or by one
// block of them where threads would be idle otherwise; the whole of it, im2col, is never in memory.
#pragma once

#include "row_pairs24_kernel.h"
#include "tap_loads.h"

namespace sparsekit::SPARSEKIT_LEVEL {
namespace {

struct ConvRowPairsTask {
  const ArrangedConv24Args& args;
  RowPairsShape shape;
  int64_t parts;  // of the blocks of rows: one, or as many as there are blocks
  TokenTiles positions;

  explicit ConvRowPairsTask(const ArrangedConv24Args& a)
      : args(a),
        shape(a.shape.outputs, a.shape.kernel_height * a.shape.kernel_width * a.shape.inputs),
        parts(fill(count(a), a.threads) ? 1 : shape.blocks.count),
        positions(count(a), kLanes, kPairVectors, parts, a.threads) {}
  static int64_t count(const ArrangedConv24Args& a) { return a.shape.images * a.shape.out_height * a.shape.out_width; }
  // Whether tiles of positions alone are enough for all threads.
  static bool fill(int64_t positions, int threads) {
    return LanesPlan::idle_share(LanesPlan::ceil_div(positions, kPairVectors * kLanes), threads) <= 1.0 / 16;
  }
};

// A part of the blocks of rows times a tile of positions.
template <int kVectors>
struct ConvRowPairs {
  static constexpr int64_t kWidth = kVectors * kLanes, kStride = stride_of<Floats>(kVectors) / sizeof(float);

  const ArrangedConv24Args& a;
  const RowPairsShape& shape;
  int64_t first_block, end_block, position, positions;
  float *tile, *sums;  // [input][kStride], [row][kWidth]
  int64_t first_row = first_block * shape.blocks.height;
  int64_t rows = std::min(end_block * shape.blocks.height, shape.blocks.rows) - first_row;

  void run() const {
    const std::unique_ptr<const uint8_t*[]> at(new const uint8_t*[end_block - first_block]);
    for (int64_t b = first_block; b < end_block; ++b) at[b - first_block] = a.data + shape.start(a.data, b);
    if (shape.tiles == 0) std::fill_n(sums, rows * kWidth, 0.0f);
    const bool finite = each_tile([&](int64_t t) {
      for (int64_t b = first_block; b < end_block; ++b)
        at[b - first_block] = add_pairs<float, kVectors>(at[b - first_block], shape.pairs(b), kept_of(shape.inputs(t)),
                                                         reinterpret_cast<const char*>(tile), nullptr, 0, t == 0,
                                                         sums + (b - first_block) * shape.blocks.height * kWidth);
    });
    if (!finite) multiply_dropped_inputs();
    store();
  }

  // Calls body(number) for every tile of inputs, when they are in `tile`. Returns whether all inputs are finite.
  template <class Body>
  bool each_tile(const Body& body) const {
    bool finite = true;
    int64_t tap = 0, channel = 0;
    TapLoads loads(a.shape, 0, position, positions, kVectors);
    for (int64_t t = 0; t < shape.tiles; ++t) {
      Floats times_zero[kVectors];
      std::fill_n(times_zero, kVectors, zeros());
      for (int64_t i = 0; i < shape.inputs(t); ++i, ++channel) {
        if (channel == a.shape.inputs) loads = TapLoads(a.shape, ++tap, position, positions, kVectors), channel = 0;
        loads.copy<kVectors>(a.x + channel * a.shape.height * a.shape.width, tile + i * kStride, times_zero);
      }
      for (const Floats& each : times_zero) finite &= !any_nan(each);
      body(t);
    }
    return finite;
  }

  // multiply_dropped for sums: where a dropped weight meets an input that is Inf or NaN, the result is NaN.
  __attribute__((noinline)) void multiply_dropped_inputs() const {
    const int64_t bytes = (shape.cols + 7) / 8, block_bytes = shape.blocks.height * bytes;
    const std::unique_ptr<uint8_t[]> bits(new uint8_t[(end_block - first_block) * block_bytes]);
    for (int64_t b = first_block; b < end_block; ++b)
      restore_block<float>(shape, a.data, b, nullptr, bits.get() + (b - first_block) * block_bytes);
    each_tile([&](int64_t t) {
      for (int64_t i = 0; i < shape.inputs(t); ++i)
        for (int64_t lane = 0; lane < kWidth; ++lane) {
          if (std::isfinite(tile[i * kStride + lane])) continue;
          const int64_t col = t * kPairInputs + i;
          for (int64_t r = 0; r < rows; ++r)
            if (!(bits[r * bytes + col / 8] >> col % 8 & 1))
              sums[r * kWidth + lane] = std::numeric_limits<float>::quiet_NaN();
        }
    });
  }

  // Adds the bias and stores the positions of each image.
  void store() const {
    const int64_t plane = a.shape.out_height * a.shape.out_width;
    for (int64_t lane = 0, count; lane < positions; lane += count) {
      const int64_t image = (position + lane) / plane, at = (position + lane) % plane;
      count = std::min(plane - at, positions - lane);
      float* y = a.y + (image * a.shape.outputs + first_row) * plane + at;
      for (int64_t r = 0; r < rows; ++r, y += plane) {
        const float shift = a.bias ? a.bias[first_row + r] : 0.0f;
        const float* from = sums + r * kWidth + lane;
        int64_t i = 0;
        for (; i + kLanes <= count; i += kLanes) store_lanes(y + i, add(load_lanes(from + i), broadcast(shift)));
        for (; i < count; ++i) y[i] = from[i] + shift;
      }
    }
  }
};

// Items [begin, end): a part of the blocks of rows times a tile of positions; the tiles of one part are neighbors.
void conv_row_pairs_items(int64_t begin, int64_t end, void* context) {
  const auto& task = *static_cast<const ConvRowPairsTask*>(context);
  const int64_t blocks = LanesPlan::ceil_div(task.shape.blocks.count, task.parts);
  const Aligned<float> tile(kPairInputs * stride_of<Floats>(task.positions.widest()) / sizeof(float));
  const Aligned<float> sums((blocks * task.shape.blocks.height + 1) * task.positions.widest() * kLanes);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t part = item / task.positions.count, i = item % task.positions.count;
    with_vectors<kPairVectors>(task.positions.width(i), [&]<int kVectors>(std::integral_constant<int, kVectors>) {
      ConvRowPairs<kVectors>{.a = task.args,
                             .shape = task.shape,
                             .first_block = part * blocks,
                             .end_block = std::min((part + 1) * blocks, task.shape.blocks.count),
                             .position = task.positions.begin(i),
                             .positions = task.positions.size(i),
                             .tile = tile.get(),
                             .sums = sums.get()}
          .run();
    });
  }
}

}  // namespace

void conv2d_row_pairs24(const ArrangedConv24Args& a, ParallelFor parallel_for) {
  ConvRowPairsTask task(a);
  parallel_for(task.positions.count * task.parts, 1, conv_row_pairs_items, &task);
}

}  // namespace sparsekit::SPARSEKIT_LEVEL
