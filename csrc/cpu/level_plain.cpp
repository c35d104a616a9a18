// The kernels in plain C++: the oracle of the other levels, and what every other processor runs.
#include "level_headers.h"

#define SPARSEKIT_LEVEL plain
#define SPARSEKIT_FEATURES ""
#include "level_table.h"
