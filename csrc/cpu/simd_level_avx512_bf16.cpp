// The kernels at AVX-512 with VBMI, VBMI2, VNNI and BF16.
#include "simd_level_headers.h"

#if defined(__x86_64__)
#define SPARSEKIT_LEVEL avx512_bf16
#define SPARSEKIT_AVX512
#define SPARSEKIT_AVX512_BF16
#define SPARSEKIT_VNNI
#define SPARSEKIT_FEATURES SPARSEKIT_AVX512_BF16_FEATURES
SPARSEKIT_TARGET_BEGIN(SPARSEKIT_FEATURES)
#include "simd_level_table.h"
SPARSEKIT_TARGET_END
#endif
