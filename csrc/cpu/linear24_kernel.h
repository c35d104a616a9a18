// linear24: few tokens run along the rows of the weight, many lie in the vector lanes.
#pragma once

#include "linear24_lanes_kernel.h"
#include "linear24_rows_kernel.h"

namespace sparsekit::SPARSEKIT_LEVEL {

void linear24(const Linear24Args& a, ParallelFor parallel_for) {
  dispatch(a.dtype, [&]<class T>(T*) {
    if (a.tokens >= kLanesTokens)
      linear24_lanes<T>(a, parallel_for);
    else
      linear24_rows<T>(a, parallel_for);
  });
}

}  // namespace sparsekit::SPARSEKIT_LEVEL
