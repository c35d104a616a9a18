"""A 2:4 weight in row pairs: where two rows keep the same input, its product shares each load of it."""

import torch
from torch import Tensor

from ._define import define, linear_fp32
from .bits import unpack_bits
from .sparse24 import pack24_reference, unpack24_reference, values_per_row

INPUTS = 48  # of a tile
UNIT = 64  # of an offset

# The bytes: the start of every block of rows as int64, and the end; then, block by block and tile by tile, the pairs
# that `match_row_pairs24` found. A pair is four int16 (first row, second row, number of shared inputs, zero), the
# offsets of the shared inputs, the offsets of the others as (first row's, second row's), and all weights as (first
# row's, second row's) in the same order. An offset is the number of the input in its tile, times 64, as uint16. An odd
# row has a partner with weights of zero, whose number is that of the row after the last one.


def block_height(rows: int) -> int:
    """Returns the rows of a block: at most 256, a multiple of 16, for an even number of blocks where possible."""
    return 16 * -(-rows // (32 * max(1, -(-rows // 512))))


def block_count(rows: int) -> int:
    """Returns the number of blocks of rows."""
    return -(-rows // max(1, block_height(rows)))


def match_row_pairs24_reference(bitmask: Tensor, cols: int) -> Tensor:
    kept, pairs = unpack_bits(bitmask, cols), _match_fake(bitmask, cols).zero_()
    for block, rows in enumerate(kept.split(max(1, block_height(len(kept))))):
        for tile, part in enumerate(rows.split(INPUTS, 1) if cols else ()):
            shared = (part.double() @ part.double().t()).triu(1) - torch.ones(len(part), len(part)).tril()
            free = torch.ones(len(part), dtype=torch.bool)
            for pair in range(len(part) // 2):  # the two that share most; of those the lowest first, then second row
                first, second = divmod(int(shared.argmax()), len(part))
                count = int(shared[first, second])
                pairs[block, tile, pair] = torch.tensor([first, second, count // 2 * 2])
                for row in (first, second):
                    shared[row], shared[:, row], free[row] = -1, -1, False
            if free.any():  # an odd row is left alone
                count = values_per_row(part.shape[1])
                pairs[block, tile, len(part) // 2] = torch.tensor([int(free.nonzero()), len(part), count // 2 * 2])
    return pairs


def _match_fake(bitmask: Tensor, cols: int) -> Tensor:
    rows = bitmask.shape[0]
    return bitmask.new_empty(block_count(rows), -(-cols // INPUTS), block_height(rows) // 2, 3, dtype=torch.int16)


def pair_starts(pairs: Tensor, rows: int, cols: int, itemsize: int) -> Tensor:
    """Returns where every block of rows begins, and the end, as int64 ``[blocks + 1]``."""
    blocks, tiles, most, _ = pairs.shape
    kept = sum(values_per_row(min(INPUTS, cols - INPUTS * tile)) for tile in range(tiles))
    counts = [-(-min(2 * most, rows - 2 * most * block) // 2) for block in range(blocks)]
    shared = pairs[..., 2].sum((1, 2), dtype=torch.int64)  # those that are not there share nothing
    nbytes = shared.new_tensor(counts) * (8 * tiles + (4 + 2 * itemsize) * kept) - 2 * shared
    return 8 * (blocks + 1) + torch.cat([nbytes.new_zeros(1), nbytes.cumsum(0)])


def arrange_row_pairs24_reference(
    values: Tensor, bitmask: Tensor, pairs: Tensor, starts: Tensor, cols: int, nbytes: int
) -> Tensor:
    rows, height, parts = len(values), 2 * pairs.shape[2], [starts.view(torch.uint8)]
    kept, dense = unpack_bits(bitmask, cols), unpack24_reference(values, bitmask, cols)
    for block, tile, pair in torch.cartesian_prod(*map(torch.arange, pairs.shape[:3])).tolist():
        if 2 * pair >= min(height, rows - block * height):
            continue
        first, second, count = pairs[block, tile, pair].tolist()
        none = second >= min(height, rows - block * height)
        columns = slice(tile * INPUTS, (tile + 1) * INPUTS)
        both = [block * height + row for row in (first, first if none else second)]
        masks, weights = kept[both, columns], dense[both, columns]
        if none:
            weights[1] = 0
        shared = masks.all(0).nonzero()[:count, 0]
        masks[:, shared] = False
        rest = torch.stack([mask.nonzero()[:, 0] for mask in masks], 1)
        inputs = torch.cat([torch.stack([shared, shared], 1), rest])
        head = torch.tensor([first, second, count, 0])
        numbers = torch.cat([head, shared * UNIT, rest.flatten() * UNIT]).to(torch.int16)
        parts += [numbers.view(torch.uint8), weights.t()[inputs, torch.arange(2)].flatten().view(torch.uint8)]
    return torch.cat(parts)


def restore_row_pairs24_reference(data: Tensor, rows: int, cols: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    blocks, height, at = block_count(rows), block_height(rows), 0
    dense, kept = torch.zeros(rows, cols, dtype=dtype), torch.zeros(rows, cols, dtype=torch.bool)

    def take(count: int, kind: torch.dtype) -> Tensor:
        nonlocal at
        begin, at = at, at + count * kind.itemsize
        return data[begin:at].clone().view(kind)

    take(blocks + 1, torch.int64)
    for block in range(blocks):
        size = min(height, rows - block * height)
        for tile in range(-(-cols // INPUTS)):
            count = values_per_row(min(INPUTS, cols - INPUTS * tile))
            for _ in range(-(-size // 2)):
                first, second, shared, _ = take(4, torch.int16).tolist()
                same = take(shared, torch.int16)
                inputs = torch.cat([torch.stack([same, same], 1), take(2 * (count - shared), torch.int16).view(-1, 2)])
                columns, weights = tile * INPUTS + inputs.long() // UNIT, take(2 * count, dtype).view(-1, 2)
                for i, row in enumerate((first, second)):
                    if row < size:
                        dense[block * height + row, columns[:, i]] = weights[:, i]
                        kept[block * height + row, columns[:, i]] = True
    return pack24_reference(dense, kept, False)


def linear_row_pairs24_reference(x: Tensor, data: Tensor, bias: Tensor | None, rows: int) -> Tensor:
    weight = unpack24_reference(*restore_row_pairs24_reference(data, rows, x.shape[-1], x.dtype), x.shape[-1])
    return linear_fp32(x, weight, bias)


def _linear_fake(x: Tensor, data: Tensor, bias: Tensor | None, rows: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], rows)


def _restore_fake(data: Tensor, rows: int, cols: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    values = data.new_empty(rows, values_per_row(cols), dtype=dtype)
    return values, data.new_empty(rows, -(-cols // 8))


_match = define(match_row_pairs24_reference, _match_fake)
_arrange = define(
    arrange_row_pairs24_reference,
    lambda values, bitmask, pairs, starts, cols, nbytes: bitmask.new_empty(nbytes),
)
_restore = define(restore_row_pairs24_reference, _restore_fake)
_linear = define(linear_row_pairs24_reference, _linear_fake)
