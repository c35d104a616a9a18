"""Selection by bit planes: a word holds one bit of 32 keys, so one instruction searches 32 keys at once.

A block is padded to powers of two and cut, row by row, into 16 slices of ``WIDTH`` entries. Several blocks that lie
side by side are one tensor ``[16, BLOCKS, WIDTH]``; a thread has the same columns of all slices. A plane holds one bit
of every key, in words ``[1, BLOCKS, WIDTH / 2]``: the low half of word ``w`` is column ``2 w`` and the high half column
``2 w + 1``, and bit ``s`` of a half is slice ``s``.
"""

import triton
import triton.language as tl


@triton.jit
def deinterleave(entries):
    """Splits ``[S, B, 2 G]`` into its even and its odd columns, ``[S, B, G]`` each."""
    return tl.split(tl.reshape(entries, [entries.shape[0], entries.shape[1], entries.shape[2] // 2, 2]))


@triton.jit
def _halves(words):
    """Splits ``[S, B, G]`` into the first and the last half of its slices, ``[S / 2, B, G]`` each."""
    apart = tl.reshape(words, [2, words.shape[0] // 2, words.shape[1], words.shape[2]])
    return tl.split(tl.permute(apart, 1, 2, 3, 0))


@triton.jit
def slices(entries):
    """Splits ``[S, B, G]``, where ``S`` is at most 32, into a tuple of ``S`` tensors ``[1, B, G]``."""
    parts = (entries,)
    for stage in tl.static_range(5):
        if entries.shape[0] >> stage > 1:
            halves = ()
            for part in tl.static_range(1 << stage):
                halves += _halves(parts[part])
            parts = halves
    return parts


@triton.jit
def _opaque(value: tl.constexpr):
    """Returns ``value`` so that LLVM does not see a constant: for one it would replace an instruction by several."""
    return tl.program_id(1).to(tl.uint32) + value  # grids have one axis, so this adds 0


@triton.jit
def _exchange(words, DISTANCE: tl.constexpr, STAY: tl.constexpr):
    """Computes one stage of ``_transpose``, which also turns the highest bit of the slices' index into the lowest."""
    first, last = _halves(words)
    up, down, stay = last << DISTANCE, first >> DISTANCE, _opaque(STAY)
    both = tl.join((first ^ up) & stay ^ up, (last ^ down) & stay ^ last)
    return tl.reshape(tl.permute(both, 0, 3, 1, 2), words.shape)


@triton.jit
def _transpose(words):
    """Turns 16 slices of words into 16 planes: in a half, bit ``b`` of slice ``s`` becomes bit ``s`` of plane ``b``."""
    words = _exchange(words, 8, 0x00FF00FF)
    words = _exchange(words, 4, 0x0F0F0F0F)
    words = _exchange(words, 2, 0x33333333)
    return _exchange(words, 1, 0x55555555)


@triton.jit
def key_planes(entries):
    """Returns the planes of the magnitude keys of floats ``[16, BLOCKS, WIDTH]``, lowest bit first, signs last.

    These are 16 planes, for fp32 32: ``[16 or 32, BLOCKS, WIDTH / 2]``. The key of a NaN has all bits set.
    """
    mantissa: tl.constexpr = entries.dtype.fp_mantissa_width
    if mantissa == 23:
        even, odd = deinterleave(entries.to(tl.uint32, bitcast=True))
        both = tl.join(_transpose((even & 0xFFFF) | odd << 16), _transpose(even >> 16 | (odd & 0xFFFF0000)))
        planes = tl.reshape(tl.permute(both, 3, 0, 1, 2), [32, both.shape[1], both.shape[2]])
    else:
        even, odd = deinterleave(entries.to(tl.uint16, bitcast=True).to(tl.uint32))
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
    """Returns which keys are not 0, as words of a plane."""
    bits = slices(keys)
    some = bits[0]
    for bit in tl.static_range(1, keys.shape[0] - 1):
        some = some | bits[bit]
    return some


@triton.jit
def _popcount(x):
    """Counts the bits set in each word, in a form that LLVM turns into one instruction."""
    x = x - (x >> 1 & 0x55555555)
    x = (x & 0x33333333) + (x >> 2 & 0x33333333)
    return ((x + (x >> 4) & 0x0F0F0F0F) * 0x01010101 >> 24).to(tl.int32)


@triton.jit
def _halve(plane, kept, rest, need):
    """Narrows the search by one bit of the key.

    If fewer than ``need`` of the keys in ``rest`` have the bit, these are kept and the others stay in ``rest``. Else
    only those that have the bit stay.
    """
    ones = rest & plane
    count = tl.sum(_popcount(ones), 2, keep_dims=True)
    too_few = (count - need) >> 31  # all bits set, or none
    words = too_few.to(tl.uint32, bitcast=True)
    return kept | (ones & words), rest & (plane ^ words), need - (count & too_few)


@triton.jit
def keep_topk(keys, valid, k):
    """Returns the ``k`` largest valid keys of every block, as words of a plane; of equal keys, the lower index first.

    The search goes from the key's highest bit to its lowest, and then on to the bits of the index.
    """
    kept, rest = tl.zeros_like(valid), valid
    need = tl.zeros([1, valid.shape[1], 1], tl.int32) + k
    planes = slices(keys)
    for bit in tl.static_range(2, keys.shape[0] + 1):
        kept, rest, need = _halve(planes[keys.shape[0] - bit], kept, rest, need)
    for stage in tl.static_range(4):
        earlier = _opaque((0x00FF00FF, 0x0F0F0F0F, 0x33333333, 0x55555555)[stage])
        kept, rest, need = _halve(earlier, kept, rest, need)
    words: tl.constexpr = valid.shape[2]
    for stage in tl.static_range(1, 17):
        if words >> stage > 0:
            later = (tl.arange(0, words)[None, None, :] & (words >> stage)) != 0
            kept, rest, need = _halve(later.to(tl.uint32) - 1, kept, rest, need)
    kept, rest, need = _halve(_opaque(0x0000FFFF), kept, rest, need)
    return tl.where(need > 0, kept | rest, kept)


@triton.jit
def _majority(a, b, c):
    """Returns the bits that are set in at least two of three words."""
    return ((a ^ b) & (a ^ c)) ^ a


@triton.jit
def keep24(keys):
    """Returns the two largest keys of every group of four columns, by the rule of ``keep2of4``, as words of a plane."""
    k01, k23 = deinterleave(keys)
    k32 = k23 << 16 | k23 >> 16
    k02, k13 = (k01 & 0xFFFF) | k23 << 16, k01 >> 16 | (k23 & 0xFFFF0000)
    quads: tl.constexpr = [keys.shape[0], keys.shape[1], 4 * k01.shape[2]]
    more = slices(tl.reshape(tl.join(tl.join(k01, k02), tl.join(k01, k02)), quads))
    less = slices(tl.reshape(tl.join(tl.join(k23, k13), tl.join(k32, k13)) ^ 0xFFFFFFFF, quads))
    beats = tl.full([1, quads[1], quads[2]], 0xFFFFFFFF, tl.uint32)
    for bit in tl.static_range(keys.shape[0] - 1):  # from the lowest, as a higher bit that differs decides
        beats = _majority(more[bit], less[bit], beats)
    earlier, across = deinterleave(beats)
    apart, beside = deinterleave(earlier)  # 0 >= 2 and 1 >= 3, 0 >= 1 and 2 >= 3
    across, _ = deinterleave(across)  # 0 >= 3 and 1 >= 2
    first = (beside & 0xFFFF) | ((beside ^ 0xFFFFFFFF) << 16)
    last = beside >> 16 | ((beside ^ 0xFFFFFFFF) & 0xFFFF0000)
    turned = (across << 16 | across >> 16) ^ 0xFFFFFFFF
    return tl.interleave(_majority(first, apart, across), _majority(last, apart ^ 0xFFFFFFFF, turned))


@triton.jit
def pack_words(bools):
    """Packs bools ``[16, BLOCKS, WIDTH]`` into words of a plane."""
    even, odd = deinterleave(bools.to(tl.uint32))
    return tl.sum((even | odd << 16) << tl.arange(0, 16)[:, None, None], 0, keep_dims=True)


@triton.jit
def unpack_words(words):
    """Unpacks words of a plane to int32 ``[16, BLOCKS, WIDTH]``, with all bits set or none.

    Bools would need more predicate registers than there are.
    """
    word = words.to(tl.int32, bitcast=True)
    s = tl.arange(0, 16)[:, None, None]
    return tl.interleave(word << (31 - s) >> 31, word << (15 - s) >> 31)


@triton.jit
def unpack_bytes(words):
    """Unpacks words of a plane to bytes of 0 or 1, four columns in a word: uint32 ``[16, BLOCKS, WIDTH / 4]``."""
    first, last = deinterleave(words)
    low = (first & 0xFF) | (first >> 8 & 0xFF00) | (last & 0xFF) << 16 | (last << 8 & 0xFF000000)
    high = (first >> 8 & 0xFF) | (first >> 16 & 0xFF00) | (last << 8 & 0xFF0000) | (last & 0xFF000000)
    s = tl.arange(0, 16)[:, None, None]
    return tl.where(s < 8, low, high) >> (s & 7) & 0x01010101
