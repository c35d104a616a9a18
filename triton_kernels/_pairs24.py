"""2:4 of 16-bit entries, two groups at a time: the halves of a word belong to neighboring groups.

One instruction on a word then serves two groups. Eight columns, or two groups, are a unit.
"""

import triton
import triton.language as tl

from ._select import flipped, keep2of4_pairs, swap_halves
from ._tiles import deinterleave, interleave, split_groups


@triton.jit
def _choose(kept, entry, other):
    """Takes ``entry`` in the halves whose top bit is set in ``kept``, and ``other`` in the rest."""
    chosen = (kept >> 15 & 0x00010001) * 0xFFFF
    return (entry & chosen) | (other & flipped(chosen))


@triton.jit
def units(entries):
    """Returns the four entries of the groups of a tile ``[R, C]``: words ``[R, C / 8]`` that hold two groups each."""
    # The entries were loaded as one word, so the compiler turns this into a use of the loaded register.
    low, high = deinterleave(entries.to(tl.uint16, bitcast=True).to(tl.uint32))
    w0, w1, w2, w3 = split_groups(low | high << 16)
    e0, e1 = swap_halves(w0, w2)
    e2, e3 = swap_halves(w1, w3)
    return e0, e1, e2, e3


@triton.jit
def kept_entries(k0, k1, k2, k3, e0, e1, e2, e3):
    """Returns the two kept entries of each group in a word, ``[R, C / 4]``, in the order of the groups.

    ``k0`` to ``k3`` tell by the top bit of a half whether the entry of ``e0`` to ``e3`` in this half is kept.
    """
    first = _choose(k0, e0, _choose(k1, e1, e2))
    last = _choose(k3, e3, _choose(k2, e2, e1))
    first_group, second_group = swap_halves(first, last)
    return interleave(first_group, second_group)


@triton.jit
def prune_units(entries):
    """Prunes a tile ``[R, C]`` to 2:4 and returns the kept entries, as ``kept_entries`` does, and the mask.

    The mask is one word ``[R, C / 8]`` for each of the four columns of a group. The top bit of a half is set where this
    group keeps the column; the other bits are undefined.
    """
    e0, e1, e2, e3 = units(entries)
    nan: tl.constexpr = 0x7F817F81 if entries.dtype == tl.bfloat16 else 0x7C017C01
    k0, k1, k2, k3 = keep2of4_pairs(e0, e1, e2, e3, nan)
    return kept_entries(k0, k1, k2, k3, e0, e1, e2, e3), k0, k1, k2, k3


@triton.jit
def _nibbles(b0, b1, b2, b3):
    """Gathers the top bits of the halves of four words in the low nibbles of the halves of one; ``b0`` is lowest."""
    low = (b0 >> 3 & 0x10001000) | (b1 >> 2 & 0x20002000)
    high = (b2 >> 1 & 0x40004000) | (b3 & 0x80008000)
    return (low | high) >> 12  # bits of the upper half that move into the lower one land above its nibble


@triton.jit
def unit_bits(k0, k1, k2, k3):
    """Returns the mask bits of a unit as a byte: uint8 ``[R, C / 8]``."""
    nibbles = _nibbles(k0, k1, k2, k3)
    return (nibbles & 15 | nibbles >> 12).to(tl.uint8)


@triton.jit
def unit_codes(k0, k1, k2, k3):
    """Returns the metadata nibbles of the two groups of each unit, in the halves of a word: ``[R, C / 8]``."""
    return _nibbles(flipped(k0) & k1, flipped(k0 | k1), k3 | flipped(k2), k3 | k2) & 0x000F000F
