// The kernels of arranged 2:4 weights. They have a table of their own, beside kernels.h, because a level of the others takes
// a minute to compile. row_pairs24_layout.h and input_pairs24_kernel.h say what the bytes of an arranged weight are.
#pragma once

#include <string_view>

#include "kernels.h"

namespace sparsekit {

struct MatchRowPairs24Args {
  const uint8_t* bitmask;
  int16_t* pairs;  // [blocks, tiles of inputs, rows of a block / 2, 3]
  int64_t rows, cols;
};

struct Arrange24Args {
  const void* values;
  const uint8_t* bitmask;
  const int16_t* pairs;  // null for input pairs
  uint8_t* data;
  int64_t rows, cols;
  DType dtype;
};

struct RestoreArranged24Args {
  const uint8_t* data;
  void* values;
  uint8_t* bitmask;
  int64_t rows, cols;
  DType dtype;
};

struct LinearArranged24Args {
  const void* x;  // [tokens, cols], contiguous
  const uint8_t* data;
  const void* bias;  // [rows] or null
  void* y;           // [tokens, rows], contiguous
  int64_t tokens, rows, cols;
  int threads;
  DType dtype;
};

struct ArrangedConv24Args {
  const float* x;       // [images, inputs, height, width], contiguous
  const uint8_t* data;  // in row pairs, of [outputs, kernel_height * kernel_width * inputs]
  const float* bias;    // [outputs] or null
  float* y;             // [images, outputs, out_height, out_width], contiguous
  ConvShape shape;
  int threads;
};

struct Arranged24Kernels {
  std::string_view simd_level;
  // Blocks of rows [begin, end).
  void (*match_row_pairs)(const MatchRowPairs24Args&, int64_t begin, int64_t end);
  void (*arrange_row_pairs)(const Arrange24Args&, int64_t begin, int64_t end);
  void (*arrange_input_pairs)(const Arrange24Args&, int64_t begin, int64_t end);
  void (*restore_row_pairs)(const RestoreArranged24Args&, int64_t begin, int64_t end);
  void (*restore_input_pairs)(const RestoreArranged24Args&, int64_t begin, int64_t end);
  void (*linear_row_pairs)(const LinearArranged24Args&, ParallelFor);
  void (*linear_input_pairs)(const LinearArranged24Args&, ParallelFor);
  void (*conv2d_row_pairs)(const ArrangedConv24Args&, ParallelFor);
};

extern const Arranged24Kernels arranged24_scalar;
#if defined(__x86_64__)
extern const Arranged24Kernels arranged24_avx2;
extern const Arranged24Kernels arranged24_avx512;
extern const Arranged24Kernels arranged24_avx512_bf16;
#endif

// The table that a SIMD level uses: its own, or that of the level whose name its name begins with.
inline const Arranged24Kernels& arranged24_kernels([[maybe_unused]] const Kernels& level) {
#if defined(__x86_64__)
  for (const Arranged24Kernels* table : {&arranged24_avx512_bf16, &arranged24_avx512, &arranged24_avx2})
    if (std::string_view(level.simd_level).substr(0, table->simd_level.size()) == table->simd_level) return *table;
#endif
  return arranged24_scalar;
}

}  // namespace sparsekit
