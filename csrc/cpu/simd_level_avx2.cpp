// The kernels at AVX2, FMA, F16C and BMI2.
#include "simd_level_headers.h"

#if defined(__x86_64__)
#define SPARSEKIT_LEVEL avx2
#define SPARSEKIT_AVX2
#define SPARSEKIT_FEATURES "avx2,fma,f16c,bmi,bmi2,lzcnt,popcnt"
SPARSEKIT_TARGET_BEGIN(SPARSEKIT_FEATURES)
#include "simd_level_table.h"
SPARSEKIT_TARGET_END
#endif
