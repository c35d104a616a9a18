// 2:4 masks in both directions: transposable_mask24.
#include "tensor_args.h"

namespace sparsekit {
namespace {

Tensor transposable_mask24(Tensor score) {
  const FloatMode exact(FloatMode::kExact);
  Tensor mask = empty(score, shape_of(score), ScalarType::Bool);
  if (score.numel() == 0) return mask;
  const Rows rows = rows_of(score);
  const TransposableArgs args{.score = score.const_data_ptr(),
                              .score_stride = rows.stride,
                              .mask = static_cast<bool*>(mask.mutable_data_ptr()),
                              .rows = rows.rows,
                              .cols = rows.cols,
                              .dtype = dtype_of(score),
                              .stream = exceeds_caches(mask.numel())};
  const Kernels& table = kernels();
  parallel_for((rows.rows + 3) / 4, row_grain(4 * rows.cols),
               [&](int64_t begin, int64_t end) { table.transposable(args, begin, end); });
  return mask;
}

}  // namespace
}  // namespace sparsekit

STABLE_TORCH_LIBRARY_IMPL(sparsekit, CPU, m) {
  m.impl("transposable_mask24", TORCH_BOX(&sparsekit::transposable_mask24));
}
