"""Selection by bit planes: a word holds one bit of 32 keys, so a step of a search costs 32 keys what it costs one.

A block, padded to powers of two, is cut along its rows into 16 slices of ``WIDTH`` entries. The entries of several
blocks that lie side by side are one tensor ``[16, BLOCKS, WIDTH]``, whose slices share a thread. Word ``w`` of a plane,
``[1, BLOCKS, WIDTH / 2]``, has the bits of columns ``2 w`` (its low half) and ``2 w + 1`` (its high half) of
all slices: bit ``s`` of a half is slice ``s``.
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
    """``[S, B, G]``, of at most 32 slices, to a tuple of ``S`` ``[1, B, G]``."""
    parts = (entries,)
    for stage in tl.static_range(5):
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
    """One stage of ``_transpose``, which makes the highest bit of the index of slices its lowest."""
    first, last = _halves(words)
    up, down, stay = last << DISTANCE, first >> DISTANCE, _hidden(STAY)
    both = tl.join((first ^ up) & stay ^ up, (last ^ down) & stay ^ last)
    return tl.reshape(tl.permute(both, 0, 3, 1, 2), words.shape)


@triton.jit
def _transpose(words):
    """16 slices of words to 16 planes: in either half, bit ``b`` of slice ``s`` becomes bit ``s`` of plane ``b``."""
    words = _exchange(words, 8, 0x00FF00FF)
    words = _exchange(words, 4, 0x0F0F0F0F)
    words = _exchange(words, 2, 0x33333333)
    return _exchange(words, 1, 0x55555555)


@triton.jit
def key_planes(entries):
    """The planes of the magnitude keys of floats ``[16, BLOCKS, WIDTH]``, the lowest first; the last is of signs.

    All bits of a NaN's key are set. 16 planes or, of fp32, 32: ``[.., BLOCKS, WIDTH / 2]``.
    """
    mantissa: tl.constexpr = entries.dtype.fp_mantissa_width
    if mantissa == 23:
        even, odd = unpairs(entries.to(tl.uint32, bitcast=True))
        both = tl.join(_transpose((even & 0xFFFF) | odd << 16), _transpose(even >> 16 | (odd & 0xFFFF0000)))
        planes = tl.reshape(tl.permute(both, 3, 0, 1, 2), [32, both.shape[1], both.shape[2]])
    else:
        even, odd = unpairs(entries.to(tl.uint16, bitcast=True).to(tl.uint32))
        planes = _transpose(even | odd << 16)
    bits = slices(planes)
    fraction, exponent = bits[0], bits[mantissa]
    for bit in tl.static_range(1, mantissa):
        fraction = fraction | bits[bit]
    for bit in tl.static_range(mantissa + 1, planes.shape[0] - 1):
        exponent = exponent & bits[bit]
    return planes | (exponent & fraction)


@triton.jit
def nonzero(keys):
    """Which keys are not 0: words as of a plane."""
    bits = slices(keys)
    some = bits[0]
    for bit in tl.static_range(1, keys.shape[0] - 1):
        some = some | bits[bit]
    return some


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
    too_few = (count - need) >> 31  # all bits set, or none
    words = too_few.to(tl.uint32, bitcast=True)
    return kept | (ones & words), rest & (plane ^ words), need - (count & too_few)


@triton.jit
def keep_topk(keys, valid, k):
    """The ``k`` largest keys of every block among the valid entries, ties to the lower index: words as of a plane.

    The bits of the key decide first, from the highest; then those of the index, as if they were the key's lowest.
    """
    kept, rest = tl.zeros_like(valid), valid
    need = tl.zeros([1, valid.shape[1], 1], tl.int32) + k
    planes = slices(keys)
    for bit in tl.static_range(2, keys.shape[0] + 1):
        kept, rest, need = _halve(planes[keys.shape[0] - bit], kept, rest, need)
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
    k01, k23 = unpairs(keys)
    k32 = k23 << 16 | k23 >> 16
    k02, k13 = (k01 & 0xFFFF) | k23 << 16, k01 >> 16 | (k23 & 0xFFFF0000)
    quads: tl.constexpr = [keys.shape[0], keys.shape[1], 4 * k01.shape[2]]
    more = slices(tl.reshape(tl.join(tl.join(k01, k02), tl.join(k01, k02)), quads))
    less = slices(tl.reshape(tl.join(tl.join(k23, k13), tl.join(k32, k13)) ^ 0xFFFFFFFF, quads))
    beats = tl.full([1, quads[1], quads[2]], 0xFFFFFFFF, tl.uint32)
    for bit in tl.static_range(keys.shape[0] - 1):  # from the lowest: a higher bit that differs overrules
        beats = _majority(more[bit], less[bit], beats)
    earlier, across = unpairs(beats)
    apart, beside = unpairs(earlier)  # 0 >= 2 and 1 >= 3, 0 >= 1 and 2 >= 3
    across, _ = unpairs(across)  # 0 >= 3 and 1 >= 2
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
def spread(words):
    """An int32 ``[16, BLOCKS, WIDTH]`` for every entry: all bits set, or none. Bools would take too many predicates."""
    word = words.to(tl.int32, bitcast=True)
    s = tl.arange(0, 16)[:, None, None]
    return tl.interleave(word << (31 - s) >> 31, word << (15 - s) >> 31)


@triton.jit
def quad_bytes(words):
    """Four columns a word, a byte that is 0 or 1 each: uint32 ``[16, BLOCKS, WIDTH / 4]``."""
    first, last = unpairs(words)
    low = (first & 0xFF) | (first >> 8 & 0xFF00) | (last & 0xFF) << 16 | (last << 8 & 0xFF000000)
    high = (first >> 8 & 0xFF) | (first >> 16 & 0xFF00) | (last << 8 & 0xFF0000) | (last & 0xFF000000)
    s = tl.arange(0, 16)[:, None, None]
    return tl.where(s < 8, low, high) >> (s & 7) & 0x01010101
