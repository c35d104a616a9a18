"""2:4 of 16-bit entries in units of eight: two groups side by side in the halves of words, at half the instructions."""

import triton
import triton.language as tl

from ._select import flipped, keep2of4_pairs, swap_halves
from ._tiles import pairs, quads, unpairs


@triton.jit
def _choose(kept, entry, other):
    """``entry`` in the halves whose top bit is set in ``kept``, else ``other``."""
    chosen = (kept >> 15 & 0x00010001) * 0xFFFF
    return (entry & chosen) | (other & flipped(chosen))


@triton.jit
def units(entries):
    """A tile ``[R, C]`` as the four columns of its groups, ``[R, C / 8]``: words with two groups side by side."""
    # Two entries of one load: the compiler finds the register that was loaded.
    low, high = unpairs(entries.to(tl.uint16, bitcast=True).to(tl.uint32))
    w0, w1, w2, w3 = quads(low | high << 16)
    e0, e1 = swap_halves(w0, w2)
    e2, e3 = swap_halves(w1, w3)
    return e0, e1, e2, e3


@triton.jit
def kept_entries(k0, k1, k2, k3, e0, e1, e2, e3):
    """What ``units`` keep, two entries of a group in a word, ``[R, C / 4]``; kept is where a half's top bit is set."""
    first = _choose(k0, e0, _choose(k1, e1, e2))
    last = _choose(k3, e3, _choose(k2, e2, e1))
    first_group, second_group = swap_halves(first, last)
    return pairs(first_group, second_group)


@triton.jit
def prune_units(entries):
    """What 2:4 keeps of a tile ``[R, C]``: the entries, as ``kept_entries``, and the mask.

    That is four words per unit, ``[R, C / 8]``, one for each column of a group: the top bit of a half is set where the
    column of that group is kept, the other bits mean nothing.
    """
    e0, e1, e2, e3 = units(entries)
    nan: tl.constexpr = 0x7F817F81 if entries.dtype == tl.bfloat16 else 0x7C017C01
    k0, k1, k2, k3 = keep2of4_pairs(e0, e1, e2, e3, nan)
    return kept_entries(k0, k1, k2, k3, e0, e1, e2, e3), k0, k1, k2, k3


@triton.jit
def _nibbles(b0, b1, b2, b3):
    """The top bits of halves as the low four bits of halves, ``b0`` the lowest."""
    low = (b0 >> 3 & 0x10001000) | (b1 >> 2 & 0x20002000)
    high = (b2 >> 1 & 0x40004000) | (b3 & 0x80008000)
    return (low | high) >> 12  # what the upper half leaves in the lower one is above the nibble


@triton.jit
def unit_bits(k0, k1, k2, k3):
    """The mask of two groups as a byte, uint8 ``[R, C / 8]``."""
    nibbles = _nibbles(k0, k1, k2, k3)
    return (nibbles & 15 | nibbles >> 12).to(tl.uint8)


@triton.jit
def unit_codes(k0, k1, k2, k3):
    """The metadata nibble of the two groups of each unit in the halves of a word, ``[R, C / 8]``."""
    return _nibbles(flipped(k0) & k1, flipped(k0 | k1), k3 | flipped(k2), k3 | k2) & 0x000F000F
