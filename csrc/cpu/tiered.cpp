// The linear layer on the tiered format: linear_tiered.
#include "glue.h"

namespace sparsekit {
namespace {

void parallel_for(int64_t count, int64_t grain, RangeBody body, void* context) {
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) { body(begin, end, context); });
}

const void* data(Tensor& tensor) {
  tensor = torch::stable::contiguous(tensor);
  return tensor.const_data_ptr();
}

Tensor linear_tiered(Tensor x, Tensor tiers, Tensor dense, Tensor values, Tensor bitmask, Tensor topk, Tensor positions,
                     Tensor starts, std::optional<Tensor> bias, int64_t out_features) {
  std::vector<int64_t> shape = shape_of(x);
  const int64_t cols = shape.back();
  shape.back() = out_features;
  Tensor y = empty(x, shape, x.scalar_type());
  if (y.numel() == 0) return y;
  const LinearTieredArgs args{.x = data(x),
                              .tiers = static_cast<const uint8_t*>(data(tiers)),
                              .dense = data(dense),
                              .values = data(values),
                              .bitmask = static_cast<const uint8_t*>(data(bitmask)),
                              .topk = data(topk),
                              .positions = data(positions),
                              .starts = static_cast<const int32_t*>(data(starts)),
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
  kernels().linear_tiered(args, parallel_for);
  return y;
}

}  // namespace
}  // namespace sparsekit

STABLE_TORCH_LIBRARY_IMPL(sparsekit, CPU, m) {
  m.impl("linear_tiered", TORCH_BOX(&sparsekit::linear_tiered));
}
