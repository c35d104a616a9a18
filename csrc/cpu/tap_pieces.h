// What a tile of a convolution's positions reads at one tap: pieces of rows of an image. Vector lanes are positions, of all
// images one after the other.
#pragma once

#include "token_tiles.h"

namespace sparsekit::SPARSEKIT_LEVEL {
namespace {

constexpr int kMostPositions = kMaxVectors * kLanes;  // of a tile

// Positions of a tile, from `lane` on. `input` is where the first of them reads channel 0 of its image, in elements of x;
// the others are `step` apart.
struct Piece {
  int64_t input, step;
  int lane, count;
};

// What the positions of a tile read at one tap: pieces inside of their images, and between these gaps, which are 0.
struct TapPieces {
  int pieces = 0, gaps = 0;
  Piece piece[kMostPositions], gap[kMostPositions + 1];

  TapPieces(const ConvShape& a, int64_t tap, int64_t position, int64_t positions, int64_t width) {
    const int64_t y_offset = tap / a.kernel_width * a.dilation_y - a.padding_y;
    const int64_t x_offset = tap % a.kernel_width * a.dilation_x - a.padding_x;
    // Outputs [first, last) of a row have their input inside of it.
    const int64_t first = x_offset >= 0 ? 0 : (-x_offset + a.stride_x - 1) / a.stride_x;
    const int64_t last = x_offset >= a.width ? 0 : (a.width - 1 - x_offset) / a.stride_x + 1;
    int64_t image = position / (a.out_height * a.out_width), y = position / a.out_width % a.out_height;
    for (int64_t done = 0, x = position % a.out_width; done < positions; x = 0) {
      const int64_t count = std::min(a.out_width - x, positions - done), input_y = y * a.stride_y + y_offset;
      const int64_t begin = std::max(x, first), end = std::min(x + count, last);
      if (input_y >= 0 && input_y < a.height && begin < end)
        add({.input = (image * a.inputs * a.height + input_y) * a.width + begin * a.stride_x + x_offset,
             .step = a.stride_x,
             .lane = static_cast<int>(done + begin - x),
             .count = static_cast<int>(end - begin)});
      done += count;
      if (++y == a.out_height) y = 0, ++image;
    }
    add_gap(width);
  }

  // Rows that follow one another in memory, as all do where the kernel is 1x1, are one piece.
  void add(const Piece& next) {
    Piece* last = pieces > 0 ? &piece[pieces - 1] : nullptr;
    if (last && next.step == 1 && next.lane == last->lane + last->count && next.input == last->input + last->count) {
      last->count += next.count;
    } else {
      add_gap(next.lane);
      piece[pieces++] = next;
    }
  }

  void add_gap(int64_t end) {
    const int begin = pieces > 0 ? piece[pieces - 1].lane + piece[pieces - 1].count : 0;
    if (begin < end) gap[gaps++] = {.input = 0, .step = 0, .lane = begin, .count = static_cast<int>(end) - begin};
  }
};

// Short pieces are copied by overlapping halves too: at 16x16, one value at a time took as long as the products of 64
// output channels.
template <class T>
void copy_piece(const T* from, int64_t step, int count, float* to) {
  int i = 0;
  if (step != 1) {
    for (; i < count; ++i) to[i] = to_float(from[i * step]);
  } else if (count >= kLanes) {
    for (; i + kLanes <= count; i += kLanes) store_lanes(to + i, load_lanes(from + i));
    if (i < count) store_lanes(to + count - kLanes, load_lanes(from + count - kLanes));
  } else if (std::is_same_v<T, float> && count >= 4) {
    for (; i + 4 <= count; i += 4) std::memcpy(to + i, from + i, 16);
    if (i < count) std::memcpy(to + count - 4, from + count - 4, 16);
  } else {
    for (; i < count; ++i) to[i] = to_float(from[i]);
  }
}

}  // namespace
}  // namespace sparsekit::SPARSEKIT_LEVEL
