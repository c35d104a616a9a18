// The rounding of inputs for the dense int8 product, which is PyTorch's: round_tokens.
#include <tuple>

#include "tensor_args.h"

namespace sparsekit {
namespace {

std::tuple<Tensor, Tensor> round_tokens(Tensor x, int64_t limit) {
  const FloatMode exact(FloatMode::kExact);
  x = torch::stable::contiguous(x);
  const int64_t tokens = x.size(0), cols = x.size(1);
  Tensor codes = empty(x, {tokens, cols}, ScalarType::Byte);
  Tensor steps = empty(x, {tokens, 1}, ScalarType::Float);
  const RoundTokensArgs args{.x = x.const_data_ptr(),
                             .codes = static_cast<uint8_t*>(codes.mutable_data_ptr()),
                             .steps = static_cast<float*>(steps.mutable_data_ptr()),
                             .cols = cols,
                             .limit = limit,
                             .dtype = dtype_of(x)};
  const Kernels& table = kernels();
  parallel_for(tokens, row_grain(cols), [&](int64_t begin, int64_t end) { table.round_tokens(args, begin, end); });
  return {codes, steps};
}

}  // namespace
}  // namespace sparsekit

STABLE_TORCH_LIBRARY_IMPL(sparsekit, CPU, m) { m.impl("round_tokens", TORCH_BOX(&sparsekit::round_tokens)); }
