// The linear layers on a quantized 2:4 weight: linear24q, linear24q_int8.
#include "tensor_args.h"

namespace sparsekit {
namespace {

// A new tensor for the result: x with `rows` in place of its columns.
Tensor result_of(const Tensor& x, int64_t rows) {
  std::vector<int64_t> shape = shape_of(x);
  shape.back() = rows;
  return empty(x, shape, x.scalar_type());
}

Tensor linear24q(Tensor x, Tensor values, Tensor scales, Tensor bitmask, std::optional<Tensor> bias,
                 std::string quant_type, int64_t group) {
  const int64_t rows = values.size(0);
  Tensor y = result_of(x, rows);
  if (y.numel() == 0) return y;
  x = torch::stable::contiguous(x);
  values = torch::stable::contiguous(values);
  scales = torch::stable::contiguous(scales);
  bitmask = torch::stable::contiguous(bitmask);
  const Linear24qArgs args{.x = x.const_data_ptr(),
                           .values = static_cast<const uint8_t*>(values.const_data_ptr()),
                           .scales = static_cast<const uint16_t*>(scales.const_data_ptr()),
                           .bitmask = static_cast<const uint8_t*>(bitmask.const_data_ptr()),
                           .bias = contiguous_data<void>(bias),
                           .y = y.mutable_data_ptr(),
                           .tokens = y.numel() / rows,
                           .rows = rows,
                           .cols = x.size(x.dim() - 1),
                           .group = group,
                           .type = quant_type_of(quant_type),
                           .dtype = dtype_of(x)};
  kernels().linear24q(args, parallel_ranges);
  return y;
}

Tensor linear24q_int8(Tensor x, Tensor tiles, std::optional<Tensor> bias, int64_t rows, std::string quant_type,
                      int64_t group) {
  const FloatMode exact(FloatMode::kExact);
  Tensor y = result_of(x, rows);
  if (y.numel() == 0) return y;
  x = torch::stable::contiguous(x);
  tiles = torch::stable::contiguous(tiles);
  const Linear24qInt8Args args{.x = x.const_data_ptr(),
                               .tiles = static_cast<const uint8_t*>(tiles.const_data_ptr()),
                               .bias = contiguous_data<void>(bias),
                               .y = y.mutable_data_ptr(),
                               .tokens = y.numel() / rows,
                               .rows = rows,
                               .cols = x.size(x.dim() - 1),
                               .group = group,
                               .type = quant_type_of(quant_type),
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
