// Included by every SIMD level before its target region: all standard headers, because an inline function of theirs
// that is compiled inside the region could be the copy that the linker keeps for other levels; and the macros that name
// a level and its features, and open and close the region.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "kernels.h"

// What the compiler may use at each level, and a processor must have: avx512 is every server chip since 2017, avx512_bf16
// Zen 4, Sapphire Rapids and later. VNNI is vpdpbusd: without AVX-512 in Alder Lake, Zen 5 and later, with it since 2019.
#define SPARSEKIT_AVX2_FEATURES "avx2,fma,f16c,bmi,bmi2,lzcnt,popcnt"
#define SPARSEKIT_AVX2_VNNI_FEATURES "avxvnni," SPARSEKIT_AVX2_FEATURES
#define SPARSEKIT_AVX512_FEATURES "avx512f,avx512bw,avx512dq,avx512vl," SPARSEKIT_AVX2_FEATURES
#define SPARSEKIT_AVX512_VNNI_FEATURES "avx512vnni," SPARSEKIT_AVX512_FEATURES
#define SPARSEKIT_AVX512_BF16_FEATURES "avx512vbmi,avx512vbmi2,avx512bf16," SPARSEKIT_AVX512_VNNI_FEATURES

// For names that contain SPARSEKIT_LEVEL.
#define SPARSEKIT_JOIN_(a, b) a##b
#define SPARSEKIT_JOIN(a, b) SPARSEKIT_JOIN_(a, b)
#define SPARSEKIT_TEXT_(name) #name
#define SPARSEKIT_TEXT(name) SPARSEKIT_TEXT_(name)

#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 warns of the undefined operands inside its own AVX-512 intrinsics: https://gcc.gnu.org/PR105593
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

// Everything between these two is compiled for `features`, with lambdas and templates; an attribute on a function would
// not reach its lambdas.
#define SPARSEKIT_PRAGMA(text) _Pragma(#text)
#if defined(SPARSEKIT_EMULATE)  // the C++ tests emulate a level by SIMDe on a machine that lacks it
#define SPARSEKIT_TARGET_BEGIN(features)
#define SPARSEKIT_TARGET_END
#elif defined(__clang__)
#define SPARSEKIT_TARGET_BEGIN(features) \
  SPARSEKIT_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define SPARSEKIT_TARGET_END SPARSEKIT_PRAGMA(clang attribute pop)
#else
#define SPARSEKIT_TARGET_BEGIN(features) SPARSEKIT_PRAGMA(GCC push_options) SPARSEKIT_PRAGMA(GCC target(features))
#define SPARSEKIT_TARGET_END SPARSEKIT_PRAGMA(GCC pop_options)
#endif
