// The kernels at AVX-512 F, BW, DQ and VL: every server chip since 2017.
#include "simd_level_headers.h"

#if defined(__x86_64__)
#define SPARSEKIT_LEVEL avx512
#define SPARSEKIT_AVX512
#define SPARSEKIT_FEATURES "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi,bmi2,lzcnt,popcnt"
SPARSEKIT_TARGET_BEGIN(SPARSEKIT_FEATURES)
#include "simd_level_table.h"
SPARSEKIT_TARGET_END
#endif
