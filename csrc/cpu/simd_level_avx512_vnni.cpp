// The level of simd_level_avx512.cpp with AVX-512 VNNI.
#include "simd_level_headers.h"

#if defined(__x86_64__)
#define SPARSEKIT_LEVEL avx512_vnni
#define SPARSEKIT_BASE avx512
#define SPARSEKIT_AVX512
#define SPARSEKIT_VNNI
#define SPARSEKIT_FEATURES SPARSEKIT_AVX512_VNNI_FEATURES
SPARSEKIT_TARGET_BEGIN(SPARSEKIT_FEATURES)
#include "linear24q_int8_kernel.h"
SPARSEKIT_TARGET_END
#include "simd_level_vnni_table.h"
#endif
