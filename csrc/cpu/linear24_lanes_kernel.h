// linear24 for many tokens: the tokens are the vector lanes.
#pragma once

#include "linear24_rows_kernel.h"

namespace sparsekit::SPARSEKIT_LEVEL {
namespace {

template <class T>
void linear24_lanes(const Linear24Args& a, ParallelFor parallel_for) {
  linear24_rows<T>(a, parallel_for);
}

}  // namespace
}  // namespace sparsekit::SPARSEKIT_LEVEL
