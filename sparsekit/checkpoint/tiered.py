"""What the tensors of a tiered layer must be."""

import torch
from torch import Tensor

from ..ops import TieredWeight, unpack_bits, unpack_tiered

PARTS = tuple(name for name in TieredWeight._fields if name != "starts")  # all that is stored


def check_tiered(packed: TieredWeight, rows: int, cols: int, block: tuple[int, int], k: int) -> None:
    """Verifies that no kernel can be led outside of a weight ``[rows, cols]``, in addition to what its parts say.

    Raises:
        ValueError: it is not what ``pack_tiered`` returns.
    """
    found = packed.topk.shape[1]
    if packed.block != block or found != k or k > block[0] * block[1]:
        raise ValueError(f"blocks of {packed.block} and k={found} in a layer of {block} and k={k}")
    groups = unpack_bits(packed.bitmask.flatten(0, 1), block[1]).unflatten(1, (block[1] // 4, 4))
    if not (groups.sum(-1) == 2).all():
        raise ValueError("bitmask does not keep exactly two of every four columns")
    if not _ascending(packed.positions, packed.topk):
        raise ValueError("positions do not ascend to a padding of zeros")
    if not _within(packed, rows, cols):
        raise ValueError("entries lie outside of the weight")


def _ascending(positions: Tensor, topk: Tensor) -> bool:
    """Whether every row of positions rises, and ends in zeros that stand for nothing."""
    first, later = positions[:, :-1], positions[:, 1:]
    padding = later == 0
    rises = padding | (later > first)
    ends = ~padding[:, :-1] | padding[:, 1:]
    return bool(rises.all()) and bool(ends.all()) and not bool((topk[:, 1:][padding] != 0).any())


def _within(packed: TieredWeight, rows: int, cols: int) -> bool:
    """Whether the padding of the last blocks is empty."""
    sizes = [side * count for side, count in zip(packed.block, packed.tiers.shape, strict=True)]
    if sizes == [rows, cols]:
        return True
    padded = unpack_tiered(packed._replace(topk=torch.ones_like(packed.topk)), *sizes)
    return not bool((padded[rows:] != 0).any()) and not bool((padded[:, cols:] != 0).any())
