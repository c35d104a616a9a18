// The arranged forms of a 2:4 weight and their products. Python has computed how many bytes each takes.
#include <tuple>

#include "arranged24_kernels.h"
#include "tensor_args.h"

namespace sparsekit {
namespace {

using Arrange = void (*)(const Arrange24Args&, int64_t, int64_t);
using Restore = void (*)(const RestoreArranged24Args&, int64_t, int64_t);

// As RowBlocks divides the rows.
int64_t height_of_blocks(int64_t rows) {
  const int64_t unit = (rows + 511) / 512 * 32;
  return rows == 0 ? 0 : (rows + unit - 1) / unit * 16;
}

int64_t count_of_blocks(int64_t rows) { return rows == 0 ? 0 : (rows - 1) / height_of_blocks(rows) + 1; }

Tensor match_row_pairs24(Tensor bitmask, int64_t cols) {
  const int64_t rows = bitmask.size(0), blocks = count_of_blocks(rows);
  Tensor pairs = empty(bitmask, {blocks, (cols + 47) / 48, height_of_blocks(rows) / 2, 3}, ScalarType::Short);
  bitmask = in_order(bitmask);
  const MatchRowPairs24Args args{.bitmask = static_cast<const uint8_t*>(bitmask.const_data_ptr()),
                                 .pairs = static_cast<int16_t*>(pairs.mutable_data_ptr()),
                                 .rows = rows,
                                 .cols = cols};
  const Arranged24Kernels& table = arranged24_kernels(kernels());
  parallel_for(blocks, 1, [&](int64_t begin, int64_t end) { table.match_row_pairs(args, begin, end); });
  return pairs;
}

void arrange(Tensor values, Tensor bitmask, const int16_t* pairs, int64_t cols, Tensor& data, Arrange kernel) {
  values = in_order(values);
  bitmask = in_order(bitmask);
  const Arrange24Args args{.values = values.const_data_ptr(),
                           .bitmask = static_cast<const uint8_t*>(bitmask.const_data_ptr()),
                           .pairs = pairs,
                           .data = static_cast<uint8_t*>(data.mutable_data_ptr()),
                           .rows = values.size(0),
                           .cols = cols,
                           .dtype = dtype_of(values)};
  parallel_for(count_of_blocks(args.rows), 1, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

Tensor arrange_row_pairs24(Tensor values, Tensor bitmask, Tensor pairs, Tensor starts, int64_t cols, int64_t nbytes) {
  Tensor data = empty(values, {nbytes}, ScalarType::Byte);
  pairs = in_order(pairs);
  starts = in_order(starts);
  std::copy_n(static_cast<const uint8_t*>(starts.const_data_ptr()), starts.numel() * 8,
              static_cast<uint8_t*>(data.mutable_data_ptr()));
  arrange(values, bitmask, static_cast<const int16_t*>(pairs.const_data_ptr()), cols, data,
          arranged24_kernels(kernels()).arrange_row_pairs);
  return data;
}

Tensor arrange_input_pairs24(Tensor values, Tensor bitmask, int64_t cols, int64_t nbytes) {
  Tensor data = empty(values, {nbytes}, ScalarType::Byte);
  arrange(values, bitmask, nullptr, cols, data, arranged24_kernels(kernels()).arrange_input_pairs);
  return data;
}

std::tuple<Tensor, Tensor> restore(Tensor data, int64_t rows, int64_t cols, ScalarType dtype, Restore kernel) {
  Tensor values = empty(data, {rows, 2 * (cols / 4) + cols % 4}, dtype);
  Tensor bitmask = empty(data, {rows, (cols + 7) / 8}, ScalarType::Byte);
  data = in_order(data);
  const RestoreArranged24Args args{.data = static_cast<const uint8_t*>(data.const_data_ptr()),
                                   .values = values.mutable_data_ptr(),
                                   .bitmask = static_cast<uint8_t*>(bitmask.mutable_data_ptr()),
                                   .rows = rows,
                                   .cols = cols,
                                   .dtype = dtype_of(values)};
  parallel_for(count_of_blocks(rows), 1, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  return {values, bitmask};
}

std::tuple<Tensor, Tensor> restore_row_pairs24(Tensor data, int64_t rows, int64_t cols, ScalarType dtype) {
  return restore(data, rows, cols, dtype, arranged24_kernels(kernels()).restore_row_pairs);
}

std::tuple<Tensor, Tensor> restore_input_pairs24(Tensor data, int64_t rows, int64_t cols, ScalarType dtype) {
  return restore(data, rows, cols, dtype, arranged24_kernels(kernels()).restore_input_pairs);
}

// The bytes of input pairs: all blocks but the last have a multiple of four rows.
int64_t bytes_of_input_pairs(int64_t rows, int64_t cols, DType dtype) {
  const int64_t entries = (cols / 4 + (cols % 4 + 1) / 2 + 3) / 4 * 4;
  return (rows + 3) / 4 * 4 * entries * (dtype == DType::F32 ? 10 : 6);
}

// The bytes of row pairs, as they say themselves; -1 if they are too few for that.
int64_t bytes_of_row_pairs(const Tensor& data, int64_t rows) {
  const int64_t last = 8 * count_of_blocks(rows);
  int64_t bytes = -1;
  if (data.numel() >= last + 8)
    std::copy_n(static_cast<const uint8_t*>(data.const_data_ptr()) + last, 8, reinterpret_cast<uint8_t*>(&bytes));
  return bytes;
}

Tensor linear(Tensor x, Tensor data, std::optional<Tensor> bias, int64_t rows, bool row_pairs) {
  std::vector<int64_t> shape = shape_of(x);
  STD_TORCH_CHECK(!shape.empty() && x.is_cpu() && is_like(data, ScalarType::Byte, {data.numel()}) && rows >= 0 &&
                      (!bias || is_like(*bias, x.scalar_type(), {rows})),
                  "linear of an arranged weight: data and bias must fit x");
  data = in_order(data);
  const int64_t bytes =
      row_pairs ? bytes_of_row_pairs(data, rows) : bytes_of_input_pairs(rows, shape.back(), dtype_of(x));
  STD_TORCH_CHECK(data.numel() == bytes, "linear of an arranged weight: data must have as many bytes as x asks for");
  const int64_t cols = shape.back();
  shape.back() = rows;
  Tensor y = empty(x, shape, x.scalar_type());
  if (y.numel() == 0) return y;
  x = in_order(x);
  const LinearArranged24Args args{.x = x.const_data_ptr(),
                                  .data = static_cast<const uint8_t*>(data.const_data_ptr()),
                                  .bias = contiguous_data<void>(bias),
                                  .y = y.mutable_data_ptr(),
                                  .tokens = y.numel() / rows,
                                  .rows = rows,
                                  .cols = cols,
                                  .threads = static_cast<int>(torch::stable::get_num_threads()),
                                  .dtype = dtype_of(x)};
  const Arranged24Kernels& table = arranged24_kernels(kernels());
  (row_pairs ? table.linear_row_pairs : table.linear_input_pairs)(args, parallel_ranges);
  return y;
}

Tensor linear_row_pairs24(Tensor x, Tensor data, std::optional<Tensor> bias, int64_t rows) {
  return linear(x, data, bias, rows, true);
}

Tensor linear_input_pairs24(Tensor x, Tensor data, std::optional<Tensor> bias, int64_t rows) {
  return linear(x, data, bias, rows, false);
}

Tensor arranged_conv2d24(Tensor x, Tensor data, std::optional<Tensor> bias, int64_t outputs, std::vector<int64_t> kernel,
                         std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation) {
  STD_TORCH_CHECK(is_like(x, ScalarType::Float, shape_of(x)) && x.dim() == 4 && outputs >= 0 &&
                      is_like(data, ScalarType::Byte, {data.numel()}) &&
                      (!bias || is_like(*bias, ScalarType::Float, {outputs})),
                  "convolution of an arranged weight: data and bias must fit x");
  const ConvShape shape = conv_shape(x, outputs, kernel, stride, padding, dilation);
  data = in_order(data);
  const auto fits = [&](int i) { return x.size(2 + i) + 2 * padding[i] > dilation[i] * (kernel[i] - 1); };
  STD_TORCH_CHECK(data.numel() == bytes_of_row_pairs(data, outputs) && fits(0) && fits(1),
                  "convolution of an arranged weight: x or data has a size that does not fit");
  Tensor y = empty(x, {shape.images, shape.outputs, shape.out_height, shape.out_width}, ScalarType::Float);
  if (y.numel() == 0) return y;
  x = in_order(x);
  const ArrangedConv24Args args{.x = static_cast<const float*>(x.const_data_ptr()),
                                .data = static_cast<const uint8_t*>(data.const_data_ptr()),
                                .bias = contiguous_data<float>(bias),
                                .y = static_cast<float*>(y.mutable_data_ptr()),
                                .shape = shape,
                                .threads = static_cast<int>(torch::stable::get_num_threads())};
  arranged24_kernels(kernels()).conv2d_row_pairs(args, parallel_ranges);
  return y;
}

}  // namespace
}  // namespace sparsekit

STABLE_TORCH_LIBRARY_IMPL(sparsekit, CPU, m) {
  m.impl("match_row_pairs24", TORCH_BOX(&sparsekit::match_row_pairs24));
  m.impl("arrange_row_pairs24", TORCH_BOX(&sparsekit::arrange_row_pairs24));
  m.impl("arrange_input_pairs24", TORCH_BOX(&sparsekit::arrange_input_pairs24));
  m.impl("restore_row_pairs24", TORCH_BOX(&sparsekit::restore_row_pairs24));
  m.impl("restore_input_pairs24", TORCH_BOX(&sparsekit::restore_input_pairs24));
  m.impl("linear_row_pairs24", TORCH_BOX(&sparsekit::linear_row_pairs24));
  m.impl("linear_input_pairs24", TORCH_BOX(&sparsekit::linear_input_pairs24));
  m.impl("arranged_conv2d24", TORCH_BOX(&sparsekit::arranged_conv2d24));
}
