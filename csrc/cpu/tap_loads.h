// Loads what a tile of a convolution's positions reads at one tap, a vector of positions at once: where positions that
// follow one another read inputs that do, as they all do within an image at stride 1, that is one masked load.
#pragma once

#include "tap_pieces.h"

namespace sparsekit::SPARSEKIT_LEVEL {
namespace {

// Loads the lanes whose bits are set; the others are those of `rest`. Nothing else is read.
inline Floats load_some(const float* from, uint32_t lanes, Floats rest) {
#if defined(SPARSEKIT_AVX512) && !defined(SPARSEKIT_EMULATE)
  return _mm512_mask_loadu_ps(rest, static_cast<__mmask16>(lanes), from);
#elif defined(SPARSEKIT_AVX2)
  const __m256i bits = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i mask = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(lanes)), bits), bits);
  return _mm256_blendv_ps(rest, _mm256_maskload_ps(from, mask), _mm256_castsi256_ps(mask));
#else
  float loaded[kLanes];
  store_lanes(loaded, rest);
  for (; lanes; lanes &= lanes - 1) loaded[std::countr_zero(lanes)] = from[std::countr_zero(lanes)];
  return load_lanes(loaded);
#endif
}

// `input` is where lane 0 reads channel 0 of its image, or would if it were inside of it, in elements of x.
struct LanesLoad {
  int64_t input;
  uint32_t lanes;
  int vector;
};

struct TapLoads {
  LanesLoad first[kMaxVectors];  // of each vector
  LanesLoad more[kMostPositions];
  Piece strided[kMostPositions];
  int more_count = 0, strided_count = 0;

  TapLoads(const ConvShape& shape, int64_t tap, int64_t position, int64_t positions, int vectors) {
    const TapPieces found(shape, tap, position, positions, vectors * kLanes);
    for (int v = 0; v < vectors; ++v) first[v] = {.input = 0, .lanes = 0, .vector = v};
    for (int p = 0; p < found.pieces; ++p) {
      const Piece& piece = found.piece[p];
      if (piece.step != 1) {
        strided[strided_count++] = piece;
        continue;
      }
      const int end = piece.lane + piece.count;
      for (int v = piece.lane / kLanes; v * kLanes < end; ++v) {
        const int begin = std::max(piece.lane - v * kLanes, 0), count = std::min(end - v * kLanes, kLanes) - begin;
        add({.input = piece.input - piece.lane + v * kLanes, .lanes = ((1u << count) - 1) << begin, .vector = v});
      }
    }
  }

  void add(const LanesLoad& next) {
    const bool added = more_count > 0 && more[more_count - 1].vector == next.vector;
    LanesLoad& last = added ? more[more_count - 1] : first[next.vector];
    if (last.lanes == 0) last.input = next.input;
    if (last.input == next.input)
      last.lanes |= next.lanes;
    else
      more[more_count++] = next;
  }

  // Copies one channel, whose first image is at x. `times_zero`, of each vector, becomes NaN where an input is not finite.
  template <int kVectors>
  void copy(const float* x, float* to, Floats* times_zero) const {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      const Floats loaded = load_some(x + first[v].input, first[v].lanes, zeros());
      times_zero[v] = multiply_add(loaded, zeros(), times_zero[v]);
      store_lanes(to + v * kLanes, loaded);
    }
    if (more_count + strided_count > 0) times_zero[0] = multiply_add(copy_rest(x, to), zeros(), times_zero[0]);
  }

  // Returns NaN where an input is not finite, else 0.
  __attribute__((noinline)) Floats copy_rest(const float* x, float* to) const {
    Floats times_zero = zeros();
    for (int i = 0; i < more_count; ++i) {
      float* at = to + more[i].vector * kLanes;
      const Floats loaded = load_some(x + more[i].input, more[i].lanes, load_lanes(at));
      times_zero = multiply_add(loaded, zeros(), times_zero);
      store_lanes(at, loaded);
    }
    for (int i = 0; i < strided_count; ++i)
      for (int lane = 0; lane < strided[i].count; ++lane) {
        const float loaded = x[strided[i].input + lane * strided[i].step];
        times_zero = multiply_add(broadcast(loaded), zeros(), times_zero);
        to[strided[i].lane + lane] = loaded;
      }
    return times_zero;
  }
};

}  // namespace
}  // namespace sparsekit::SPARSEKIT_LEVEL
