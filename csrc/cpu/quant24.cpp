// The quantized 2:4 format and its tiles: quantize24, tile24.
#include <tuple>

#include "quant24_shapes.h"

namespace sparsekit {
namespace {

std::tuple<Tensor, Tensor> quantize24(Tensor values, int64_t cols, std::string quant_type, int64_t group) {
  const FloatMode exact(FloatMode::kExact);
  const QuantType type = quant_type_of(quant_type);
  const int64_t rows = values.size(0);
  Tensor codes = empty(values, shape_of_codes(rows, cols, type), dtype_of_codes(type));
  Tensor scales = empty(values, shape_of_scales(rows, cols, group), ScalarType::BFloat16);
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
  const int64_t rows = values.size(0);
  Tensor tiles = empty(values, shape_of_tiles(rows, cols, type, group), ScalarType::Byte);
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
                        .tiles_of_row = tiles.size(1),
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
