// Block scores, top-k per block and tiers: block_scores, block_topk_mask, tier_prune, tier_scores.
#include <tuple>

#include "tensor_args.h"

namespace sparsekit {
namespace {

int64_t ceil_div(int64_t value, int64_t divisor) { return (value + divisor - 1) / divisor; }

Tensor block_scores(Tensor weight, int64_t block_rows, int64_t block_cols, std::optional<Tensor> scale,
                    std::optional<Tensor> mask) {
  const FloatMode exact(FloatMode::kExact);
  const int64_t down = ceil_div(weight.size(0), block_rows), across = ceil_div(weight.size(1), block_cols);
  Tensor scores = empty(weight, {down, across}, ScalarType::Float);
  if (down * across == 0) return scores;
  const Rows rows = rows_of(weight);
  const BlockScoresArgs args{.weight = weight.const_data_ptr(),
                             .weight_stride = rows.stride,
                             .scale = contiguous_data<float>(scale),
                             .mask = contiguous_data<bool>(mask),
                             .scores = static_cast<float*>(scores.mutable_data_ptr()),
                             .rows = rows.rows,
                             .cols = rows.cols,
                             .block_rows = block_rows,
                             .block_cols = block_cols,
                             .dtype = dtype_of(weight)};
  const Kernels& table = kernels();
  parallel_for(down, row_grain(rows.cols * block_rows),
               [&](int64_t begin, int64_t end) { table.block_scores(args, begin, end); });
  return scores;
}

Tensor block_topk_mask(Tensor score, int64_t k, int64_t block_rows, int64_t block_cols) {
  const FloatMode exact(FloatMode::kExact);
  Tensor mask = empty(score, shape_of(score), ScalarType::Bool);
  if (score.numel() == 0) return mask;
  const Rows rows = rows_of(score);
  const BlockTopkArgs args{.score = score.const_data_ptr(),
                           .score_stride = rows.stride,
                           .mask = static_cast<bool*>(mask.mutable_data_ptr()),
                           .rows = rows.rows,
                           .cols = rows.cols,
                           .block_rows = block_rows,
                           .block_cols = block_cols,
                           .k = k,
                           .dtype = dtype_of(score)};
  const Kernels& table = kernels();
  parallel_for(ceil_div(rows.rows, block_rows), row_grain(rows.cols * block_rows),
               [&](int64_t begin, int64_t end) { table.block_topk(args, begin, end); });
  return mask;
}

std::tuple<Tensor, Tensor, Tensor> tier_prune(Tensor weight, Tensor tiers, int64_t k, int64_t block_rows,
                                              int64_t block_cols, std::optional<Tensor> scale,
                                              std::optional<Tensor> score_scale, bool nested) {
  const FloatMode exact(FloatMode::kExact);
  Tensor pruned = empty(weight, shape_of(weight), weight.scalar_type());
  Tensor mask = empty(weight, shape_of(weight), ScalarType::Bool);
  Tensor scores = empty(weight, shape_of(tiers), ScalarType::Float);
  if (weight.numel() == 0) return {pruned, mask, scores};
  const Rows rows = rows_of(weight);
  tiers = in_order(tiers);
  const TierPruneArgs args{.weight = weight.const_data_ptr(),
                           .weight_stride = rows.stride,
                           .tiers = static_cast<const uint8_t*>(tiers.const_data_ptr()),
                           .scale = contiguous_data<float>(scale),
                           .score_scale = contiguous_data<float>(score_scale),
                           .pruned = pruned.mutable_data_ptr(),
                           .mask = static_cast<bool*>(mask.mutable_data_ptr()),
                           .scores = static_cast<float*>(scores.mutable_data_ptr()),
                           .rows = rows.rows,
                           .cols = rows.cols,
                           .block_rows = block_rows,
                           .block_cols = block_cols,
                           .k = k,
                           .nested = nested,
                           .dtype = dtype_of(weight),
                           .stream = exceeds_caches(weight.numel() * (1 + weight.element_size()))};
  const Kernels& table = kernels();
  parallel_for(ceil_div(rows.rows, block_rows), row_grain(rows.cols * block_rows),
               [&](int64_t begin, int64_t end) { table.tier_prune(args, begin, end); });
  return {pruned, mask, scores};
}

Tensor tier_scores(Tensor weight, int64_t k, int64_t block_rows, int64_t block_cols, std::optional<Tensor> scale,
                   std::optional<Tensor> score_scale, bool squared) {
  const FloatMode exact(FloatMode::kExact);
  const int64_t down = ceil_div(weight.size(0), block_rows), across = ceil_div(weight.size(1), block_cols);
  Tensor scores = empty(weight, {3, down, across}, ScalarType::Float);
  if (down * across == 0) return scores;
  const Rows rows = rows_of(weight);
  const TierScoresArgs args{.weight = weight.const_data_ptr(),
                            .weight_stride = rows.stride,
                            .scale = contiguous_data<float>(scale),
                            .score_scale = contiguous_data<float>(score_scale),
                            .scores = static_cast<float*>(scores.mutable_data_ptr()),
                            .rows = rows.rows,
                            .cols = rows.cols,
                            .block_rows = block_rows,
                            .block_cols = block_cols,
                            .k = k,
                            .squared = squared,
                            .dtype = dtype_of(weight)};
  const Kernels& table = kernels();
  parallel_for(down, row_grain(rows.cols * block_rows),
               [&](int64_t begin, int64_t end) { table.tier_scores(args, begin, end); });
  return scores;
}

}  // namespace
}  // namespace sparsekit

STABLE_TORCH_LIBRARY_IMPL(sparsekit, CPU, m) {
  m.impl("block_scores", TORCH_BOX(&sparsekit::block_scores));
  m.impl("block_topk_mask", TORCH_BOX(&sparsekit::block_topk_mask));
  m.impl("tier_prune", TORCH_BOX(&sparsekit::tier_prune));
  m.impl("tier_scores", TORCH_BOX(&sparsekit::tier_scores));
}
