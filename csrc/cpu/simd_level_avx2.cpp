// The kernels at AVX2, FMA, F16C and BMI2.
#include "simd_level_headers.h"

#if defined(__x86_64__)
#define SPARSEKIT_LEVEL avx2
#define SPARSEKIT_AVX2
#define SPARSEKIT_FEATURES SPARSEKIT_AVX2_FEATURES
SPARSEKIT_TARGET_BEGIN(SPARSEKIT_FEATURES)
#include "simd_level_table.h"
SPARSEKIT_TARGET_END
#endif
