// linear24 for few tokens: along the rows of the weight.
#pragma once

#include "scalar.h"

namespace sparsekit::SPARSEKIT_LEVEL {
namespace {

template <class T>
void linear24_rows(const Linear24Args& a, ParallelFor parallel_for) {
  const auto body = [](int64_t begin, int64_t end, void* context) {
    const Linear24Args& a = *static_cast<const Linear24Args*>(context);
    const int64_t stored = 2 * (a.cols / 4) + a.cols % 4, bytes = (a.cols + 7) / 8;
    for (int64_t row = begin; row < end; ++row)
      for (int64_t token = 0; token < a.tokens; ++token) {
        const T* values = static_cast<const T*>(a.values) + row * stored;
        const uint8_t* bitmask = a.bitmask + row * bytes;
        const T* x = static_cast<const T*>(a.x) + token * a.cols;
        float sum = a.bias ? to_float(static_cast<const T*>(a.bias)[row]) : 0.0f;
        int64_t next = 0;
        for (int64_t col = 0; col < a.cols; ++col)
          if (bitmask[col / 8] >> col % 8 & 1 && next < stored) sum += to_float(values[next++]) * to_float(x[col]);
        static_cast<T*>(a.y)[token * a.rows + row] = from_float<T>(sum);
      }
  };
  parallel_for(a.rows, 16, body, const_cast<Linear24Args*>(&a));
}

}  // namespace
}  // namespace sparsekit::SPARSEKIT_LEVEL
