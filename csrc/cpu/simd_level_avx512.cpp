// The kernels at AVX-512 F, BW, DQ and VL.
#include "simd_level_headers.h"

#if defined(__x86_64__)
#define SPARSEKIT_LEVEL avx512
#define SPARSEKIT_AVX512
#define SPARSEKIT_FEATURES SPARSEKIT_AVX512_FEATURES
SPARSEKIT_TARGET_BEGIN(SPARSEKIT_FEATURES)
#include "simd_level_table.h"
SPARSEKIT_TARGET_END
#endif
