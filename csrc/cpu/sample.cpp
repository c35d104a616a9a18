// Random N:M masks and the step of their logits: nm_sample, nm_policy_step_.
#include "tensor_args.h"

namespace sparsekit {
namespace {

Tensor draw(Tensor& logits, const uint8_t* drawn, float step, int64_t n, int64_t m, int64_t seed, uint64_t offset) {
  const FloatMode exact(FloatMode::kExact);
  std::vector<int64_t> shape = shape_of(logits);
  shape.back() = (shape.back() + 7) / 8;
  Tensor bits = empty(logits, shape, ScalarType::Byte);
  const Rows rows = rows_of(logits);
  if (rows.rows == 0 || rows.cols == 0) return bits;
  const int64_t width = kSampleWidth / (16 * m) * 16 * m;  // whole groups in every lane
  const SampleArgs args{.logits = logits.mutable_data_ptr(),
                        .drawn = drawn,
                        .bits = static_cast<uint8_t*>(bits.mutable_data_ptr()),
                        .stride = rows.stride,
                        .cols = rows.cols,
                        .width = width,
                        .seed = static_cast<uint64_t>(seed),
                        .offset = offset,
                        .step = step,
                        .n = static_cast<int>(n),
                        .m = static_cast<int>(m),
                        .dtype = dtype_of(logits)};
  const Kernels& table = kernels();
  parallel_for(rows.rows * ((rows.cols + width - 1) / width), row_grain(8 * std::min(width, rows.cols)),
               [&](int64_t begin, int64_t end) { table.sample(args, begin, end); });
  return bits;
}

Tensor nm_sample(Tensor logits, int64_t n, int64_t m, int64_t seed, int64_t offset) {
  return draw(logits, nullptr, 0, n, m, seed, static_cast<uint64_t>(offset));
}

Tensor nm_policy_step_(Tensor logits, Tensor bits, Tensor advantage, double lr, int64_t n, int64_t m, int64_t seed,
                       int64_t offset) {
  const FloatMode exact(FloatMode::kExact);
  bits = in_order(bits);
  const float step = *static_cast<const float*>(advantage.const_data_ptr()) * static_cast<float>(lr);
  Tensor written = rows_in_place(logits) ? logits : torch::stable::contiguous(logits);
  Tensor next = draw(written, static_cast<const uint8_t*>(bits.const_data_ptr()), step, n, m, seed,
                     static_cast<uint64_t>(offset) + 1);
  if (written.const_data_ptr() != logits.const_data_ptr()) torch::stable::copy_(logits, written);
  return next;
}

}  // namespace
}  // namespace sparsekit

STABLE_TORCH_LIBRARY_IMPL(sparsekit, CPU, m) {
  m.impl("nm_sample", TORCH_BOX(&sparsekit::nm_sample));
  m.impl("nm_policy_step_", TORCH_BOX(&sparsekit::nm_policy_step_));
}
