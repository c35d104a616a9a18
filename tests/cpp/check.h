// What the kernel tests share: buffers that fault one byte past either end, random weights with every special value,
// and conversions of their own.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "../../csrc/cpu/kernels.h"

namespace check {

using sparsekit::DType;
using sparsekit::Kernels;

// The levels this program can run on this machine, plain first; if asked for, also those that differ from another level
// in linear24q_int8 alone.
std::vector<const Kernels*> levels(bool vnni = false);

using Test = void (*)();

// The tests of all files, by name.
inline std::map<std::string, Test>& tests() {
  static std::map<std::string, Test> all;
  return all;
}

inline bool add(const char* name, Test test) {
  if (tests().emplace(name, test).second) return true;
  std::printf("two tests are named %s\n", name);
  std::abort();
}

inline int failures = 0;

inline void expect(bool holds, const std::string& what) {
  if (holds) return;
  if (++failures <= 20) std::printf("FAILED %s\n", what.c_str());
}

// Memory between two pages that fault, flush with the one or the other, filled with 0xa5.
enum class Flush { Begin, End };

class Buffer {
 public:
  Buffer(size_t bytes, Flush flush) : bytes_(bytes), page_(static_cast<size_t>(sysconf(_SC_PAGESIZE))) {
    inner_ = (bytes + page_ - 1) / page_ * page_ + page_ * (bytes == 0);
    base_ = static_cast<char*>(
        mmap(nullptr, inner_ + 2 * page_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (base_ == MAP_FAILED) std::abort();
    mprotect(base_, page_, PROT_NONE);
    mprotect(base_ + page_ + inner_, page_, PROT_NONE);
    data_ = base_ + page_ + (flush == Flush::End ? inner_ - bytes : 0);
    std::memset(base_ + page_, 0xa5, inner_);
  }
  Buffer(const Buffer&) = delete;
  ~Buffer() { munmap(base_, inner_ + 2 * page_); }

  template <class T>
  T* as() {
    return reinterpret_cast<T*>(data_);
  }
  char* data() { return data_; }
  size_t size() const { return bytes_; }
  std::vector<char> copy() const { return {data_, data_ + bytes_}; }

 private:
  size_t bytes_, page_, inner_;
  char *base_, *data_;
};

inline const char* name(DType dtype) {
  return dtype == DType::F32 ? "float32" : dtype == DType::F16 ? "float16" : "bfloat16";
}

inline size_t size_of(DType dtype) { return dtype == DType::F32 ? 4 : 2; }

#if defined(__aarch64__) || defined(__clang__)
using Half = __fp16;  // GCC 12 has _Float16 in C++ for x86 alone, clang 14 for ARM alone
#else
using Half = _Float16;
#endif

inline float get(const void* data, int64_t i, DType dtype) {
  if (dtype == DType::F32) return static_cast<const float*>(data)[i];
  if (dtype == DType::F16) return static_cast<float>(static_cast<const Half*>(data)[i]);
  const uint32_t bits = static_cast<uint32_t>(static_cast<const uint16_t*>(data)[i]) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline void put(void* data, int64_t i, DType dtype, float value) {
  if (dtype == DType::F32) {
    static_cast<float*>(data)[i] = value;
  } else if (dtype == DType::F16) {
    static_cast<Half*>(data)[i] = static_cast<Half>(value);
  } else {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if (!std::isnan(value)) bits += 0x7fff + (bits >> 16 & 1);
    static_cast<uint16_t*>(data)[i] = static_cast<uint16_t>(bits >> 16);
  }
}

// Normal: no two alike to speak of. Ties: small integers of both signs. Bits: any bits at all, so every kind of NaN,
// Inf and denormal. Special: those often, NaNs of several payloads, and both zeros.
enum class Values { Normal, Ties, Bits, Special };

class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed) {}
  uint64_t bits() { return engine_(); }
  int64_t below(int64_t count) { return static_cast<int64_t>(engine_() % static_cast<uint64_t>(count)); }
  float normal() { return normal_(engine_); }

  void fill(void* data, int64_t count, DType dtype, Values values) {
    static constexpr float kSpecial[] = {0.0f, -0.0f, INFINITY, -INFINITY, NAN, -NAN, std::bit_cast<float>(0x7f810000),
                                         std::bit_cast<float>(0xffff0000), 6e-8f, -6e-8f, 1e-40f, 65504.0f};
    for (int64_t i = 0; i < count; ++i) {
      if (values == Values::Bits) {
        const uint64_t any = bits();
        std::memcpy(static_cast<char*>(data) + i * size_of(dtype), &any, size_of(dtype));
      } else if (values == Values::Ties) {
        put(data, i, dtype, static_cast<float>(below(5) - 2));
      } else {
        const bool special = values == Values::Special && below(2);
        put(data, i, dtype, special ? kSpecial[below(12)] : normal());
      }
    }
  }

 private:
  std::mt19937_64 engine_;
  std::normal_distribution<float> normal_;
};

// Small pieces from the end: a kernel may not count on their order, nor on how the range is divided.
inline void parallel_for(int64_t count, int64_t grain, sparsekit::RangeBody body, void* context) {
  const int64_t step = std::max<int64_t>(grain, 1);
  for (int64_t begin = (count - 1) / step * step; begin >= 0 && count > 0; begin -= step)
    body(begin, std::min(begin + step, count), context);
}

// A mask of bytes as the bits of every row.
inline std::vector<char> as_bits(const std::vector<char>& mask, int64_t rows, int64_t cols) {
  std::vector<char> bits(static_cast<size_t>(rows * ((cols + 7) / 8)), 0);
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t col = 0; col < cols; ++col)
      bits[row * ((cols + 7) / 8) + col / 8] |= static_cast<char>(mask[row * cols + col] << col % 8);
  return bits;
}

inline constexpr DType kDTypes[] = {DType::F32, DType::F16, DType::BF16};

}  // namespace check

// Defines a test, which `main` finds and runs: TEST(blocks) { ... }
#define TEST(name)                                                    \
  static void test_##name();                                          \
  static const bool registered_##name = check::add(#name, test_##name); \
  static void test_##name()
