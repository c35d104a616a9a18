// The quantized 2:4 format and its tiles: quantize24, tile24.
#include <tuple>

#include "tensor_args.h"

namespace sparsekit {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t values_per_row(int64_t cols) { return 2 * (cols / 4) + cols % 4; }

std::tuple<Tensor, Tensor> quantize24(Tensor values, int64_t cols, std::string quant_type, int64_t group) {
  const FloatMode exact(FloatMode::kExact);
  const QuantType type = quant_type_of(quant_type);
  const int64_t rows = values.size(0), kept = values_per_row(cols);
  const bool bytes = type == QuantType::Int8;
  Tensor codes = empty(values, {rows, bytes ? kept : ceil_div(kept, 2)}, bytes ? ScalarType::Char : ScalarType::Byte);
  Tensor scales = empty(values, {rows, ceil_div(cols, group)}, ScalarType::BFloat16);
  values = in_order(values);
  const Quantize24Args args{.values = values.const_data_ptr(),
                            .codes = static_cast<uint8_t*>(codes.mutable_data_ptr()),
                            .scales = static_cast<uint16_t*>(scales.mutable_data_ptr()),
                            .cols = cols,
                            .group = group,
                            .type = type,
                            .dtype = dtype_of(values)};
  const Kernels& table = kernels();
  parallel_for(rows, row_grain(cols), [&](int64_t begin, int64_t end) { table.quantize24(args, begin, end); });
  return {codes, scales};
}

Tensor tile24(Tensor values, Tensor scales, Tensor bitmask, int64_t cols, std::string quant_type, int64_t group) {
  const QuantType type = quant_type_of(quant_type);
  const int64_t rows = values.size(0), others = std::max<int64_t>(ceil_div(cols, group) - 1, 0);
  const int64_t tiles_of_row =
      others * ceil_div(group, 64) + ceil_div(values_per_row(cols) - others * group / 2, 32);
  Tensor tiles = empty(values, {ceil_div(rows, 8), tiles_of_row, type == QuantType::Int8 ? 336 : 208}, ScalarType::Byte);
  values = in_order(values);
  scales = in_order(scales);
  bitmask = in_order(bitmask);
  const Tile24Args args{.codes = static_cast<const uint8_t*>(values.const_data_ptr()),
                        .scales = static_cast<const uint16_t*>(scales.const_data_ptr()),
                        .bitmask = static_cast<const uint8_t*>(bitmask.const_data_ptr()),
                        .tiles = static_cast<uint8_t*>(tiles.mutable_data_ptr()),
                        .rows = rows,
                        .cols = cols,
                        .group = group,
                        .tiles_of_row = tiles_of_row,
                        .type = type};
  const Kernels& table = kernels();
  parallel_for(ceil_div(rows, 8), row_grain(8 * cols),
               [&](int64_t begin, int64_t end) { table.tile24(args, begin, end); });
  return tiles;
}

}  // namespace
}  // namespace sparsekit

STABLE_TORCH_LIBRARY_IMPL(sparsekit, CPU, m) {
  m.impl("quantize24", TORCH_BOX(&sparsekit::quantize24));
  m.impl("tile24", TORCH_BOX(&sparsekit::tile24));
}
