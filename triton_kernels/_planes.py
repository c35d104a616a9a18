"""Selection by bit planes: a word holds one bit of 32 keys, so a step of a search costs 32 keys what it costs one.

A block, padded to powers of two, is cut along its rows into 16 slices of ``WIDTH`` entries. The entries of several
blocks that lie side by side are one tensor ``[16, BLOCKS, WIDTH]``, whose slices share a thread. Word ``w`` of a plane,
``[1, BLOCKS, WIDTH / 2]``, has the bits of columns ``2 w`` (its low half) and ``2 w + 1`` (its high half) of all slices:
bit ``s`` of a half is slice ``s``.
"""

import triton
import triton.language as tl


@triton.jit
def unpairs(entries):
    """``[S, B, 2 G]`` to the two ``[S, B, G]`` that were interleaved."""
    return tl.split(tl.reshape(entries, [entries.shape[0], entries.shape[1], entries.shape[2] // 2, 2]))


@triton.jit
def _halves(words):
    """``[S, B, G]`` to its first and its last slices: ``[S / 2, B, G]``."""
    apart = tl.reshape(words, [2, words.shape[0] // 2, words.shape[1], words.shape[2]])
    return tl.split(tl.permute(apart, 1, 2, 3, 0))


@triton.jit
def slices(entries):
    """``[S, B, G]``, of at most 16 slices, to a tuple of ``S`` ``[1, B, G]``."""
    parts = (entries,)
    for stage in tl.static_range(4):
        if entries.shape[0] >> stage > 1:
            halves = ()
            for part in tl.static_range(1 << stage):
                halves += _halves(parts[part])
            parts = halves
    return parts


@triton.jit
def _hidden(value: tl.constexpr):
    """``value``, which LLVM cannot know: with a constant mask it makes one select, or one count of bits, to several."""
    return tl.program_id(1).to(tl.uint32) + value  # grids have one axis, so 0 + value


@triton.jit
def _exchange(words, DISTANCE: tl.constexpr, STAY: tl.constexpr):
    first, last = _halves(words)
    up, down, stay = last << DISTANCE, first >> DISTANCE, _hidden(STAY)
    return (first ^ up) & stay ^ up, (last ^ down) & stay ^ last


@triton.jit
def _transpose(words):
    """16 slices of words to a tuple of 16 planes: in either half, bit ``b`` of slice ``s`` becomes bit ``s`` of ``b``."""
    parts = (words,)
    for stage in tl.static_range(4):
        halves = ()
        for part in tl.static_range(1 << stage):
            halves += _exchange(parts[part], 8 >> stage, (0x00FF00FF, 0x0F0F0F0F, 0x33333333, 0x55555555)[stage])
        parts = halves
    return parts


@triton.jit
def key_planes(entries):
    """The planes of the magnitude keys of floats ``[16, BLOCKS, WIDTH]``, the lowest first; a NaN's has all bits set."""
    mantissa: tl.constexpr = entries.dtype.fp_mantissa_width
    if mantissa == 23:
        even, odd = unpairs(entries.to(tl.uint32, bitcast=True))
        planes = _transpose((even & 0xFFFF) | odd << 16) + _transpose(even >> 16 | (odd & 0xFFFF0000))
    else:
        even, odd = unpairs(entries.to(tl.uint16, bitcast=True).to(tl.uint32))
        planes = _transpose(even | odd << 16)
    bits: tl.constexpr = len(planes) - 1
    fraction, exponent = planes[0], planes[mantissa]
    for bit in tl.static_range(1, mantissa):
        fraction = fraction | planes[bit]
    for bit in tl.static_range(mantissa + 1, bits):
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
    count = tl.sum(_popcount(ones), 2, keep_dims=True)
    few = (count - need) >> 31  # all bits set, or none
    words = few.to(tl.uint32, bitcast=True)
    return kept | (ones & words), rest & (plane ^ words), need - (count & few)


@triton.jit
def keep_topk(keys, valid, k):
    """The ``k`` largest keys of every block among the valid entries, ties to the lower index: words as of a plane.

    The bits of the key decide first, from the highest; then those of the index, as if they were the key's lowest.
    """
    kept, rest = tl.zeros_like(valid), valid
    need = tl.zeros([1, valid.shape[1], 1], tl.int32) + k
    bits: tl.constexpr = len(keys)
    for bit in tl.static_range(bits):
        kept, rest, need = _halve(keys[bits - 1 - bit], kept, rest, need)
    for stage in tl.static_range(4):
        earlier = _hidden((0x00FF00FF, 0x0F0F0F0F, 0x33333333, 0x55555555)[stage])
        kept, rest, need = _halve(earlier, kept, rest, need)
    words: tl.constexpr = valid.shape[2]
    for stage in tl.static_range(1, 17):
        if words >> stage > 0:
            later = (tl.arange(0, words)[None, None, :] & (words >> stage)) != 0
            kept, rest, need = _halve(later.to(tl.uint32) - 1, kept, rest, need)
    kept, rest, need = _halve(_hidden(0x0000FFFF), kept, rest, need)
    return tl.where(need > 0, kept | rest, kept)


@triton.jit
def _majority(a, b, c):
    return ((a ^ b) & (a ^ c)) ^ a


@triton.jit
def keep24(keys):
    """The two largest keys of every four columns, as ``keep2of4``, 16 slices at a time: words as of a plane."""
    apart = tl.full([1, keys[0].shape[1], keys[0].shape[2] // 2], 0xFFFFFFFF, tl.uint32)
    across, beside = apart, apart
    for bit in tl.static_range(len(keys)):  # from the lowest: a higher bit that differs overrules
        k01, k23 = unpairs(keys[bit])
        k32 = k23 << 16 | k23 >> 16
        k02, k13 = (k01 & 0xFFFF) | k23 << 16, k01 >> 16 | (k23 & 0xFFFF0000)
        apart = _majority(k01, k23 ^ 0xFFFFFFFF, apart)  # 0 >= 2, 1 >= 3
        across = _majority(k01, k32 ^ 0xFFFFFFFF, across)  # 0 >= 3, 1 >= 2
        beside = _majority(k02, k13 ^ 0xFFFFFFFF, beside)  # 0 >= 1, 2 >= 3
    first = (beside & 0xFFFF) | ((beside ^ 0xFFFFFFFF) << 16)
    last = beside >> 16 | ((beside ^ 0xFFFFFFFF) & 0xFFFF0000)
    turned = (across << 16 | across >> 16) ^ 0xFFFFFFFF
    return tl.interleave(_majority(first, apart, across), _majority(last, apart ^ 0xFFFFFFFF, turned))


@triton.jit
def words_of(bools):
    """Bool ``[16, BLOCKS, WIDTH]`` to words as of a plane."""
    even, odd = unpairs(bools.to(tl.uint32))
    return tl.sum((even | odd << 16) << tl.arange(0, 16)[:, None, None], 0, keep_dims=True)


@triton.jit
def has(words):
    """Which entries are set, of words as of a plane: bool ``[16, BLOCKS, WIDTH]``."""
    word = words >> tl.arange(0, 16)[:, None, None]
    return tl.interleave((word & 1) != 0, (word & 0x10000) != 0)


@triton.jit
def quad_bytes(words):
    """Four columns a word, a byte that is 0 or 1 each: uint32 ``[16, BLOCKS, WIDTH / 4]``."""
    first, last = unpairs(words)
    low = (first & 0xFF) | (first >> 8 & 0xFF00) | (last & 0xFF) << 16 | (last << 8 & 0xFF000000)
    high = (first >> 8 & 0xFF) | (first >> 16 & 0xFF00) | (last << 8 & 0xFF0000) | (last & 0xFF000000)
    s = tl.arange(0, 16)[:, None, None]
    return tl.where(s < 8, low, high) >> (s & 7) & 0x01010101
