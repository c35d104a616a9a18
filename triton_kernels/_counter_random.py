"""Random numbers by counter, and exp and log that are the same on every device, as device functions.

``sparsekit/ops/_counter_random.py`` defines them. Kernels that use them are compiled with ``enable_fp_fusion=False``.
"""

import triton
import triton.language as tl

from ._select import join4

LOG2_HIGH = tl.constexpr(float.fromhex("0x1.62e4p-1"))
LOG2_LOW = tl.constexpr(float.fromhex("0x1.7f7d1cp-20"))


@triton.jit
def random_words(counter, seed, offset_low, offset_high):
    """Returns four random words for each int64 counter (Philox4x32-10)."""
    low, high = (
        (tl.zeros_like(counter) + offset_low).to(tl.uint32),
        (tl.zeros_like(counter) + offset_high).to(tl.uint32),
    )
    return tl.philox(seed, counter.to(tl.uint32), (counter >> 32).to(tl.uint32), low, high)


@triton.jit
def entry_words(first, counters, seed, offset_low, offset_high, GROUPS: tl.constexpr, WIDTH: tl.constexpr):
    """Returns the random words of ``[GROUPS, WIDTH]`` entries, where each group of the tensor has ``counters``."""
    group = first + tl.arange(0, GROUPS * WIDTH // 4) // (WIDTH // 4)
    counter = group * counters + tl.arange(0, GROUPS * WIDTH // 4) % (WIDTH // 4)
    w0, w1, w2, w3 = random_words(counter, seed, offset_low, offset_high)
    return tl.reshape(join4(w0, w1, w2, w3), [GROUPS, WIDTH])


@triton.jit
def exact_log(x):
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F400000) >> 23
    f = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    total = f * -0.04857634752988815 + 0.10748569667339325
    total = total * f + -0.1314474195241928
    total = total * f + 0.14426705241203308
    total = total * f + -0.16644467413425446
    total = total * f + 0.1999390870332718
    total = total * f + -0.2500024437904358
    total = total * f + 0.33333393931388855
    total = total * f + -0.5
    power = exponent.to(tl.float32)
    return power * LOG2_HIGH + (f + (f * f * total + power * LOG2_LOW))


@triton.jit
def exact_exp(x):
    power = x * 1.44269502162933349609375 + 12582912.0 - 12582912.0
    r = x - power * LOG2_HIGH - power * LOG2_LOW
    total = r * 0.0013941110810264945 + 0.008369150571525097
    total = total * r + 0.04166635125875473
    total = total * r + 0.16666504740715027
    total = total * r + 0.5
    total = total * r + 1.0
    return (1.0 + r * total) * ((power.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def exact_gumbel(words):
    """Returns ``-log(-log(u))``, ``u`` being the upper 23 bits of each word and one half, over 2^23."""
    odd = ((words >> 9) * 2 + 1).to(tl.int32)
    return -exact_log(-exact_log(odd.to(tl.float32) * 5.9604644775390625e-08))
