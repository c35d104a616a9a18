// The kernels at AVX2, FMA, F16C and BMI2. Standard headers come before the target region: an inline function of
// theirs compiled inside it could be the copy the linker keeps for the other levels.
#include "level_headers.h"

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi,bmi2,lzcnt,popcnt")
#define SPARSEKIT_LEVEL avx2
#define SPARSEKIT_AVX2
#include "level.inc"
#pragma GCC pop_options
#endif
