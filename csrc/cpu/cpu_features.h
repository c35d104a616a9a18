// Finds which SIMD levels this processor can run: those of which it has all features that the compiler could use.
#pragma once

#include <string_view>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace sparsekit {

// Whether has(feature) holds for every name of a list such as "avx2,fma". For an empty list it does.
template <class Has>
bool has_all(std::string_view features, Has has) {
  while (!features.empty()) {
    const size_t comma = features.find(',');
    if (!has(features.substr(0, comma))) return false;
    features.remove_prefix(comma == features.npos ? features.size() : comma + 1);
  }
  return true;
}

// Whether this processor and its operating system have the feature of this name; false for unknown names.
inline bool has_feature([[maybe_unused]] std::string_view name) {
#if defined(__x86_64__)
  unsigned a, b, c, d;
  const auto ecx_bit = [&](unsigned leaf, int bit) { return __get_cpuid(leaf, &a, &b, &c, &d) && (c >> bit & 1); };
  __builtin_cpu_init();
  if (name == "f16c") return ecx_bit(1, 29);  // not every compiler's builtin knows these three
  if (name == "lzcnt") return ecx_bit(0x80000001, 5);
  if (name == "avxvnni") return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
  if (name == "popcnt") return __builtin_cpu_supports("popcnt");
  if (name == "bmi") return __builtin_cpu_supports("bmi");
  if (name == "bmi2") return __builtin_cpu_supports("bmi2");
  if (name == "fma") return __builtin_cpu_supports("fma");
  if (name == "avx2") return __builtin_cpu_supports("avx2");
  if (name == "avx512f") return __builtin_cpu_supports("avx512f");
  if (name == "avx512bw") return __builtin_cpu_supports("avx512bw");
  if (name == "avx512dq") return __builtin_cpu_supports("avx512dq");
  if (name == "avx512vl") return __builtin_cpu_supports("avx512vl");
  if (name == "avx512vbmi") return __builtin_cpu_supports("avx512vbmi");
  if (name == "avx512vbmi2") return __builtin_cpu_supports("avx512vbmi2");
  if (name == "avx512vnni") return __builtin_cpu_supports("avx512vnni");
  if (name == "avx512bf16") return __builtin_cpu_supports("avx512bf16");
#endif
  return false;
}

}  // namespace sparsekit
