// linear_tiered for few tokens: the weight is read once and expanded in registers; the sums of a row of blocks are in
// the L1 cache.
#pragma once

#include "float_lanes.h"
#include "row_vectors.h"
#include "tiered_blocks.h"

namespace sparsekit::SPARSEKIT_LEVEL {
namespace {

constexpr int64_t kBlocksGrain = 65536;  // products of one piece: fewer are not worth a thread
constexpr int64_t kBlocksAhead = 2048;   // bytes of prefetch
// A row of blocks is divided into so many parts, each with a share of every form. Dense blocks are bound by memory and
// top-k blocks by arithmetic, so that memory is prefetched for the ones while the others are computed. At AVX2,
// 4096x4096 and one token, 32 parts took 0.93 of the time of 8.
constexpr int64_t kBlockParts = 32;

#if defined(SPARSEKIT_AVX512_BF16)
template <class T>
struct TierRowVector : RowVector<T> {};
template <>
struct TierRowVector<BF16> : Bf16FloatRowVector {};  // a vector of 32 columns would span two blocks
#else
template <class T>
using TierRowVector = RowVector<T>;
#endif

// The working memory of a thread: the columns of the blocks of each form in a row of blocks, and a vector of sums for
// each row and token.
struct BlockRowScratch {
  int32_t* lists[kTiers];
  int64_t counts[kTiers];
  float* sums;  // [row][token][lane]
};

// x in fp32, with tokens `stride` apart, padded with zeros to whole blocks.
struct TieredInputs {
  const float* x;
  int64_t stride;
};

template <class T, int kTokens>
struct BlockRowTimesTokens {
  using S = TierRowVector<T>;
  using Vector = decltype(S::zero());
  static constexpr int kCols = S::kCols;

  const LinearTieredArgs& a;
  const float* x;
  int64_t stride;
  const BlockRowScratch& scratch;
  int64_t block_rows = a.block_rows, block_cols = a.block_cols, size = block_rows * block_cols;

  // The rows of a block, one after the other, as vectors.
  struct DenseRows {
    const T* from;
    int64_t cols;

    Vector vector(int v) const { return S::load(from + v * kCols); }
    const T* next() { return from += cols; }
  };
  struct Sparse24Rows {
    const T* values;
    const uint8_t* bits;
    int64_t cols;

    Vector vector(int v) const { return S::expand(values + v * (kCols / 2), bits + v * (kCols / 8)); }
    const T* next() {
      bits += cols / 8;
      return values += cols / 2;
    }
  };

  // Adds the products of kVectors vectors of every row of a block.
  template <int kVectors, class Rows>
  void add_vectors(const float* inputs, Rows weights) const {
    Vector input[kTokens][kVectors];
    for (int t = 0; t < kTokens; ++t)
      for (int v = 0; v < kVectors; ++v) input[t][v] = S::load(inputs + t * stride + v * kCols);
    float* sums = scratch.sums;
    const float* end = sums + block_rows * kTokens * kCols;
#pragma GCC unroll 4
    for (; sums != end; sums += kTokens * kCols) {
      Vector weight[kVectors];
      for (int v = 0; v < kVectors; ++v) weight[v] = weights.vector(v);
      __builtin_prefetch(reinterpret_cast<const char*>(weights.next()) + kBlocksAhead);
      for (int t = 0; t < kTokens; ++t) {
        Vector sum = S::load(sums + t * kCols);
        for (int v = 0; v < kVectors; ++v) sum = S::madd(weight[v], input[t][v], sum);
        std::memcpy(sums + t * kCols, &sum, sizeof sum);
      }
    }
  }

  // Adds the products of a block by pairs of vectors, so that a sum is loaded and stored once for two products. at(col)
  // returns the rows from column col on.
  template <class At>
  void add_block(const float* inputs, At at) const {
    int64_t col = 0;
    for (; col + 2 * kCols <= block_cols; col += 2 * kCols) add_vectors<2>(inputs + col, at(col));
    if (col < block_cols) add_vectors<1>(inputs + col, at(col));
  }

  void add_dense(const T* dense, int64_t begin, int64_t end) const {
    for (int64_t i = begin; i < end; ++i)
      add_block(x + scratch.lists[kDense][i],
                [&](int64_t col) { return DenseRows{dense + i * size + col, block_cols}; });
  }

  void add_sparse24(const T* values, const uint8_t* bits, int64_t begin, int64_t end) const {
    for (int64_t i = begin; i < end; ++i)
      add_block(x + scratch.lists[kSparse24][i], [&](int64_t col) {
        return Sparse24Rows{values + (i * size + col) / 2, bits + (i * size + col) / 8, block_cols};
      });
  }

  // Neighboring entries often share a row: they are added to different lanes of its sum, so that none waits for
  // another.
  template <class Position>
  void add_topk(const T* topk, const Position* positions, int64_t begin, int64_t end) const {
    const BlockPositions in_block(block_rows, block_cols);
    const int64_t k = a.k;
    for (int64_t i = begin; i < end; ++i) {
      const float* inputs = x + scratch.lists[kTopk][i];
      const T* values = topk + i * k;
      const Position* at = positions + i * k;
      for (int64_t e = 0; e < k; ++e) {
        const int64_t position = in_block.inside(at[e]), row = in_block.row(position);
        const float weight = to_float(values[e]);
        const float* input = inputs + position - row * block_cols;
        float* sum = scratch.sums + row * kTokens * kCols + e % kCols;
        for (int t = 0; t < kTokens; ++t) sum[t * kCols] += weight * input[t * stride];
      }
    }
  }

  void run(int64_t block_row, int64_t token) const {
    std::fill_n(scratch.sums, block_rows * kTokens * kCols, 0.0f);
    const int32_t* start = a.starts + kTiers * block_row;
    const T* dense = static_cast<const T*>(a.dense) + start[kDense] * size;
    const T* values = static_cast<const T*>(a.values) + start[kSparse24] * (size / 2);
    const uint8_t* bits = a.bitmask + start[kSparse24] * (size / 8);
    const T* topk = static_cast<const T*>(a.topk) + start[kTopk] * a.k;
    with_positions(a, [&](const auto* positions) {
      positions += start[kTopk] * a.k;
      for (int64_t part = 0; part < kBlockParts; ++part) {
        const auto first = [&](Tier tier, int64_t i) { return scratch.counts[tier] * i / kBlockParts; };
        add_dense(dense, first(kDense, part), first(kDense, part + 1));
        add_sparse24(values, bits, first(kSparse24, part), first(kSparse24, part + 1));
        add_topk(topk, positions, first(kTopk, part), first(kTopk, part + 1));
      }
    });
    const int64_t first = block_row * a.block_rows, rows = std::min(a.block_rows, a.rows - first);
    for (int64_t r = 0; r < rows; ++r)
      for (int t = 0; t < kTokens; ++t) {
        float sum = S::total(S::load(scratch.sums + (r * kTokens + t) * kCols));
        if (a.bias) sum += to_float(static_cast<const T*>(a.bias)[first + r]);
        static_cast<T*>(a.y)[(token + t) * a.rows + first + r] = from_float<T>(sum);
      }
  }
};

// Divides the rows of blocks into pieces with about the same number of stored entries.
struct BlockRowPlan {
  const LinearTieredArgs& a;
  int64_t rows = (a.rows + a.block_rows - 1) / a.block_rows, pieces;

  explicit BlockRowPlan(const LinearTieredArgs& a) : a(a) {
    pieces = std::clamp<int64_t>(entries(rows) * a.tokens / kBlocksGrain, 1, std::min<int64_t>(rows, a.threads));
  }
  int64_t entries(int64_t row) const {
    const int32_t* start = a.starts + kTiers * row;
    const int64_t size = a.block_rows * a.block_cols;
    return start[kDense] * size + start[kSparse24] * (size / 2) + start[kTopk] * a.k;
  }
  int64_t first_row(int64_t piece) const {
    if (piece == pieces) return rows;
    const int64_t wanted = entries(rows) * piece / pieces;
    int64_t low = 0, high = rows;  // of the first row of blocks with so many entries before it
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (entries(middle) < wanted)
        low = middle + 1;
      else
        high = middle;
    }
    return low;
  }
};

template <class T>
struct BlockRowTask {
  const LinearTieredArgs& args;
  BlockRowPlan plan;
  TieredInputs inputs;
};

// All tokens of the pieces [begin, end), in chunks of kTokens or one less.
template <class T, int kTokens>
void block_row_pieces(int64_t begin, int64_t end, void* context) {
  const auto& [a, plan, inputs] = *static_cast<const BlockRowTask<T>*>(context);
  const int64_t blocks = (a.cols + a.block_cols - 1) / a.block_cols;
  const std::unique_ptr<int32_t[]> lists(new int32_t[kTiers * (blocks + 1)]);
  const std::unique_ptr<float[]> sums(new float[a.block_rows * kTokens * TierRowVector<T>::kCols]);
  BlockRowScratch scratch{{lists.get(), lists.get() + blocks + 1, lists.get() + 2 * (blocks + 1)}, {}, sums.get()};
  const TokenChunks chunks(a.tokens);
  for (int64_t row = plan.first_row(begin); row < plan.first_row(end); ++row) {
    list_tiers(a.tiers + row * blocks, blocks, static_cast<int32_t>(a.block_cols), scratch.lists, scratch.counts);
    limit_counts(a, row, a.starts + kTiers * row, scratch.counts);
    for (int64_t chunk = 0; chunk < chunks.count; ++chunk) {
      const int64_t token = chunks.begin(chunk);
      const float* x = inputs.x + token * inputs.stride;
      if (chunks.size(chunk) == kTokens)
        BlockRowTimesTokens<T, kTokens>{a, x, inputs.stride, scratch}.run(row, token);
      else
        BlockRowTimesTokens<T, std::max(kTokens - 1, 1)>{a, x, inputs.stride, scratch}.run(row, token);
    }
  }
}

template <class T, int kTokens = 1>
void linear_tiered_rows(const LinearTieredArgs& a, ParallelFor parallel_for) {
  if constexpr (kTokens < kMaxTokens)
    if (TokenChunks(a.tokens).largest() > kTokens) return linear_tiered_rows<T, kTokens + 1>(a, parallel_for);
  const int64_t padded = (a.cols + a.block_cols - 1) / a.block_cols * a.block_cols;
  TieredInputs inputs{nullptr, padded + 16};  // not whole pages, which would share sets of the cache
  std::unique_ptr<float[]> copied;
  if (std::is_same_v<T, float> && a.tokens == 1 && a.cols == padded) {
    inputs.x = static_cast<const float*>(a.x);
  } else {
    copied.reset(new float[a.tokens * inputs.stride]);
    for (int64_t token = 0; token < a.tokens; ++token) {
      const T* x = static_cast<const T*>(a.x) + token * a.cols;
      float* to = copied.get() + token * inputs.stride;
      for (int64_t i = 0; i < a.cols; ++i) to[i] = to_float(x[i]);
      std::fill(to + a.cols, to + padded, 0.0f);
    }
    inputs.x = copied.get();
  }
  BlockRowTask<T> task{a, BlockRowPlan(a), inputs};
  parallel_for(task.plan.pieces, 1, block_row_pieces<T, kTokens>, &task);
  const T* x = static_cast<const T*>(a.x);
  if (!all_finite(x, a.tokens * a.cols))
    multiply_dropped(x, a.tokens, a.cols, static_cast<T*>(a.y), a.rows, a.rows,
                     [&a](int64_t row, int64_t col) { return stores(a, row, col); });
}

}  // namespace
}  // namespace sparsekit::SPARSEKIT_LEVEL
