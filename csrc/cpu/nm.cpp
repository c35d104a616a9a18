// N:M masks and pruning: nm_mask, nm_mask_bits, nm_prune, nm_prune_.
#include <tuple>

#include "tensor_args.h"

namespace sparsekit {
namespace {

// Where every row is whole groups, and whole bytes of the mask's bits, a contiguous tensor is divided into rows of
// another length: many short rows then cost nothing extra, and one long row is shared by all threads.
void run_flat(NmArgs args, int64_t count) {
  const int64_t width = 16384 / (8 * args.m) * (8 * args.m), pieces = count / width;
  const Kernels& table = kernels();
  args.cols = args.weight_stride = args.pruned_stride = width;
  parallel_for(pieces, 2, [&](int64_t begin, int64_t end) { table.nm(args, begin, end); });
  const int64_t size = args.dtype == DType::F32 ? 4 : 2, done = pieces * width;
  args.weight = static_cast<const char*>(args.weight) + done * size;
  if (args.pruned) args.pruned = static_cast<char*>(args.pruned) + done * size;
  if (args.mask) args.mask += done;
  if (args.bits) args.bits += done / 8;
  args.cols = count - done;
  if (args.cols > 0) table.nm(args, 0, 1);
}

void run(const NmArgs& args, int64_t rows) {
  const bool whole = args.cols % args.m == 0 && (!args.bits || args.cols % 8 == 0);
  if (!args.scale && whole && args.weight_stride == args.cols && args.pruned_stride == args.cols)
    return run_flat(args, rows * args.cols);
  const Kernels& table = kernels();
  parallel_for(rows, row_grain(args.cols),
               [&](int64_t begin, int64_t end) { table.nm(args, begin, end); });
}

// Returns the mask of `weight`, and writes the kept entries into `pruned`, which may be null, contiguous, or the
// weight.
Tensor masked(Tensor weight, int64_t n, int64_t m, std::optional<Tensor> scale, Tensor* pruned) {
  const FloatMode exact(FloatMode::kExact);
  Tensor mask = empty(weight, shape_of(weight), ScalarType::Bool);
  const Rows rows = rows_of(weight);
  const bool in_place = pruned && pruned->const_data_ptr() == weight.const_data_ptr();
  run({.weight = weight.const_data_ptr(),
       .weight_stride = rows.stride,
       .pruned = pruned ? pruned->mutable_data_ptr() : nullptr,
       .pruned_stride = in_place ? rows.stride : rows.cols,
       .scale = contiguous_data<float>(scale),
       .mask = static_cast<bool*>(mask.mutable_data_ptr()),
       .bits = nullptr,
       .cols = rows.cols,
       .n = static_cast<int>(n),
       .m = static_cast<int>(m),
       .dtype = dtype_of(weight),
       .stream = exceeds_caches(mask.numel() * (1 + (pruned ? weight.element_size() : 0)))},
      rows.rows);
  return mask;
}

Tensor nm_mask(Tensor score, int64_t n, int64_t m) { return masked(score, n, m, std::nullopt, nullptr); }

Tensor nm_mask_bits(Tensor score, int64_t n, int64_t m) {
  const FloatMode exact(FloatMode::kExact);
  std::vector<int64_t> shape = shape_of(score);
  shape.back() = (shape.back() + 7) / 8;
  Tensor bits = empty(score, shape, ScalarType::Byte);
  const Rows rows = rows_of(score);
  run({.weight = score.const_data_ptr(),
       .weight_stride = rows.stride,
       .pruned = nullptr,
       .pruned_stride = rows.cols,
       .scale = nullptr,
       .mask = nullptr,
       .bits = static_cast<uint8_t*>(bits.mutable_data_ptr()),
       .cols = rows.cols,
       .n = static_cast<int>(n),
       .m = static_cast<int>(m),
       .dtype = dtype_of(score),
       .stream = false},
      rows.rows);
  return bits;
}

std::tuple<Tensor, Tensor> nm_prune(Tensor weight, int64_t n, int64_t m, std::optional<Tensor> scale) {
  Tensor pruned = empty(weight, shape_of(weight), weight.scalar_type());
  Tensor mask = masked(weight, n, m, scale, &pruned);
  return {pruned, mask};
}

Tensor nm_prune_(Tensor weight, int64_t n, int64_t m, std::optional<Tensor> scale) {
  if (rows_in_place(weight)) return masked(weight, n, m, scale, &weight);
  Tensor copy = in_order(weight);
  Tensor mask = masked(copy, n, m, scale, &copy);
  torch::stable::copy_(weight, copy);
  return mask;
}

}  // namespace
}  // namespace sparsekit

STABLE_TORCH_LIBRARY_IMPL(sparsekit, CPU, m) {
  m.impl("nm_mask", TORCH_BOX(&sparsekit::nm_mask));
  m.impl("nm_mask_bits", TORCH_BOX(&sparsekit::nm_mask_bits));
  m.impl("nm_prune", TORCH_BOX(&sparsekit::nm_prune));
  m.impl("nm_prune_", TORCH_BOX(&sparsekit::nm_prune_));
}
