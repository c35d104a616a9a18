// The floating-point mode of a thread: how it rounds and whether it flushes denormals. `torch.set_flush_denormal` sets
// it for the calling thread only.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace sparsekit {

// Sets the mode of this thread for as long as the object lives. Ops that decide a mask or a score run in kExact, so
// that the result does not depend on the caller's mode; products run in the caller's mode.
class FloatMode {
 public:
  explicit FloatMode(uint64_t mode) : before_(current()), changed_(mode != before_) {
    if (changed_) set(mode);
  }
  FloatMode(const FloatMode&) = delete;
  ~FloatMode() {
    if (changed_) set(before_);
  }

#if defined(__x86_64__)
  static constexpr uint64_t kExact = 0x1f80;  // round to nearest, keep denormals, trap nothing
  static uint64_t current() { return _mm_getcsr() & ~uint64_t{0x3f}; }  // without the exception flags

 private:
  static void set(uint64_t mode) { _mm_setcsr(static_cast<uint32_t>(mode)); }
#elif defined(__aarch64__)
  static constexpr uint64_t kExact = 0;
  static uint64_t current() {
    uint64_t mode;
    asm volatile("mrs %0, fpcr" : "=r"(mode));
    return mode;
  }

 private:
  static void set(uint64_t mode) { asm volatile("msr fpcr, %0" : : "r"(mode)); }
#else
  static constexpr uint64_t kExact = 0;
  static uint64_t current() { return kExact; }

 private:
  static void set(uint64_t) {}
#endif

  uint64_t before_;
  bool changed_;
};

}  // namespace sparsekit
