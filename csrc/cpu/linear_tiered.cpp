// The linear layer on the tiered format: linear_tiered.
#include <array>
#include <stdexcept>

#include "tensor_args.h"

namespace sparsekit {
namespace {

const void* data(Tensor& tensor) {
  tensor = torch::stable::contiguous(tensor);
  return tensor.const_data_ptr();
}

// Whether `starts` rises from 0 to the number of stored blocks of each form. Kernels index by it, so it must.
bool counts_blocks(const int32_t* starts, int64_t rows, const std::array<int64_t, 3>& stored) {
  bool right = true;
  for (int form = 0; form < 3; ++form) {
    right &= starts[form] == 0 && starts[3 * rows + form] == stored[form];
    for (int64_t row = 0; row < rows; ++row) right &= starts[3 * row + form] <= starts[3 * (row + 1) + form];
  }
  return right;
}

Tensor linear_tiered(Tensor x, Tensor tiers, Tensor dense, Tensor values, Tensor bitmask, Tensor topk, Tensor positions,
                     Tensor starts, std::optional<Tensor> bias, int64_t out_features) {
  std::vector<int64_t> shape = shape_of(x);
  const int64_t cols = shape.back();
  shape.back() = out_features;
  Tensor y = empty(x, shape, x.scalar_type());
  if (y.numel() == 0) return y;
  starts = torch::stable::contiguous(starts);
  const auto* counts = static_cast<const int32_t*>(starts.const_data_ptr());
  if (!counts_blocks(counts, tiers.size(0), {dense.size(0), values.size(0), topk.size(0)}))
    throw std::invalid_argument("linear_tiered: starts must count the stored blocks, from 0, row by row of blocks");
  const LinearTieredArgs args{.x = data(x),
                              .tiers = static_cast<const uint8_t*>(data(tiers)),
                              .dense = data(dense),
                              .values = data(values),
                              .bitmask = static_cast<const uint8_t*>(data(bitmask)),
                              .topk = data(topk),
                              .positions = data(positions),
                              .starts = counts,
                              .bias = contiguous_data<void>(bias),
                              .y = y.mutable_data_ptr(),
                              .tokens = y.numel() / out_features,
                              .rows = out_features,
                              .cols = cols,
                              .block_rows = dense.size(1),
                              .block_cols = dense.size(2),
                              .k = topk.size(1),
                              .threads = static_cast<int>(torch::stable::get_num_threads()),
                              .dtype = dtype_of(x)};
  kernels().linear_tiered(args, parallel_ranges);
  return y;
}

}  // namespace
}  // namespace sparsekit

STABLE_TORCH_LIBRARY_IMPL(sparsekit, CPU, m) {
  m.impl("linear_tiered", TORCH_BOX(&sparsekit::linear_tiered));
}
