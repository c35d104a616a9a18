"""Unpacking of 2:4 weights in registers, 16 columns at a time: four words of two values each, and 16 mask bits."""

import triton
import triton.language as tl


@triton.jit
def permute_bytes(low, high, selector, TARGET: tl.constexpr):
    """Picks four bytes of the eight of ``high:low``: byte i is the one whose number is in nibble i of ``selector``."""
    if TARGET == "nvidia":
        return tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [low, high, selector], dtype=tl.int32, is_pure=True, pack=1
        )
    spread = selector & 0xFFFF
    spread = (spread | (spread << 8)) & 0x00FF00FF
    spread = (spread | (spread << 4)) & 0x0F0F0F0F  # a nibble per byte
    if TARGET == "amd":
        return tl.inline_asm_elementwise(
            "v_perm_b32 $0, $1, $2, $3", "=v,v,v,v", [high, low, spread], dtype=tl.int32, is_pure=True, pack=1
        )
    both = (high.to(tl.int64) << 32) | (low.to(tl.int64) & 0xFFFFFFFF)
    byte0 = (both >> ((spread & 7) * 8)) & 0xFF
    byte1 = (both >> (((spread >> 8) & 7) * 8)) & 0xFF
    byte2 = (both >> (((spread >> 16) & 7) * 8)) & 0xFF
    byte3 = (both >> (((spread >> 24) & 7) * 8)) & 0xFF
    return (byte0 | (byte1 << 8) | (byte2 << 16) | (byte3 << 24)).to(tl.int32)


@triton.jit
def selectors(bits, TARGET: tl.constexpr):
    """Returns selectors for ``permute_bytes`` that find each of a group's four entries; byte g belongs to group g.

    A byte is 0x10 for the first value of the group's word, 0x32 for the second and 0x44 for zero. Each is looked up in
    a table of eight bytes by the first three mask bits of the group. They imply the fourth, as two of four are set.
    """
    index = bits & 0x7777
    often = tl.full(index.shape, 0x10441044, tl.int32)
    entry0 = permute_bytes(often, often, index, TARGET)
    mixed = tl.full(index.shape, 0x32104444, tl.int32)
    entry1 = permute_bytes(mixed, mixed, index, TARGET)
    zero, late = tl.full(index.shape, 0x44444444, tl.int32), tl.full(index.shape, 0x32323210, tl.int32)
    entry2 = permute_bytes(zero, late, index, TARGET)
    one, two = tl.full(index.shape, 0x44323244, tl.int32), tl.full(index.shape, 0x44444432, tl.int32)
    entry3 = permute_bytes(one, two, index, TARGET)
    return entry0, entry1, entry2, entry3


@triton.jit
def decode(word, entry0, entry1, entry2, entry3, GROUP: tl.constexpr, TARGET: tl.constexpr):
    """Returns the four entries of group ``GROUP`` as two words, from its word of values and its ``selectors``."""
    which = tl.full(word.shape, GROUP | (4 + GROUP) << 4, tl.int32)
    zero = tl.full(word.shape, 0, tl.int32)
    front = permute_bytes(word, zero, permute_bytes(entry0, entry1, which, TARGET), TARGET)
    back = permute_bytes(word, zero, permute_bytes(entry2, entry3, which, TARGET), TARGET)
    return front, back


@triton.jit
def load_words(row, index, stride, keep, ALIGNED: tl.constexpr, EVICT: tl.constexpr):
    """Loads word ``index``, which is two neighboring 16-bit entries, of the rows that start at ``row``."""
    if ALIGNED:
        return tl.load(row.to(tl.pointer_type(tl.int32)) + index, keep, 0, eviction_policy=EVICT)
    entry = row.to(tl.pointer_type(tl.int16)) + 2 * index.to(tl.int64) * stride
    low, high = tl.load(entry, keep, 0), tl.load(entry + stride, keep, 0)
    return (low.to(tl.int32) & 0xFFFF) | (high.to(tl.int32) << 16)


@triton.jit
def load_bits(row, index, stride, count, keep, ALIGNED: tl.constexpr):
    """Loads the mask bits of the 16 columns ``index`` of the rows that start at ``row``, of ``count`` bytes each."""
    if ALIGNED:
        # A thread needs the bits of its own words only, which are two bytes: the hint keeps the load from being wider.
        return tl.load(tl.multiple_of(row.to(tl.pointer_type(tl.int16)) + index, [2, 2]), keep, 0).to(tl.int32)
    byte = row + 2 * index.to(tl.int64) * stride
    high = tl.load(byte + stride, keep & (2 * index + 1 < count), 0)
    return tl.load(byte, keep, 0).to(tl.int32) | (high.to(tl.int32) << 8)


@triton.jit
def split_words(words, WARPS: tl.constexpr):
    """Splits words ``[8 * WARPS * blocks, 16]`` into the four of each thread, ``[blocks, WARPS, 8, 4]`` each."""
    even, odd = tl.split(tl.reshape(words, words.shape[0] // (8 * WARPS), WARPS, 8, 4, 2, 2))
    word0, word2 = tl.split(even)
    word1, word3 = tl.split(odd)
    return word0, word1, word2, word3


@triton.jit
def operand(front, back, DTYPE: tl.constexpr):
    """Returns groups of two words, ``[blocks, warps, 8, 4]`` each, as a matrix ``[8 * blocks, 16]`` for every warp.

    No data moves between threads: this is the layout of an operand of ``mma.m16n8k16``, where eight rows of four
    threads hold four neighboring entries each.
    """
    low = tl.join(front.to(tl.int16).to(DTYPE, bitcast=True), back.to(tl.int16).to(DTYPE, bitcast=True))
    front, back = front >> 16, back >> 16
    high = tl.join(front.to(tl.int16).to(DTYPE, bitcast=True), back.to(tl.int16).to(DTYPE, bitcast=True))
    entries = tl.permute(tl.join(low, high), (1, 0, 2, 3, 4, 5))
    return tl.reshape(entries, entries.shape[0], 8 * entries.shape[1], 16)
