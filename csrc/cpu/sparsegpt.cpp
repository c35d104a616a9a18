// sparsegpt_columns: SparseGPT on consecutive columns.
#include "tensor_args.h"

namespace sparsekit {
namespace {

std::tuple<Tensor, Tensor, Tensor> sparsegpt_columns(Tensor weight, Tensor factor, std::optional<Tensor> given, int64_t n,
                                                   int64_t m) {
  const FloatMode exact(FloatMode::kExact);
  weight = in_order(weight);
  factor = in_order(factor);
  const std::vector<int64_t> shape = shape_of(weight);
  Tensor pruned = empty(weight, shape, ScalarType::Float), error = empty(weight, shape, ScalarType::Float);
  Tensor mask = empty(weight, shape, ScalarType::Bool);
  const SparsegptArgs args{.weight = static_cast<const float*>(weight.const_data_ptr()),
                           .factor = static_cast<const float*>(factor.const_data_ptr()),
                           .given = contiguous_data<bool>(given),
                           .pruned = static_cast<float*>(pruned.mutable_data_ptr()),
                           .error = static_cast<float*>(error.mutable_data_ptr()),
                           .mask = static_cast<bool*>(mask.mutable_data_ptr()),
                           .cols = shape[1],
                           .n = static_cast<int>(n),
                           .m = static_cast<int>(m)};
  const Kernels& table = kernels();
  parallel_for(shape[0], row_grain(shape[1] * shape[1] / 4),
               [&](int64_t begin, int64_t end) { table.sparsegpt(args, begin, end); });
  return {pruned, error, mask};
}

}  // namespace
}  // namespace sparsekit

STABLE_TORCH_LIBRARY_IMPL(sparsekit, CPU, m) {
  m.impl("sparsegpt_columns", TORCH_BOX(&sparsekit::sparsegpt_columns));
}
