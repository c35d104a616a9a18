// Constant vectors for groups of m neighboring lanes, and the vector types of the level where it has any.
#pragma once

#include "elements.h"

namespace sparsekit::SPARSEKIT_LEVEL {
namespace {

// Whether an address is aligned for streaming stores.
inline bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 64 == 0; }

// Makes streaming stores visible to other threads.
inline void fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// Ones in the lowest `count` bits, of 64.
inline uint64_t low_bits(int64_t count) { return count < 64 ? (uint64_t{1} << count) - 1 : ~uint64_t{0}; }

// Stores the lowest byte first, whatever the byte order of the machine.
inline void store_bytes(uint8_t* to, uint64_t bits, int64_t bytes) {
  for (int64_t i = 0; i < bytes; ++i) to[i] = static_cast<uint8_t>(bits >> 8 * i);
}

inline void pack_bits(const bool* mask, uint8_t* bits, int64_t cols) {
  for (int64_t i = 0; i < cols; i += 8) {
    unsigned byte = 0;
    for (int64_t j = i; j < std::min(i + 8, cols); ++j) byte |= static_cast<unsigned>(mask[j]) << (j - i);
    bits[i / 8] = static_cast<uint8_t>(byte);
  }
}

// The index, for lane i, of lane (i + r) % m of its group.
template <class Int, int kLanes, int m, int r>
alignas(64) constexpr std::array<Int, kLanes> rotation = [] {
  std::array<Int, kLanes> from{};
  for (int i = 0; i < kLanes; ++i) from[i] = static_cast<Int>(i / m * m + (i + r) % m);
  return from;
}();

// The same for groups of four 16-bit lanes, as the byte indices within 128 bits that pshufb takes.
template <int kBytes, int r>
alignas(64) constexpr std::array<int8_t, kBytes> rotation_bytes = [] {
  std::array<int8_t, kBytes> from{};
  for (int i = 0; i < kBytes; ++i) from[i] = static_cast<int8_t>((i / 8 * 8 + (i + 2 * r) % 8) % 16);
  return from;
}();

// The same for groups of four 32-bit lanes as an immediate.
constexpr int rotation4(int r) { return r % 4 | (1 + r) % 4 << 2 | (2 + r) % 4 << 4 | (3 + r) % 4 << 6; }

// One where the rotation by r brings lane i an entry of a lower index of its group, else zero.
template <class Int, int kLanes, int m, int r>
alignas(64) constexpr std::array<Int, kLanes> wrapped = [] {
  std::array<Int, kLanes> ones{};
  for (int i = 0; i < kLanes; ++i) ones[i] = i % m + r >= m;
  return ones;
}();

}  // namespace
}  // namespace sparsekit::SPARSEKIT_LEVEL

#if defined(SPARSEKIT_AVX512)
#include "simd_avx512.h"
#elif defined(SPARSEKIT_AVX2)
#include "simd_avx2.h"
#elif defined(SPARSEKIT_NEON)
#include "simd_neon.h"
#endif
