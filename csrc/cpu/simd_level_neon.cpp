// The kernels at NEON, which every 64-bit ARM processor has. They were tested in QEMU, never measured.
#include "simd_level_headers.h"

#if defined(__aarch64__)
#define SPARSEKIT_LEVEL neon
#define SPARSEKIT_NEON
#define SPARSEKIT_FEATURES ""
#include "simd_level_table.h"
#endif
