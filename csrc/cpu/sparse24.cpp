// The packed 2:4 format and its linear layer: pack24, prune_pack24, unpack24, linear24.
#include <atomic>
#include <stdexcept>
#include <string>
#include <tuple>

#include "tensor_args.h"

namespace sparsekit {
namespace {

bool is_zero(const void* weight, int64_t index, DType dtype) {
  if (dtype == DType::F32) return static_cast<const float*>(weight)[index] == 0;
  return (static_cast<const uint16_t*>(weight)[index] & 0x7fff) == 0;
}

std::string broken_group(const Pack24Args& args, int64_t bad) {
  const int64_t row = bad / (args.cols / 4), column = bad % (args.cols / 4) * 4;
  int count = 0;
  for (int64_t i = column; i < column + 4; ++i)
    count += args.mask ? reinterpret_cast<const uint8_t*>(args.mask)[row * args.cols + i] != 0
                       : !is_zero(args.weight, row * args.weight_stride + i, args.dtype);
  return "pack24: row " + std::to_string(row) + ", columns " + std::to_string(column) + " to " +
         std::to_string(column + 3) + " have " + std::to_string(count) +
         (args.mask ? " set mask entries; 2:4 needs exactly 2" : " non-zeros; 2:4 needs at most 2");
}

std::tuple<Tensor, Tensor> pack24(Tensor weight, std::optional<Tensor> mask, bool check) {
  const FloatMode exact(FloatMode::kExact);
  const int64_t cols = weight.size(1);
  Tensor values = empty(weight, {weight.size(0), values_per_row(cols)}, weight.scalar_type());
  Tensor bitmask = empty(weight, {weight.size(0), bytes_per_row(cols)}, ScalarType::Byte);
  if (weight.numel() == 0) return {values, bitmask};
  const Rows rows = rows_of(weight);
  const Pack24Args args{.weight = weight.const_data_ptr(),
                        .weight_stride = rows.stride,
                        .mask = contiguous_data<bool>(mask),
                        .values = values.mutable_data_ptr(),
                        .bitmask = static_cast<uint8_t*>(bitmask.mutable_data_ptr()),
                        .cols = cols,
                        .dtype = dtype_of(weight),
                        .stream = exceeds_caches(values.numel() * values.element_size())};
  const Kernels& table = kernels();
  std::atomic<int64_t> first_bad = INT64_MAX;
  parallel_for(rows.rows, row_grain(cols), [&](int64_t begin, int64_t end) {
    const int64_t bad = table.pack24(args, begin, end);
    int64_t seen = first_bad.load();
    while (bad >= 0 && bad < seen && !first_bad.compare_exchange_weak(seen, bad)) {
    }
  });
  if (check && first_bad.load() != INT64_MAX) throw std::invalid_argument(broken_group(args, first_bad.load()));
  return {values, bitmask};
}

std::tuple<Tensor, Tensor> prune_pack24(Tensor weight, std::optional<Tensor> scale) {
  const FloatMode exact(FloatMode::kExact);
  const int64_t cols = weight.size(1);
  Tensor values = empty(weight, {weight.size(0), values_per_row(cols)}, weight.scalar_type());
  Tensor bitmask = empty(weight, {weight.size(0), bytes_per_row(cols)}, ScalarType::Byte);
  const Rows rows = rows_of(weight);
  const PrunePack24Args args{.weight = weight.const_data_ptr(),
                             .weight_stride = rows.stride,
                             .scale = contiguous_data<float>(scale),
                             .values = values.mutable_data_ptr(),
                             .bitmask = static_cast<uint8_t*>(bitmask.mutable_data_ptr()),
                             .cols = cols,
                             .dtype = dtype_of(weight),
                             .stream = exceeds_caches(values.numel() * values.element_size())};
  const Kernels& table = kernels();
  parallel_for(rows.rows, row_grain(cols),
               [&](int64_t begin, int64_t end) { table.prune_pack24(args, begin, end); });
  return {values, bitmask};
}

Tensor unpack24(Tensor values, Tensor bitmask, int64_t cols) {
  Tensor weight = empty(values, {values.size(0), cols}, values.scalar_type());
  if (weight.numel() == 0) return weight;
  values = in_order(values);
  bitmask = in_order(bitmask);
  const Unpack24Args args{.values = values.const_data_ptr(),
                          .bitmask = static_cast<const uint8_t*>(bitmask.const_data_ptr()),
                          .weight = weight.mutable_data_ptr(),
                          .cols = cols,
                          .dtype = dtype_of(values),
                          .stream = exceeds_caches(weight.numel() * weight.element_size())};
  const Kernels& table = kernels();
  parallel_for(values.size(0), row_grain(cols),
               [&](int64_t begin, int64_t end) { table.unpack24(args, begin, end); });
  return weight;
}

Tensor linear24(Tensor x, Tensor values, Tensor bitmask, std::optional<Tensor> bias) {
  std::vector<int64_t> shape = shape_of(x);
  STD_TORCH_CHECK(!shape.empty() && values.dim() == 2, "linear24: x must have a dimension, and values two");
  const int64_t cols = shape.back(), rows = values.size(0);
  STD_TORCH_CHECK(x.is_cpu() && is_like(values, x.scalar_type(), {rows, values_per_row(cols)}) &&
                      is_like(bitmask, ScalarType::Byte, {rows, bytes_per_row(cols)}) &&
                      (!bias || is_like(*bias, x.scalar_type(), {rows})),
                  "linear24: values, bitmask and bias must fit x");
  shape.back() = rows;
  Tensor y = empty(x, shape, x.scalar_type());
  if (y.numel() == 0) return y;
  x = in_order(x);
  values = in_order(values);
  bitmask = in_order(bitmask);
  const Linear24Args args{.x = x.const_data_ptr(),
                          .values = values.const_data_ptr(),
                          .bitmask = static_cast<const uint8_t*>(bitmask.const_data_ptr()),
                          .bias = contiguous_data<void>(bias),
                          .y = y.mutable_data_ptr(),
                          .tokens = y.numel() / rows,
                          .rows = rows,
                          .cols = cols,
                          .threads = static_cast<int>(torch::stable::get_num_threads()),
                          .dtype = dtype_of(x)};
  kernels().linear24(args, parallel_ranges);
  return y;
}

}  // namespace
}  // namespace sparsekit

STABLE_TORCH_LIBRARY_IMPL(sparsekit, CPU, m) {
  m.impl("pack24", TORCH_BOX(&sparsekit::pack24));
  m.impl("prune_pack24", TORCH_BOX(&sparsekit::prune_pack24));
  m.impl("unpack24", TORCH_BOX(&sparsekit::unpack24));
  m.impl("linear24", TORCH_BOX(&sparsekit::linear24));
}
