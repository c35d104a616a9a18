// The table of CPU kernels. They take pointers and sizes and know nothing of torch, so that C++ tests can call them.
//
// Where to read on: an op's file (nm.cpp, sparse24.cpp, ...) turns tensors into one of the structs below, splits the
// rows over threads, and calls the table of the active SIMD level. x_kernel.h is the kernel itself, a template that
// simd_level_*.cpp compile once per SIMD level, through simd_level_table.h. elements.h (scalars), lanes.h (integer
// vectors), float_lanes.h (float vectors) are what kernels are written in.
#pragma once

#include <cstdint>

namespace sparsekit {

enum class DType : uint8_t { F32, F16, BF16 };
enum class QuantType : uint8_t { Int8, Int4, Nf4 };

// Runs body(begin, end, context) over [0, count) in parallel, in pieces of at least `grain`.
using RangeBody = void (*)(int64_t begin, int64_t end, void* context);
using ParallelFor = void (*)(int64_t count, int64_t grain, RangeBody body, void* context);

// Strides are in elements; the last dimension is contiguous.
struct NmArgs {
  const void* weight;  // [rows, cols], the score of nm_mask
  int64_t weight_stride;
  void* pruned;  // [rows, cols] of the weight's dtype, may be weight itself; null: mask only
  int64_t pruned_stride;
  const float* scale;  // [cols] or null
  bool* mask;          // [rows, cols], contiguous, or null
  uint8_t* bits;       // [rows, ceil(cols / 8)], contiguous, or null: the same mask, eight columns to a byte
  int64_t cols;
  int n, m;
  DType dtype;
  bool stream;  // whether to write past the caches, because the outputs do not fit them
};

struct BlockScoresArgs {
  const void* weight;  // [rows, cols]
  int64_t weight_stride;
  const float* scale;  // [cols] or null
  const bool* mask;    // [rows, cols], contiguous, or null
  float* scores;       // [ceil(rows / block_rows), ceil(cols / block_cols)], contiguous
  int64_t rows, cols, block_rows, block_cols;
  DType dtype;
};

struct BlockTopkArgs {
  const void* score;  // [rows, cols]
  int64_t score_stride;
  bool* mask;  // [rows, cols], contiguous
  int64_t rows, cols, block_rows, block_cols, k;
  DType dtype;
};

struct TierPruneArgs {
  const void* weight;  // [rows, cols]
  int64_t weight_stride;
  const uint8_t* tiers;      // [ceil(rows / block_rows), ceil(cols / block_cols)], contiguous
  const float* scale;        // [cols] or null: entries are ranked by abs(weight) * scale
  const float* score_scale;  // [cols] or null
  void* pruned;              // [rows, cols] of the weight's dtype, contiguous
  bool* mask;                // [rows, cols], contiguous
  float* scores;             // of the shape of tiers, contiguous
  int64_t rows, cols, block_rows, block_cols, k;  // block_cols is a multiple of 4
  bool nested;                                    // top-k blocks choose among the entries that 2:4 keeps
  DType dtype;
  bool stream;
};

struct TierScoresArgs {
  const void* weight;  // [rows, cols]
  int64_t weight_stride;
  const float* scale;        // [cols] or null: what entries are ranked by
  const float* score_scale;  // [cols] or null
  float* scores;             // [3, ceil(rows / block_rows), ceil(cols / block_cols)], contiguous
  int64_t rows, cols, block_rows, block_cols, k;  // block_cols is a multiple of 4
  bool squared;
  DType dtype;
};

struct TransposableArgs {
  const void* score;  // [rows, cols]
  int64_t score_stride;
  bool* mask;  // [rows, cols], contiguous
  int64_t rows, cols;
  DType dtype;
  bool stream;
};

struct Pack24Args {
  const void* weight;  // [rows, cols]
  int64_t weight_stride;
  const bool* mask;  // [rows, cols], contiguous, or null
  void* values;      // [rows, 2 * (cols / 4) + cols % 4], contiguous
  uint8_t* bitmask;  // [rows, ceil(cols / 8)], contiguous
  int64_t cols;
  DType dtype;
  bool stream;
};

struct PrunePack24Args {
  const void* weight;  // [rows, cols]
  int64_t weight_stride;
  const float* scale;  // [cols] or null
  void* values;        // as in Pack24Args
  uint8_t* bitmask;
  int64_t cols;
  DType dtype;
  bool stream;
};

struct Unpack24Args {
  const void* values;
  const uint8_t* bitmask;
  void* weight;  // [rows, cols], contiguous
  int64_t cols;
  DType dtype;
  bool stream;
};

struct Linear24Args {
  const void* x;  // [tokens, cols], contiguous
  const void* values;
  const uint8_t* bitmask;
  const void* bias;  // [rows] or null
  void* y;           // [tokens, rows], contiguous
  int64_t tokens, rows, cols;
  int threads;
  DType dtype;
};

// All contiguous, in the layout of ops/quant24.py.
struct Linear24qArgs {
  const void* x;  // [tokens, cols]
  const uint8_t* values;
  const uint16_t* scales;  // [rows, ceil(cols / group)] of bfloat16
  const uint8_t* bitmask;
  const void* bias;  // [rows] or null
  void* y;           // [tokens, rows]
  int64_t tokens, rows, cols, group;
  QuantType type;
  DType dtype;
};

// All contiguous, in the layout of ops/quant24.py.
struct Quantize24Args {
  const void* values;  // [rows, 2 * (cols / 4) + cols % 4]
  uint8_t* codes;
  uint16_t* scales;  // [rows, ceil(cols / group)] of bfloat16
  int64_t cols, group;
  QuantType type;
  DType dtype;
};

// All contiguous, from the layout of ops/quant24.py to that of ops/tiled24.py.
struct Tile24Args {
  const uint8_t* codes;
  const uint16_t* scales;
  const uint8_t* bitmask;
  uint8_t* tiles;  // [ceil(rows / 8), tiles of a row, bytes of a tile]
  int64_t rows, cols, group, tiles_of_row;
  QuantType type;
};

// All contiguous; the tiles in the layout of ops/tiled24.py.
struct Linear24qInt8Args {
  const void* x;         // [tokens, cols]
  const uint8_t* tiles;  // [ceil(rows / 8), tiles of a row, bytes of a tile]
  const void* bias;      // [rows] or null
  void* y;               // [tokens, rows]
  int64_t tokens, rows, cols, group;
  QuantType type;
  DType dtype;
};

struct RoundTokensArgs {
  const void* x;   // [tokens, cols], contiguous
  uint8_t* codes;  // [tokens, cols]
  float* steps;    // [tokens]
  int64_t cols, limit;
  DType dtype;
};

// What a convolution of one group is like, besides its weight.
struct ConvShape {
  int64_t images, inputs, height, width, outputs, out_height, out_width;
  int64_t kernel_height, kernel_width, stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x;
};

// All contiguous, in the layout of ops/conv24.py.
struct Conv24Args {
  const void* x;           // [images, inputs, height, width]
  const void* values;      // [outputs, kernel_height * kernel_width, 2 * (inputs / 4) + inputs % 4]
  const uint8_t* bitmask;  // [outputs, kernel_height * kernel_width, ceil(inputs / 8)]
  const void* bias;        // [outputs] or null
  void* y;                 // [images, outputs, out_height, out_width]
  ConvShape shape;
  int threads;
  DType dtype;
};

// All contiguous, in the layout of ops/tiered.py.
struct LinearTieredArgs {
  const void* x;         // [tokens, cols]
  const uint8_t* tiers;  // [ceil(rows / block_rows), ceil(cols / block_cols)]
  const void* dense;
  const void* values;
  const uint8_t* bitmask;
  const void* topk;
  const void* positions;  // uint8_t where a block has at most 256 entries, else int16_t
  const int32_t* starts;  // [ceil(rows / block_rows) + 1, 3]
  const void* bias;       // [rows] or null
  void* y;                // [tokens, rows]
  int64_t tokens, rows, cols, block_rows, block_cols, k;  // block_cols is a multiple of 8
  int threads;
  DType dtype;
};

// All contiguous; `cols` is the number of columns that are pruned together.
struct SparsegptArgs {
  const float* weight;  // [rows, cols]
  const float* factor;  // [cols, cols]
  const bool* given;    // [rows, cols] or null: a mask that was chosen before
  float* pruned;        // [rows, cols]
  float* error;         // [rows, cols]
  bool* mask;           // [rows, cols]
  int64_t cols;
  int n, m;
};

constexpr int64_t kSampleWidth = 2048;  // the most columns of a piece

struct SampleArgs {
  void* logits;          // [rows, cols], F32 or BF16, written only if there is a mask that was drawn
  const uint8_t* drawn;  // [rows, ceil(cols / 8)]: the mask whose logits are stepped before the next one is drawn, or null
  uint8_t* bits;         // [rows, ceil(cols / 8)]
  int64_t stride, cols;
  int64_t width;  // columns of a piece, a multiple of 8 * m
  uint64_t seed, offset;  // offset is that of the mask that is drawn now
  float step;
  int n, m;
  DType dtype;
};

// All contiguous.
struct MaskedArgs {
  const void* weight;   // [rows, cols, taps]
  const uint8_t* bits;  // of entries [rows, taps, full]
  void* masked;         // [rows, cols, taps]
  int64_t cols, full, taps;
  DType dtype;
};

struct Kernels {
  const char* simd_level;
  const char* features;  // what a processor must have, as the compiler names it, separated by commas
  // Rows [begin, end).
  void (*nm)(const NmArgs&, int64_t begin, int64_t end);
  // Pieces [begin, end) of `width` columns, those of the first row first.
  void (*sample)(const SampleArgs&, int64_t begin, int64_t end);
  // Rows [begin, end) of one tap; of more, pieces of 8 columns, those of the first row first.
  void (*masked)(const MaskedArgs&, int64_t begin, int64_t end);
  // Block rows [begin, end).
  void (*block_scores)(const BlockScoresArgs&, int64_t begin, int64_t end);
  void (*block_topk)(const BlockTopkArgs&, int64_t begin, int64_t end);
  void (*tier_prune)(const TierPruneArgs&, int64_t begin, int64_t end);
  void (*tier_scores)(const TierScoresArgs&, int64_t begin, int64_t end);
  // Rows [4 * begin, 4 * end), the last of which may be fewer.
  void (*transposable)(const TransposableArgs&, int64_t begin, int64_t end);
  // Returns the first group that breaks 2:4, as row * (cols / 4) + group, or -1.
  int64_t (*pack24)(const Pack24Args&, int64_t begin, int64_t end);
  void (*prune_pack24)(const PrunePack24Args&, int64_t begin, int64_t end);
  void (*unpack24)(const Unpack24Args&, int64_t begin, int64_t end);
  void (*linear24)(const Linear24Args&, ParallelFor);
  void (*linear24q)(const Linear24qArgs&, ParallelFor);
  void (*linear24q_int8)(const Linear24qInt8Args&, ParallelFor);
  // Tokens [begin, end).
  void (*round_tokens)(const RoundTokensArgs&, int64_t begin, int64_t end);
  void (*quantize24)(const Quantize24Args&, int64_t begin, int64_t end);
  // Rows [8 * begin, 8 * end), the last of which may be fewer.
  void (*tile24)(const Tile24Args&, int64_t begin, int64_t end);
  void (*conv2d24)(const Conv24Args&, ParallelFor);
  void (*linear_tiered)(const LinearTieredArgs&, ParallelFor);
  // Rows [begin, end).
  void (*sparsegpt)(const SparsegptArgs&, int64_t begin, int64_t end);
};

extern const Kernels kernels_scalar;
#if defined(__x86_64__)
extern const Kernels kernels_avx2;         // AVX2, FMA, F16C, BMI, BMI2, LZCNT
extern const Kernels kernels_avx2_vnni;    // and AVX-VNNI: only linear24q_int8 differs
extern const Kernels kernels_avx512;       // AVX-512 F, BW, DQ, VL
extern const Kernels kernels_avx512_vnni;  // and VNNI: only linear24q_int8 differs
extern const Kernels kernels_avx512_bf16;  // and VBMI, VBMI2, VNNI, BF16
#elif defined(__aarch64__)
extern const Kernels kernels_neon;
#endif

// The table in use: that of the best SIMD level of this machine, unless one was forced.
const Kernels& kernels();

}  // namespace sparsekit
