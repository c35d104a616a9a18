// The kernels of arranged 2:4 weights at the level of simd_level_scalar.cpp.
#include "arranged24_kernels.h"
#include "simd_level_headers.h"

#define SPARSEKIT_LEVEL scalar
#define SPARSEKIT_FEATURES ""
#include "arranged24_table.h"
