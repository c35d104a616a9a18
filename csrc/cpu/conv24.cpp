// The convolution on a packed 2:4 weight: conv2d24.
#include "tensor_args.h"

namespace sparsekit {
namespace {

Tensor conv2d24(Tensor x, Tensor values, Tensor bitmask, std::optional<Tensor> bias, std::vector<int64_t> kernel,
                std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation) {
  const auto out_size = [&](int i) {
    return (x.size(2 + i) + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) / stride[i] + 1;
  };
  Tensor y = empty(x, {x.size(0), values.size(0), out_size(0), out_size(1)}, x.scalar_type());
  if (y.numel() == 0) return y;
  x = torch::stable::contiguous(x);
  values = torch::stable::contiguous(values);
  bitmask = torch::stable::contiguous(bitmask);
  const Conv24Args args{.x = x.const_data_ptr(),
                        .values = values.const_data_ptr(),
                        .bitmask = static_cast<const uint8_t*>(bitmask.const_data_ptr()),
                        .bias = contiguous_data<void>(bias),
                        .y = y.mutable_data_ptr(),
                        .images = x.size(0),
                        .inputs = x.size(1),
                        .height = x.size(2),
                        .width = x.size(3),
                        .outputs = y.size(1),
                        .out_height = y.size(2),
                        .out_width = y.size(3),
                        .kernel_height = kernel[0],
                        .kernel_width = kernel[1],
                        .stride_y = stride[0],
                        .stride_x = stride[1],
                        .padding_y = padding[0],
                        .padding_x = padding[1],
                        .dilation_y = dilation[0],
                        .dilation_x = dilation[1],
                        .threads = static_cast<int>(torch::stable::get_num_threads()),
                        .dtype = dtype_of(x)};
  kernels().conv2d24(args, parallel_ranges);
  return y;
}

}  // namespace
}  // namespace sparsekit

STABLE_TORCH_LIBRARY_IMPL(sparsekit, CPU, m) { m.impl("conv2d24", TORCH_BOX(&sparsekit::conv2d24)); }
