"""Selection by bit planes: a word holds one bit of 32 keys, so a step of a search costs 32 keys what it costs one.

A block, padded to powers of two, is cut along its rows into 16 slices of ``WIDTH`` entries. Word ``w`` of a plane has
the bits of columns ``2 w`` (its low half) and ``2 w + 1`` (its high half) of all slices: bit ``s`` of a half is slice
``s``. The tensors hold several blocks that lie side by side; a thread transposes the bits that it loaded.
"""

import triton
import triton.language as tl

from ._tiles import pairs, unpairs


@triton.jit
def _hidden(value: tl.constexpr):
    """``value``, which LLVM cannot know: with a constant mask it makes one select, or one count of bits, to several."""
    return tl.program_id(1).to(tl.uint32) + value  # grids have one axis, so 0 + value


@triton.jit
def _exchange(words, DISTANCE: tl.constexpr, STAY: tl.constexpr):
    exchanged = ()
    stay = _hidden(STAY)
    for s in tl.static_range(16):
        if s & DISTANCE == 0:
            moved = words[s + DISTANCE] << DISTANCE
            exchanged += ((words[s] ^ moved) & stay ^ moved,)
        else:
            moved = words[s - DISTANCE] >> DISTANCE
            exchanged += ((words[s] ^ moved) & stay ^ words[s],)
    return exchanged


@triton.jit
def _transpose(words):
    """16 words to 16 planes: in either half, bit ``b`` of word ``s`` becomes bit ``s`` of word ``b``."""
    words = _exchange(words, 1, 0x55555555)
    words = _exchange(words, 2, 0x33333333)
    words = _exchange(words, 4, 0x0F0F0F0F)
    return _exchange(words, 8, 0x00FF00FF)


@triton.jit
def key_planes(even, odd, MANTISSA: tl.constexpr):
    """The planes of magnitude keys, the lowest first, from the bits of floats; a NaN's key has all bits set.

    Args:
        even, odd: 16 slices each, uint32 ``[blocks, WIDTH / 2]``: the bits of the even and of the odd columns.
    """
    low, high = (), ()
    for s in tl.static_range(16):
        low += ((even[s] & 0xFFFF) | odd[s] << 16,)
        if MANTISSA == 23:
            high += (even[s] >> 16 | (odd[s] & 0xFFFF0000),)
    planes = _transpose(low)
    if MANTISSA == 23:
        planes = planes + _transpose(high)
    bits: tl.constexpr = 31 if MANTISSA == 23 else 15
    fraction, exponent = planes[0], planes[MANTISSA]
    for bit in tl.static_range(1, MANTISSA):
        fraction = fraction | planes[bit]
    for bit in tl.static_range(MANTISSA + 1, bits):
        exponent = exponent & planes[bit]
    keys = ()
    for bit in tl.static_range(bits):
        keys += (planes[bit] | (exponent & fraction),)
    return keys


@triton.jit
def _popcount(x):
    """The form that LLVM knows as one instruction."""
    x = x - (x >> 1 & 0x55555555)
    x = (x & 0x33333333) + (x >> 2 & 0x33333333)
    return ((x + (x >> 4) & 0x0F0F0F0F) * 0x01010101 >> 24).to(tl.int32)


@triton.jit
def _halve(plane, kept, rest, need):
    """One bit of the search: those of ``rest`` that have it are kept if too few, else the others are dropped."""
    ones = rest & plane
    count = tl.sum(_popcount(ones), 1)[:, None]
    few = (count - need) >> 31  # all bits set, or none
    words = few.to(tl.uint32, bitcast=True)
    return kept | (ones & words), rest & (plane ^ words), need - (count & few)


@triton.jit
def keep_topk(keys, valid, k, BITS: tl.constexpr):
    """The ``k`` largest keys of every block among the valid entries, ties to the lower index: words as of a plane.

    The bits of the key decide first, from the highest; then those of the index, as if they were the key's lowest.
    """
    kept, rest = tl.zeros_like(valid), valid
    need = tl.zeros([valid.shape[0], 1], tl.int32) + k
    for bit in tl.static_range(BITS):
        kept, rest, need = _halve(keys[BITS - 1 - bit], kept, rest, need)
    for stage in tl.static_range(4):
        earlier = _hidden((0x00FF00FF, 0x0F0F0F0F, 0x33333333, 0x55555555)[stage])
        kept, rest, need = _halve(earlier, kept, rest, need)
    words: tl.constexpr = valid.shape[1]
    for stage in tl.static_range(1, 17):
        if words >> stage > 0:
            later = (tl.arange(0, words)[None, :] & (words >> stage)) != 0
            kept, rest, need = _halve(later.to(tl.uint32) - 1, kept, rest, need)
    kept, rest, need = _halve(_hidden(0x0000FFFF), kept, rest, need)
    return tl.where(need > 0, kept | rest, kept)


@triton.jit
def _majority(a, b, c):
    return ((a ^ b) & (a ^ c)) ^ a


@triton.jit
def keep24(keys, BITS: tl.constexpr):
    """The two largest keys of every four columns, as ``keep2of4``, 16 slices at a time: words as of a plane."""
    apart = tl.full([keys[0].shape[0], keys[0].shape[1] // 2], 0xFFFFFFFF, tl.uint32)
    across, beside = apart, apart
    for bit in tl.static_range(BITS):  # from the lowest: a higher bit that differs overrules
        k01, k23 = unpairs(keys[bit])
        k32 = k23 << 16 | k23 >> 16
        k02, k13 = (k01 & 0xFFFF) | k23 << 16, k01 >> 16 | (k23 & 0xFFFF0000)
        apart = _majority(k01, k23 ^ 0xFFFFFFFF, apart)  # 0 >= 2, 1 >= 3
        across = _majority(k01, k32 ^ 0xFFFFFFFF, across)  # 0 >= 3, 1 >= 2
        beside = _majority(k02, k13 ^ 0xFFFFFFFF, beside)  # 0 >= 1, 2 >= 3
    first = (beside & 0xFFFF) | ((beside ^ 0xFFFFFFFF) << 16)
    last = beside >> 16 | ((beside ^ 0xFFFFFFFF) & 0xFFFF0000)
    turned = (across << 16 | across >> 16) ^ 0xFFFFFFFF
    return pairs(_majority(first, apart, across), _majority(last, apart ^ 0xFFFFFFFF, turned))


@triton.jit
def has(words, s: tl.constexpr):
    """Which entries of slice ``s`` are set, of the even and of the odd columns: bool ``[blocks, WIDTH / 2]``."""
    return (words & (1 << s)) != 0, (words & (0x10000 << s)) != 0


@triton.jit
def quad_bytes(words):
    """Four columns a word, a byte each, in it eight slices: those below 8, and those from 8 on."""
    first, last = unpairs(words)
    low = (first & 0xFF) | (first >> 8 & 0xFF00) | (last & 0xFF) << 16 | (last << 8 & 0xFF000000)
    high = (first >> 8 & 0xFF) | (first >> 16 & 0xFF00) | (last << 8 & 0xFF0000) | (last & 0xFF000000)
    return low, high
