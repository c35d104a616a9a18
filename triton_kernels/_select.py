"""Ranking of entries and selection of two of four: device functions that several kernels share."""

import triton
import triton.language as tl


@triton.jit
def widen(x):
    """Converts any float to fp32, exactly."""
    if x.dtype == tl.bfloat16:  # by its bits, as the interpreter's conversion would lose denormals
        x = (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def magnitude_key(x):
    """Returns int32 keys that order fp32 ``x`` by magnitude; every NaN has the same key, the one above that of Inf."""
    return tl.minimum(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0x7F800001)


@triton.jit
def score_key(x, scale):
    """Returns the magnitude key of ``abs(x) * scale``, computed in fp32; that of ``x`` where ``scale`` is None."""
    x = widen(x)
    if scale is not None:
        x = tl.abs(x) * scale
    return magnitude_key(x)


@triton.jit
def _majority(a, b, c):
    """Returns the bits that are set in at least two of three words."""
    return ((a ^ b) & (a ^ c)) ^ a  # this form compiles to the fewest three-input logic instructions


@triton.jit
def flipped(word):
    """Returns the word with all bits flipped; Triton's interpreter has no ``~`` for unsigned words."""
    return word ^ 0xFFFFFFFF


@triton.jit
def keep2of4_signs(k0, k1, k2, k3):
    """Returns the result of ``keep2of4`` as four int32 that are negative where the key is kept, else not.

    Keys are not negative, so the sign of a difference compares two of them, and logic on words needs no predicates.
    """
    b0 = _majority(k0 - k1, k0 - k2, k0 - k3)  # negative where two others are larger
    b1 = _majority(~(k0 - k1), k1 - k2, k1 - k3)
    b2 = _majority(~(k0 - k2), ~(k1 - k2), k2 - k3)
    return ~b0, ~b1, ~b2, ~(b0 ^ b1 ^ b2)


@triton.jit
def keep2of4(k0, k1, k2, k3):
    """Returns, for four keys, whether each is one of the two largest; of equal keys, the lower index is kept."""
    b0, b1, b2, b3 = keep2of4_signs(k0, k1, k2, k3)
    return b0 < 0, b1 < 0, b2 < 0, b3 < 0


@triton.jit
def split4(x):
    """Splits ``[4 * n]`` into four ``[n]``, by index modulo four; no data moves between threads."""
    even, odd = tl.split(tl.reshape(x, [x.shape[0] // 4, 2, 2]))
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return x0, x1, x2, x3


@triton.jit
def join4(x0, x1, x2, x3):
    """Joins four ``[n]`` to ``[4 * n]``: the inverse of ``split4``."""
    return tl.reshape(tl.join(tl.join(x0, x2), tl.join(x1, x3)), [4 * x0.shape[0]])


@triton.jit
def swap_halves(low, high):
    """Swaps the high half of the first word with the low half of the second; its own inverse."""
    return (low & 0xFFFF) | (high << 16), (low >> 16) | (high & 0xFFFF0000)


@triton.jit
def keep2of4_pairs(w0, w1, w2, w3, NAN: tl.constexpr):
    """Returns which of four fp16 or bf16 entries ``keep2of4`` keeps, for two groups in the halves of uint32 words.

    In the four words of the result, the top bit of a half is set where its entry is kept; the other bits are undefined.

    A magnitude has 15 bits. With the top bit of the minuend set beforehand, one subtraction of words compares both
    halves: the top bit stays set where minuend >= subtrahend. That halves the comparisons and needs no fp32.

    ``NAN`` is the smallest NaN, in both halves. NaNs must rank alike, though their bits differ: one of the first two
    entries is kept if it is NaN, and the third is kept if it is NaN unless the first two both are.
    """
    u0, u1, u2 = w0 | 0x80008000, w1 | 0x80008000, w2 | 0x80008000
    k1, k2, k3 = w1 & 0x7FFF7FFF, w2 & 0x7FFF7FFF, w3 & 0x7FFF7FFF
    nan0, nan1, nan2 = u0 - NAN, u1 - NAN, u2 - NAN
    b0 = _majority(u0 - k1, u0 - k2, u0 - k3) | nan0
    b1 = _majority(flipped(u0 - k1), u1 - k2, u1 - k3) | nan1
    b2 = _majority(flipped(u0 - k2), flipped(u1 - k2), u2 - k3)
    b2 = (nan2 & flipped(nan0 & nan1)) | (b2 & flipped(nan2))
    return b0, b1, b2, b0 ^ b1 ^ b2  # two of four are kept, so the parity of three tells the fourth
