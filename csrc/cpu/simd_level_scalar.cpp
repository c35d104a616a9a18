// The kernels in plain C++, for processors without the other levels, and as the reference of their tests.
#include "simd_level_headers.h"

#define SPARSEKIT_LEVEL scalar
#define SPARSEKIT_SCALAR
#define SPARSEKIT_FEATURES ""
#include "simd_level_table.h"
