"""Which entries of a group are kept: device functions that several kernels share."""

import triton
import triton.language as tl


@triton.jit
def widen(x):
    """fp32 of any float. bf16 by its bits, which costs the same: the interpreter's conversion drops denormals."""
    if x.dtype == tl.bfloat16:
        x = (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def magnitude_key(x):
    """int32 keys of fp32 ``x`` in magnitude order: the bits without the sign, one key above Inf's for every NaN."""
    return tl.minimum(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0x7F800001)


@triton.jit
def score_key(x, scale):
    """The key of ``abs(x) * scale``, one fp32 product; of ``x`` itself where ``scale`` is None."""
    x = widen(x)
    if scale is not None:
        x = tl.abs(x) * scale
    return magnitude_key(x)


@triton.jit
def _majority(a, b, c):
    return ((a ^ b) & (a ^ c)) ^ a  # in this form it becomes the fewest three-input logic instructions


@triton.jit
def flipped(word):
    return word ^ 0xFFFFFFFF  # the interpreter has no ~ for unsigned words


@triton.jit
def keep2of4_signs(k0, k1, k2, k3):
    """``keep2of4`` as four int32 words that are negative where kept; their other bits mean nothing.

    Keys are not negative, so the sign of a difference compares, and logic on whole words needs no predicates.
    """
    b0 = _majority(k0 - k1, k0 - k2, k0 - k3)  # negative: beaten by two others
    b1 = _majority(~(k0 - k1), k1 - k2, k1 - k3)
    b2 = _majority(~(k0 - k2), ~(k1 - k2), k2 - k3)
    return ~b0, ~b1, ~b2, ~(b0 ^ b1 ^ b2)


@triton.jit
def keep2of4(k0, k1, k2, k3):
    """Which two of four keys are the largest: kept is what beats two others, and ties go to the lower index."""
    b0, b1, b2, b3 = keep2of4_signs(k0, k1, k2, k3)
    return b0 < 0, b1 < 0, b2 < 0, b3 < 0


@triton.jit
def split4(x):
    """``[4 * n]`` to four ``[n]``: entry ``i`` of every four consecutive ones. No data moves between threads."""
    even, odd = tl.split(tl.reshape(x, [x.shape[0] // 4, 2, 2]))
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return x0, x1, x2, x3


@triton.jit
def join4(x0, x1, x2, x3):
    """The inverse of ``split4``."""
    return tl.reshape(tl.join(tl.join(x0, x2), tl.join(x1, x3)), [4 * x0.shape[0]])


@triton.jit
def swap_halves(low, high):
    """Two words of two 16-bit halves, transposed: the low halves of both, then the high halves. Its own inverse."""
    return (low & 0xFFFF) | (high << 16), (low >> 16) | (high & 0xFFFF0000)


@triton.jit
def keep2of4_pairs(w0, w1, w2, w3, NAN: tl.constexpr):
    """``keep2of4`` of fp16 or bf16 as they are, two groups side by side in the halves of four uint32 words.

    A half's magnitude has 15 bits. Where the minuend's top bit is set first, one subtraction compares both halves: the
    top bit survives where minuend >= subtrahend. That halves the comparisons, and nothing is converted to fp32.

    ``NAN`` is the least magnitude that is a NaN, in both halves. Payloads would rank NaNs, so they are set right: the
    first two entries are kept if NaN, the third unless both of these are. Returns four words whose halves have the top
    bit set where kept; their other bits mean nothing.
    """
    u0, u1, u2 = w0 | 0x80008000, w1 | 0x80008000, w2 | 0x80008000
    k1, k2, k3 = w1 & 0x7FFF7FFF, w2 & 0x7FFF7FFF, w3 & 0x7FFF7FFF
    nan0, nan1, nan2 = u0 - NAN, u1 - NAN, u2 - NAN
    b0 = _majority(u0 - k1, u0 - k2, u0 - k3) | nan0
    b1 = _majority(flipped(u0 - k1), u1 - k2, u1 - k3) | nan1
    b2 = _majority(flipped(u0 - k2), flipped(u1 - k2), u2 - k3)
    b2 = (nan2 & flipped(nan0 & nan1)) | (b2 & flipped(nan2))
    return b0, b1, b2, b0 ^ b1 ^ b2  # two of four are kept, so the parity of three tells the fourth
