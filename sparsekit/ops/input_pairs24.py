"""A 2:4 weight in input pairs: its product multiplies both kept values of a group by one instruction."""

import torch
from torch import Tensor

from ._define import define, linear_fp32
from .bits import unpack_bits
from .row_pairs24 import UNIT, _linear_fake, _restore_fake, block_count, block_height
from .sparse24 import pack24_reference, unpack24_reference

ENTRIES = 16  # of a tile
PATTERNS = ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))

# An entry is two kept values of a group; a tail of less than a group gives one entry or two, the last of which may have
# a weight of zero. The bytes are, block by block of rows, tile by tile of 16 entries, and row by row: the two weights
# of each entry, then for each, as uint16, (6 * entry of the tile + pattern) * 64. Entries and rows are filled up with
# zeros to multiples of four.


def _entries(cols: int) -> int:
    return -(-(cols // 4 + (cols % 4 + 1) // 2) // 4) * 4


def _stored_rows(rows: int, block: int) -> int:
    return -(-min(block_height(rows), rows - block * block_height(rows)) // 4) * 4


def input_pairs_nbytes(rows: int, cols: int, itemsize: int) -> int:
    """Returns the bytes of a weight in input pairs."""
    return sum(_stored_rows(rows, block) for block in range(block_count(rows))) * _entries(cols) * (2 * itemsize + 2)


def arrange_input_pairs24_reference(values: Tensor, bitmask: Tensor, cols: int, nbytes: int) -> Tensor:
    (rows, stored), full, entries = values.shape, cols // 4, _entries(cols)
    height, count = block_height(rows), sum(_stored_rows(rows, block) for block in range(block_count(rows)))
    weights = values.new_zeros(count, 2 * entries)
    weights[:rows, :stored] = values
    pattern = torch.zeros(count, entries, dtype=torch.int64)
    groups = unpack_bits(bitmask, cols)[:, : 4 * full].view(rows, full, 4)
    for number, (first, second) in enumerate(PATTERNS):
        pattern[:rows, :full][groups[..., first] & groups[..., second]] = number
    offsets = ((torch.arange(entries) % ENTRIES * len(PATTERNS) + pattern) * UNIT).to(torch.int16)
    parts = []
    for block_weights, block_offsets in zip(weights.split(max(1, height)), offsets.split(max(1, height)), strict=True):
        for pair in zip(block_weights.split(2 * ENTRIES, 1), block_offsets.split(ENTRIES, 1), strict=True):
            parts.append(torch.cat([each.contiguous().view(torch.uint8) for each in pair], 1).flatten())
    return torch.cat([bitmask.new_empty(0), *parts])


def restore_input_pairs24_reference(data: Tensor, rows: int, cols: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    full, entries, at = cols // 4, _entries(cols), 0
    dense, kept = torch.zeros(rows, 4 * entries + 4, dtype=dtype), torch.zeros(rows, 4 * entries + 4, dtype=torch.bool)
    first_input = torch.arange(entries) * 4
    first_input[full + 1 :] -= 2  # the second entry of a tail
    for block in range(block_count(rows)):
        begin, size = block * block_height(rows), _stored_rows(rows, block)
        for entry in range(0, entries, ENTRIES):
            count = min(ENTRIES, entries - entry)
            width = count * (2 * dtype.itemsize + 2)
            part = data[at : at + size * width].view(size, width)[: rows - begin]
            at += size * width
            weights = part[:, : -2 * count].contiguous().view(dtype).view(len(part), count, 2)
            pattern = part[:, -2 * count :].contiguous().view(torch.int16).long() // UNIT % len(PATTERNS)
            columns = first_input[entry : entry + count, None] + torch.tensor(PATTERNS)[pattern]
            for row in range(min(len(part), rows - begin)):
                dense[begin + row, columns[row]] = weights[row]
                kept[begin + row, columns[row]] = True
    return pack24_reference(dense[:, :cols], kept[:, :cols], False)


def linear_input_pairs24_reference(x: Tensor, data: Tensor, bias: Tensor | None, rows: int) -> Tensor:
    weight = unpack24_reference(*restore_input_pairs24_reference(data, rows, x.shape[-1], x.dtype), x.shape[-1])
    return linear_fp32(x, weight, bias)


_arrange = define(arrange_input_pairs24_reference, lambda values, bitmask, cols, nbytes: bitmask.new_empty(nbytes))
_restore = define(restore_input_pairs24_reference, _restore_fake)
_linear = define(linear_input_pairs24_reference, _linear_fake)
