// The linear layers on a quantized 2:4 weight: linear24q, linear24q_int8.
#include "quant24_shapes.h"

namespace sparsekit {
namespace {

Tensor linear24q(Tensor x, Tensor values, Tensor scales, Tensor bitmask, std::optional<Tensor> bias,
                 std::string quant_type, int64_t group) {
  const QuantType type = quant_type_of(quant_type);
  std::vector<int64_t> shape = shape_of(x);
  STD_TORCH_CHECK(!shape.empty() && values.dim() == 2 && group > 0 && group % 8 == 0,
                  "linear24q: x must have a dimension, values two, and group must be a multiple of 8");
  const int64_t cols = shape.back(), rows = values.size(0);
  STD_TORCH_CHECK(x.is_cpu() &&
                      is_like(values, dtype_of_codes(type), shape_of_codes(rows, cols, type)) &&
                      is_like(scales, ScalarType::BFloat16, shape_of_scales(rows, cols, group)) &&
                      is_like(bitmask, ScalarType::Byte, {rows, bytes_per_row(cols)}) &&
                      (!bias || is_like(*bias, x.scalar_type(), {rows})),
                  "linear24q: values, scales, bitmask and bias must fit x");
  shape.back() = rows;
  Tensor y = empty(x, shape, x.scalar_type());
  if (y.numel() == 0) return y;
  x = in_order(x);
  values = in_order(values);
  scales = in_order(scales);
  bitmask = in_order(bitmask);
  const Linear24qArgs args{.x = x.const_data_ptr(),
                           .values = static_cast<const uint8_t*>(values.const_data_ptr()),
                           .scales = static_cast<const uint16_t*>(scales.const_data_ptr()),
                           .bitmask = static_cast<const uint8_t*>(bitmask.const_data_ptr()),
                           .bias = contiguous_data<void>(bias),
                           .y = y.mutable_data_ptr(),
                           .tokens = y.numel() / rows,
                           .rows = rows,
                           .cols = cols,
                           .group = group,
                           .type = type,
                           .dtype = dtype_of(x)};
  kernels().linear24q(args, parallel_ranges);
  return y;
}

Tensor linear24q_int8(Tensor x, Tensor tiles, std::optional<Tensor> bias, int64_t rows, std::string quant_type,
                      int64_t group) {
  const FloatMode exact(FloatMode::kExact);
  const QuantType type = quant_type_of(quant_type);
  std::vector<int64_t> shape = shape_of(x);
  STD_TORCH_CHECK(!shape.empty() && rows >= 0 && group > 0 && group % 8 == 0,
                  "linear24q_int8: x must have a dimension, and group must be a multiple of 8");
  const int64_t cols = shape.back();
  STD_TORCH_CHECK(x.is_cpu() && is_like(tiles, ScalarType::Byte, shape_of_tiles(rows, cols, type, group)) &&
                      (!bias || is_like(*bias, x.scalar_type(), {rows})),
                  "linear24q_int8: tiles and bias must fit x");
  shape.back() = rows;
  Tensor y = empty(x, shape, x.scalar_type());
  if (y.numel() == 0) return y;
  x = in_order(x);
  tiles = in_order(tiles);
  const Linear24qInt8Args args{.x = x.const_data_ptr(),
                               .tiles = static_cast<const uint8_t*>(tiles.const_data_ptr()),
                               .bias = contiguous_data<void>(bias),
                               .y = y.mutable_data_ptr(),
                               .tokens = y.numel() / rows,
                               .rows = rows,
                               .cols = cols,
                               .group = group,
                               .type = type,
                               .dtype = dtype_of(x)};
  kernels().linear24q_int8(args, parallel_ranges);
  return y;
}

}  // namespace
}  // namespace sparsekit

STABLE_TORCH_LIBRARY_IMPL(sparsekit, CPU, m) {
  m.impl("linear24q", TORCH_BOX(&sparsekit::linear24q));
  m.impl("linear24q_int8", TORCH_BOX(&sparsekit::linear24q_int8));
}
