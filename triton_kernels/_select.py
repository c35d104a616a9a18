"""Which entries of a group are kept: device functions that several kernels share."""

import triton
import triton.language as tl


@triton.jit
def magnitude_key(x):
    """int32 keys of fp32 ``x`` in magnitude order: the bits without the sign, one key above Inf's for every NaN."""
    return tl.minimum(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0x7F800001)


@triton.jit
def _majority(a, b, c):
    return (a & b) | (c & (a | b))


@triton.jit
def keep2of4(k0, k1, k2, k3):
    """Which two of four keys are the largest: kept is what beats two others, and ties go to the lower index."""
    k01, k02, k03 = k0 >= k1, k0 >= k2, k0 >= k3
    k12, k13, k23 = k1 >= k2, k1 >= k3, k2 >= k3
    b0 = _majority(k01, k02, k03)
    b1 = _majority(~k01, k12, k13)
    b2 = _majority(~k02, ~k12, k23)
    return b0, b1, b2, b0 ^ b1 ^ b2  # two of four are kept, so the parity of three tells the fourth
