// The kernels of arranged 2:4 weights at the level of simd_level_avx512.cpp.
#include "arranged24_kernels.h"
#include "simd_level_headers.h"

#if defined(__x86_64__)
#define SPARSEKIT_LEVEL avx512
#define SPARSEKIT_AVX512
#define SPARSEKIT_FEATURES SPARSEKIT_AVX512_FEATURES
SPARSEKIT_TARGET_BEGIN(SPARSEKIT_FEATURES)
#include "arranged24_table.h"
SPARSEKIT_TARGET_END
#endif
