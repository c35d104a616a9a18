// The shapes of a quantized 2:4 weight, as in ops/quant24.py, and of its tiles, as in ops/tiled24.py.
#pragma once

#include "tensor_args.h"

namespace sparsekit {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline ScalarType dtype_of_codes(QuantType type) { return type == QuantType::Int8 ? ScalarType::Char : ScalarType::Byte; }

inline std::vector<int64_t> shape_of_codes(int64_t rows, int64_t cols, QuantType type) {
  const int64_t kept = values_per_row(cols);
  return {rows, type == QuantType::Int8 ? kept : ceil_div(kept, 2)};
}

inline std::vector<int64_t> shape_of_scales(int64_t rows, int64_t cols, int64_t group) {
  return {rows, ceil_div(cols, group)};
}

// A group of columns begins a tile of its own; a tile has 32 kept values of a row.
inline std::vector<int64_t> shape_of_tiles(int64_t rows, int64_t cols, QuantType type, int64_t group) {
  const int64_t others = std::max<int64_t>(ceil_div(cols, group) - 1, 0);
  const int64_t tiles = others * ceil_div(group, 64) + ceil_div(values_per_row(cols) - others * group / 2, 32);
  return {ceil_div(rows, 8), tiles, type == QuantType::Int8 ? 336 : 208};
}

}  // namespace sparsekit
