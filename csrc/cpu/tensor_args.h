// Turns tensors into the arguments of kernels. Shapes and dtypes are checked in Python, before the dispatcher; those of
// the products that layers call also here.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "float_mode.h"
#include "kernels.h"

namespace sparsekit {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline DType dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Half:
      return DType::F16;
    case ScalarType::BFloat16:
      return DType::BF16;
    case ScalarType::Float:
      return DType::F32;
    default:
      STD_TORCH_CHECK(false, "sparsekit's kernels take float32, float16 and bfloat16");
  }
}

inline QuantType quant_type_of(const std::string& name) {
  STD_TORCH_CHECK(name == "int8" || name == "int4" || name == "nf4", "quant_type must be int8, int4 or nf4, got ", name);
  return name == "int8" ? QuantType::Int8 : name == "int4" ? QuantType::Int4 : QuantType::Nf4;
}

inline std::vector<int64_t> shape_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return {sizes.begin(), sizes.end()};
}

// A new contiguous tensor on the device of `like`. torch::stable::new_empty does the same and looks its op up by name.
inline Tensor empty(const Tensor& like, const std::vector<int64_t>& shape, ScalarType dtype) {
  std::vector<int64_t> strides(shape.size());
  int64_t stride = 1;
  for (size_t dim = shape.size(); dim-- > 0; stride *= std::max<int64_t>(1, shape[dim])) strides[dim] = stride;
  int32_t device_type;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  const auto code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle tensor;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.data(),
                                                         strides.data(), code, device_type, like.get_device_index(),
                                                         &tensor));
  return Tensor(tensor);
}

// The tensor itself if it is contiguous, else a copy that is. torch::stable::contiguous looks its op up by name.
inline Tensor in_order(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// Whether a tensor is on the CPU and has this dtype and shape. Layers call the products of their weights without any
// check in Python, which would take longer than a small product, so these kernels check what they read.
inline bool is_like(const Tensor& tensor, ScalarType dtype, const std::vector<int64_t>& shape) {
  const auto sizes = tensor.sizes();
  return tensor.scalar_type() == dtype && tensor.is_cpu() && sizes.size() == shape.size() &&
         std::equal(shape.begin(), shape.end(), sizes.begin());
}

// How many values and mask bytes a row of a packed 2:4 weight has; a tail of cols % 4 columns is stored whole.
inline int64_t values_per_row(int64_t cols) { return 2 * (cols / 4) + cols % 4; }
inline int64_t bytes_per_row(int64_t cols) { return (cols + 7) / 8; }

// A tensor of one or more dimensions as rows that are `stride` elements apart, each contiguous.
struct Rows {
  int64_t rows, cols, stride;
};

// The tensor's memory as rows if its strides allow that; the tensor may have any number of dimensions.
inline std::optional<Rows> rows_in_place(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1, cols = tensor.size(last);
  if (tensor.numel() == 0) return Rows{0, cols, cols};  // its strides may be anything; it has no rows here, even of a shape [3, 0]
  if (cols > 1 && tensor.stride(last) != 1) return std::nullopt;
  int64_t rows = 1, stride = cols;
  for (int64_t dim = last - 1; dim >= 0; --dim) {
    if (tensor.size(dim) == 1) continue;
    if (rows == 1)
      stride = tensor.stride(dim);
    else if (tensor.stride(dim) != rows * stride)
      return std::nullopt;
    rows *= tensor.size(dim);
  }
  return Rows{rows, cols, stride};
}

// The tensor's memory as rows; if its strides do not allow that, `tensor` is replaced by a contiguous copy.
inline Rows rows_of(Tensor& tensor) {
  if (const auto rows = rows_in_place(tensor)) return *rows;
  tensor = torch::stable::contiguous(tensor);
  return *rows_in_place(tensor);
}

// The data of an optional tensor made contiguous, or null.
template <class T>
const T* contiguous_data(std::optional<Tensor>& tensor) {
  if (!tensor) return nullptr;
  tensor = in_order(*tensor);
  return static_cast<const T*>(tensor->const_data_ptr());
}

// The shape of a convolution of images x.
inline ConvShape conv_shape(const Tensor& x, int64_t outputs, const std::vector<int64_t>& kernel,
                            const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                            const std::vector<int64_t>& dilation) {
  for (const auto* each : {&kernel, &stride, &padding, &dilation})
    STD_TORCH_CHECK(each->size() == 2, "convolution: kernel, stride, padding and dilation must have two sizes each");
  STD_TORCH_CHECK(stride[0] > 0 && stride[1] > 0, "convolution: stride must be positive");
  const auto out_size = [&](int i) {
    return (x.size(2 + i) + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) / stride[i] + 1;
  };
  return {.images = x.size(0),
          .inputs = x.size(1),
          .height = x.size(2),
          .width = x.size(3),
          .outputs = outputs,
          .out_height = out_size(0),
          .out_width = out_size(1),
          .kernel_height = kernel[0],
          .kernel_width = kernel[1],
          .stride_y = stride[0],
          .stride_x = stride[1],
          .padding_y = padding[0],
          .padding_x = padding[1],
          .dilation_y = dilation[0],
          .dilation_x = dilation[1]};
}

// Whether an output is so large that it should be written past the caches.
inline bool exceeds_caches(int64_t bytes) { return bytes > 8 << 20; }

// Runs torch's parallel_for, every thread of it in the floating-point mode of the caller.
template <class Body>
void parallel_for(int64_t count, int64_t grain, const Body& body) {
  const uint64_t mode = FloatMode::current();
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    const FloatMode of_caller(mode);
    body(begin, end);
  });
}

// parallel_for with the signature of ParallelFor, for kernels that divide their work themselves.
inline void parallel_ranges(int64_t count, int64_t grain, RangeBody body, void* context) {
  parallel_for(count, grain, [&](int64_t begin, int64_t end) { body(begin, end, context); });
}

// The fewest rows that are worth a thread: 32768 elements, as in torch.
inline int64_t row_grain(int64_t cols) { return std::max<int64_t>(1, 32768 / std::max<int64_t>(1, cols)); }

}  // namespace sparsekit
