// The linear layer on the tiered format: linear_tiered.
#include <array>
#include <stdexcept>

#include "tensor_args.h"

namespace sparsekit {
namespace {

const void* data(Tensor& tensor) {
  tensor = in_order(tensor);
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

// Whether the tensors of a weight and its bias belong together and fit x.
bool fit(const Tensor& x, const Tensor& tiers, const Tensor& dense, const Tensor& values, const Tensor& bitmask,
         const Tensor& topk, const Tensor& positions, const Tensor& starts, const std::optional<Tensor>& bias,
         int64_t rows) {
  if (!x.is_cpu() || x.dim() == 0 || dense.dim() != 3 || values.dim() != 3 || topk.dim() != 2)
    return false;
  const ScalarType dtype = x.scalar_type();
  const int64_t block_rows = dense.size(1), block_cols = dense.size(2), stored = values.size(0);
  if (block_rows < 1 || block_cols < 1) return false;
  const int64_t down = (rows + block_rows - 1) / block_rows;
  const int64_t across = (x.size(x.dim() - 1) + block_cols - 1) / block_cols;
  return is_like(tiers, ScalarType::Byte, {down, across}) &&
         is_like(dense, dtype, {dense.size(0), block_rows, block_cols}) &&
         is_like(values, dtype, {stored, block_rows, block_cols / 2}) &&
         is_like(bitmask, ScalarType::Byte, {stored, block_rows, block_cols / 8}) &&
         is_like(topk, dtype, shape_of(topk)) &&
         is_like(positions, block_rows * block_cols <= 256 ? ScalarType::Byte : ScalarType::Short, shape_of(topk)) &&
         is_like(starts, ScalarType::Int, {down + 1, 3}) && (!bias || is_like(*bias, dtype, {rows}));
}

Tensor linear_tiered(Tensor x, Tensor tiers, Tensor dense, Tensor values, Tensor bitmask, Tensor topk, Tensor positions,
                     Tensor starts, std::optional<Tensor> bias, int64_t out_features) {
  STD_TORCH_CHECK(fit(x, tiers, dense, values, bitmask, topk, positions, starts, bias, out_features),
                  "linear_tiered: the tensors of the weight and the bias must fit x");
  std::vector<int64_t> shape = shape_of(x);
  const int64_t cols = shape.back();
  shape.back() = out_features;
  Tensor y = empty(x, shape, x.scalar_type());
  if (y.numel() == 0) return y;
  starts = in_order(starts);
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
