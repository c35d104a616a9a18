// The convolution on a packed 2:4 weight: conv2d24.
#include "tensor_args.h"

namespace sparsekit {
namespace {

Tensor conv2d24(Tensor x, Tensor values, Tensor bitmask, std::optional<Tensor> bias, std::vector<int64_t> kernel,
                std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation) {
  const ConvShape shape = conv_shape(x, values.size(0), kernel, stride, padding, dilation);
  Tensor y = empty(x, {shape.images, shape.outputs, shape.out_height, shape.out_width}, x.scalar_type());
  if (y.numel() == 0) return y;
  x = torch::stable::contiguous(x);
  values = torch::stable::contiguous(values);
  bitmask = torch::stable::contiguous(bitmask);
  const Conv24Args args{.x = x.const_data_ptr(),
                        .values = values.const_data_ptr(),
                        .bitmask = static_cast<const uint8_t*>(bitmask.const_data_ptr()),
                        .bias = contiguous_data<void>(bias),
                        .y = y.mutable_data_ptr(),
                        .shape = shape,
                        .threads = static_cast<int>(torch::stable::get_num_threads()),
                        .dtype = dtype_of(x)};
  kernels().conv2d24(args, parallel_ranges);
  return y;
}

}  // namespace
}  // namespace sparsekit

STABLE_TORCH_LIBRARY_IMPL(sparsekit, CPU, m) { m.impl("conv2d24", TORCH_BOX(&sparsekit::conv2d24)); }
