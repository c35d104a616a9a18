// N:M masks and pruning: nm_mask, nm_prune, nm_prune_.
#include <tuple>

#include "glue.h"

namespace sparsekit {
namespace {

void run(NmArgs args, int64_t rows) {
  const Kernels& table = kernels();
  torch::stable::parallel_for(0, rows, row_grain(args.cols),
                              [&](int64_t begin, int64_t end) { table.nm(args, begin, end); });
}

// The mask of `weight`; where `pruned` is given, what the mask keeps of the weight goes there (its strides are the
// weight's where it is the weight, contiguous otherwise).
Tensor masked(Tensor weight, int64_t n, int64_t m, std::optional<Tensor> scale, Tensor* pruned, bool in_place) {
  Tensor mask = empty(weight, shape_of(weight), ScalarType::Bool);
  const Rows rows = rows_of(weight);
  run({.weight = weight.const_data_ptr(),
       .weight_stride = rows.stride,
       .pruned = pruned ? pruned->mutable_data_ptr() : nullptr,
       .pruned_stride = in_place ? rows.stride : rows.cols,
       .scale = contiguous_data<float>(scale),
       .mask = static_cast<bool*>(mask.mutable_data_ptr()),
       .cols = rows.cols,
       .n = static_cast<int>(n),
       .m = static_cast<int>(m),
       .dtype = dtype_of(weight)},
      rows.rows);
  return mask;
}

Tensor nm_mask(Tensor score, int64_t n, int64_t m) { return masked(score, n, m, std::nullopt, nullptr, false); }

std::tuple<Tensor, Tensor> nm_prune(Tensor weight, int64_t n, int64_t m, std::optional<Tensor> scale) {
  Tensor pruned = empty(weight, shape_of(weight), weight.scalar_type());
  Tensor mask = masked(weight, n, m, scale, &pruned, false);
  return {pruned, mask};
}

Tensor nm_prune_(Tensor weight, int64_t n, int64_t m, std::optional<Tensor> scale) {
  if (rows_in_place(weight)) return masked(weight, n, m, scale, &weight, true);
  auto [pruned, mask] = nm_prune(weight, n, m, scale);
  torch::stable::copy_(weight, pruned);
  return mask;
}

}  // namespace
}  // namespace sparsekit

STABLE_TORCH_LIBRARY_IMPL(sparsekit, CPU, m) {
  m.impl("nm_mask", TORCH_BOX(&sparsekit::nm_mask));
  m.impl("nm_prune", TORCH_BOX(&sparsekit::nm_prune));
  m.impl("nm_prune_", TORCH_BOX(&sparsekit::nm_prune_));
}
