// The kernels at AVX-512 with VBMI, VBMI2, VNNI and BF16: Zen 4, Sapphire Rapids and later.
#include "simd_level_headers.h"

#if defined(__x86_64__)
#define SPARSEKIT_LEVEL avx512_bf16
#define SPARSEKIT_AVX512
#define SPARSEKIT_AVX512_BF16
#define SPARSEKIT_VNNI
#define SPARSEKIT_FEATURES \
  "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2,avx512vnni,avx512bf16,avx2,fma,f16c,bmi,bmi2,lzcnt,popcnt"
SPARSEKIT_TARGET_BEGIN(SPARSEKIT_FEATURES)
#include "simd_level_table.h"
SPARSEKIT_TARGET_END
#endif
