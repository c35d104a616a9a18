// A weight with zeros where a mask, given as bits, drops entries: masked_weight.
#include "tensor_args.h"

namespace sparsekit {
namespace {

void run(const MaskedArgs& args, int64_t count, int64_t grain) {
  const Kernels& table = kernels();
  parallel_for(count, grain, [&](int64_t begin, int64_t end) { table.masked(args, begin, end); });
}

Tensor masked_weight(Tensor weight, Tensor bits, int64_t full) {
  Tensor masked = empty(weight, shape_of(weight), weight.scalar_type());
  const int64_t count = masked.numel(), rows = weight.size(0), cols = weight.size(1), taps = weight.size(2);
  if (count == 0) return masked;
  weight = in_order(weight);
  bits = in_order(bits);
  MaskedArgs args{.weight = weight.const_data_ptr(),
                  .bits = static_cast<const uint8_t*>(bits.const_data_ptr()),
                  .masked = masked.mutable_data_ptr(),
                  .cols = cols,
                  .full = full,
                  .taps = taps,
                  .dtype = dtype_of(weight)};
  if (taps > 1) {
    run(args, rows * ((cols + 7) / 8), row_grain(8 * taps));
  } else if (full < cols) {
    run(args, rows, row_grain(cols));
  } else {  // rows of another length, so that many short ones cost nothing extra
    constexpr int64_t kWidth = 16384;
    args.cols = args.full = kWidth;
    run(args, count / kWidth, 2);
    const int64_t done = count / kWidth * kWidth, bytes = done * weight.element_size();
    args.weight = static_cast<const char*>(args.weight) + bytes;
    args.bits += done / 8;
    args.masked = static_cast<char*>(args.masked) + bytes;
    args.cols = args.full = count - done;
    if (count > done) kernels().masked(args, 0, 1);
  }
  return masked;
}

}  // namespace
}  // namespace sparsekit

STABLE_TORCH_LIBRARY_IMPL(sparsekit, CPU, m) { m.impl("masked_weight", TORCH_BOX(&sparsekit::masked_weight)); }
