// What the two arranged forms of a 2:4 weight share: blocks of rows, the kept inputs of a piece of a row, and vectors of
// tokens that are read by stored offsets. The bytes of an arranged weight are the same at every SIMD level.
#pragma once

#include "arranged24_kernels.h"
#include "pair_vectors.h"
#include "token_tiles.h"

namespace sparsekit::SPARSEKIT_LEVEL {
namespace {

// Divides the rows into blocks of at most 256, whose sums stay in the L2 cache. Blocks are whole cache lines of outputs,
// and there is an even number of them where possible, since most machines have an even number of threads.
struct RowBlocks {
  int64_t rows, height, count;

  explicit RowBlocks(int64_t rows)
      : rows(rows), height(LanesPlan::ceil_div(rows, 2 * LanesPlan::ceil_div(rows, 512) * 16) * 16) {
    count = LanesPlan::ceil_div(rows, height);
  }
  int64_t size(int64_t block) const { return std::min(height, rows - block * height); }
};

// The kept inputs among `inputs` columns from `col`, at most 64, as bits: two of every group, also where a bitmask that no
// packer writes has others, and all of a tail of less than a group.
inline uint64_t kept_bits(const uint8_t* bitmask, int64_t col, int64_t inputs) {
  uint64_t kept = 0;
  const int64_t groups = inputs / 4;
  for (int64_t group = 0; group < groups; ++group) {
    const int pattern = kPatternOf[bitmask[(col + 4 * group) / 8] >> (col + 4 * group) % 8 & 15];
    kept |= (uint64_t{1} << kFirstKept[pattern] | uint64_t{1} << kSecondKept[pattern]) << 4 * group;
  }
  for (int64_t i = 4 * groups; i < inputs; ++i) kept |= uint64_t{1} << i;
  return kept;
}

inline void set_bits(uint8_t* bitmask, int64_t col, uint64_t kept, int64_t inputs) {
  for (int64_t byte = 0; 8 * byte < inputs; ++byte) bitmask[col / 8 + byte] = static_cast<uint8_t>(kept >> 8 * byte);
}

// Stored offsets count bytes, as if the tokens of an input took 64. They are multiplied by a power of two, which costs
// nothing in an address, where the vectors of tokens are wider.
constexpr int64_t kUnit = 64;
template <class Vector>
constexpr int64_t stride_of(int vectors) {
  return std::max<int64_t>(kUnit, std::bit_ceil(static_cast<unsigned>(vectors)) * sizeof(Vector));
}

// Divides the tokens into tiles of at most `most` vectors, as evenly as possible; into more, of no less than two vectors,
// where threads would be idle otherwise.
struct TokenTiles {
  int64_t tokens, lanes, vectors, count;

  TokenTiles(int64_t tokens, int64_t lanes, int64_t most, int64_t blocks, int threads)
      : tokens(tokens), lanes(lanes), vectors(LanesPlan::ceil_div(tokens, lanes)) {
    count = LanesPlan::ceil_div(vectors, most);
    const int64_t limit = std::max(count, std::min(count + threads, vectors / 2));
    while (count < limit && LanesPlan::idle_share(count * blocks, threads) > 1.0 / 16) ++count;
  }
  int64_t begin(int64_t tile) const { return vectors * tile / count * lanes; }
  int64_t size(int64_t tile) const { return std::min(begin(tile + 1), tokens) - begin(tile); }
  int width(int64_t tile) const { return static_cast<int>(vectors * (tile + 1) / count - vectors * tile / count); }
  int widest() const { return static_cast<int>(LanesPlan::ceil_div(vectors, count)); }
};

// Memory that begins at a cache line.
template <class T>
class Aligned {
 public:
  explicit Aligned(int64_t count) : memory_(new char[count * static_cast<int64_t>(sizeof(T)) + 64]) {}
  T* get() const {
    return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(memory_.get()) + 63) & ~uintptr_t{63});
  }

 private:
  std::unique_ptr<char[]> memory_;
};

// Keeps the compiler from loading a vector again wherever it is used, which GCC 12 does to save a register.
inline void load_once(Floats& lanes) {
#if defined(SPARSEKIT_AVX512) && !defined(SPARSEKIT_EMULATE)
  asm("" : "+v"(lanes));
#elif defined(SPARSEKIT_AVX2) && !defined(SPARSEKIT_EMULATE)
  asm("" : "+x"(lanes));
#else
  static_cast<void>(lanes);
#endif
}

// Converts 16-bit weights to float.
template <class T>
void convert_weights(const T* from, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store_lanes(to + i, load_lanes(from + i));
  for (; i < count; ++i) to[i] = to_float(from[i]);
}

// Calls body with 1 to kMost as a constant.
template <int kMost, class Body>
void with_vectors(int64_t vectors, const Body& body) {
  if constexpr (kMost > 1)
    if (vectors < kMost) return with_vectors<kMost - 1>(vectors, body);
  body(std::integral_constant<int, kMost>());
}

}  // namespace
}  // namespace sparsekit::SPARSEKIT_LEVEL
