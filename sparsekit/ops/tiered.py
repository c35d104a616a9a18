"""The tiered format: a matrix whose blocks are stored dense, as 2:4 or as their few kept entries."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._define import call_op, check_ints, check_like, check_weight, no_autocast
from .bits import nonzero, unpack_bits
from .blocks import block_scores, check_block, check_kept, split_blocks
from .nm import nm_mask
from .sparse24 import _pack24, _unpack24
from .tiers import DENSE, SPARSE24, TOPK


class TieredWeight(NamedTuple):
    """A matrix of ``R x C`` blocks, zero-padded to whole ones, each in the form that its tier names.

    The blocks of a form lie in row-major order of the map. ``dense``, ``values`` and ``topk`` have the dtype of the
    weight.

    Attributes:
        tiers: uint8 ``[R, C]``: 0 dense, 1 2:4, 2 top-k.
        dense: ``[n_dense, block_rows, block_cols]``.
        values: ``[n_24, block_rows, block_cols / 2]``, as ``pack24`` returns them for every row of the block.
        bitmask: uint8 ``[n_24, block_rows, block_cols / 8]``: two bits are set in every group of four.
        topk: ``[n_topk, k]``: what the block keeps.
        positions: ``[n_topk, k]``, row-major in the block and ascending: uint8 where a block has at most 256 entries,
            else int16. A block that keeps fewer than ``k`` is padded with value 0 at position 0.
        starts: int32 ``[R + 1, 3]``: how many blocks of each form come before each row of blocks; ``from_parts``
            derives it from ``tiers``.
    """

    tiers: Tensor
    dense: Tensor
    values: Tensor
    bitmask: Tensor
    topk: Tensor
    positions: Tensor
    starts: Tensor

    @classmethod
    def from_parts(
        cls, tiers: Tensor, dense: Tensor, values: Tensor, bitmask: Tensor, topk: Tensor, positions: Tensor
    ) -> "TieredWeight":
        """Joins tensors that were stored, checks that they belong together, and adds what is derived from them.

        Raises:
            TypeError: a wrong dtype, or ``tiers`` is no matrix.
            ValueError: wrong shapes, two devices, a tier above 2, counts of blocks that are not those of ``tiers``, or
                positions outside a block.
        """
        if not isinstance(tiers, Tensor) or tiers.dim() != 2:
            raise TypeError(f"tiers must be a matrix, got {tiers!r:.60}")
        check_like("tiers", tiers, torch.uint8, tiers.shape, tiers)  # not every dtype can be counted
        packed = cls(tiers, dense, values, bitmask, topk, positions, block_starts(tiers))
        check_packed(packed)
        counts, held = packed.starts[-1].tolist(), [len(dense), len(values), len(topk)]
        if tiers.numel() and int(tiers.max()) > TOPK:
            raise ValueError(f"tiers must be 0, 1 or 2, got {int(tiers.max())}")
        if counts != held:
            raise ValueError(f"tiers names {counts} blocks that are dense, 2:4 and top-k, but {held} are stored")
        size = packed.block[0] * packed.block[1]
        if positions.numel() and not (0 <= int(positions.min()) and int(positions.max()) < size):
            raise ValueError(f"positions must be below {size}, got {int(positions.min())} to {int(positions.max())}")
        return packed

    @property
    def block(self) -> tuple[int, int]:
        """Rows and columns of a block."""
        return self.dense.shape[1], self.dense.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of everything that is stored."""
        return sum(part.nbytes for part in self)


def block_starts(tiers: Tensor) -> Tensor:
    """How many blocks of each form come before each row of blocks of a map: int32 ``[R + 1, 3]``."""
    forms = torch.arange(3, dtype=torch.uint8, device=tiers.device)
    counts = (tiers.unsqueeze(-1) == forms).sum(1)
    return F.pad(counts.cumsum(0), (0, 0, 1, 0)).to(torch.int32)


def smallest_tiers(kept: Tensor, block: tuple[int, int], k: int) -> Tensor:
    """The tier of every block of a bool mask ``[rows, cols]``, uint8 ``[R, C]``: the smallest form that holds it."""
    kept = F.pad(kept, (0, -kept.shape[1] % 4)).float()  # nm_mask keeps a tail whole, of which 2:4 holds two
    crowded = block_scores(kept.masked_fill(nm_mask(kept, 2, 4), 0), block) > 0
    few = block_scores(kept, block) <= k
    return torch.where(few, TOPK, torch.where(crowded, DENSE, SPARSE24)).to(torch.uint8)


def to_blocks(matrix: Tensor, block: tuple[int, int]) -> Tensor:
    """``[rows, cols]`` to ``[R * C, block_rows, block_cols]``, padded with zeros at the right and the bottom."""
    return split_blocks(matrix, *block).transpose(1, 2).flatten(0, 1)


def order_of(packed: TieredWeight) -> tuple[Tensor, Tensor, Tensor]:
    """Where the blocks of each form lie in the map: of lengths that a graph knows without looking at ``tiers``."""
    order = packed.tiers.flatten().argsort(stable=True)
    dense, sparse24, topk = order.split([len(packed.dense), len(packed.values), len(packed.topk)])
    return dense, sparse24, topk


def _spread(topk: Tensor, positions: Tensor, size: int) -> Tensor:
    """``[n_topk, size]`` with every value at its position, the sign of a zero too; padding takes no gradient."""
    stored = (positions != 0) | (topk != 0)
    first = torch.arange(topk.shape[1], device=topk.device) == 0  # positions ascend: behind it, 0 is padding
    target = torch.where(stored | first, positions.long(), size)
    values = torch.where(stored, topk, topk.detach())
    return topk.new_zeros(len(topk), size + 1).scatter(1, target, values)[:, :size]


def unpack_blocks(packed: TieredWeight, rows: int, cols: int) -> Tensor:
    tiers, dense, values, bitmask, topk, positions, _ = packed
    block_rows, block_cols = packed.block
    sparse24 = call_op(_unpack24, values.flatten(0, 1), bitmask.flatten(0, 1), block_cols)
    few = _spread(topk, positions, block_rows * block_cols)
    shape = tiers.numel(), block_rows, block_cols
    forms = torch.cat([dense.flatten(), sparse24.flatten(), few.flatten()]).view(shape)
    blocks = torch.empty_like(forms).index_copy(0, torch.cat(order_of(packed)), forms)
    whole = blocks.view(*tiers.shape, block_rows, block_cols).transpose(1, 2).flatten(2).flatten(0, 1)
    return whole[:rows, :cols].contiguous()


def pack_tiered(
    weight: Tensor, mask: Tensor | None = None, *, k: int = 10, block: tuple[int, int] = (16, 16)
) -> TieredWeight:
    """Packs any weight without loss: every block takes the smallest form that holds what it keeps.

    A block that keeps at most ``k`` entries becomes top-k; else, where every four consecutive columns keep at most two,
    2:4; else dense. At shares of .35, .45 and .20 an fp32 weight takes 0.60 of its dense bytes, a 16-bit weight 0.62.

    Args:
        weight: ``[rows, cols]``, float32, float16 or bfloat16, any strides. Differentiable.
        mask: bool ``[rows, cols]``, what is kept; what it drops is not stored. None keeps the non-zeros.
        k: entries that a block of top-k holds, ``0 <= k <= block[0] * block[1]``; 10 of 256 is what the three-tier
            pruner keeps.
        block: rows and columns of a block, 8 to 128 each, the columns a multiple of 8. Edges are padded with zeros.

    Returns:
        The packed weight. How many blocks have which form depends on the data, so ``torch.compile`` cannot trace this.

    Raises:
        TypeError: a wrong dtype.
        ValueError: ``weight`` is no matrix or on the meta device, ``mask`` has the wrong shape or device, or ``k`` or
            ``block`` is out of range.
    """
    check_weight("weight", weight, 2)
    if weight.is_meta:
        raise ValueError("weight is on the meta device and has no data to pack")
    if mask is not None:
        check_like("mask", mask, torch.bool, weight.shape, weight)
    _check_block(block)
    check_kept(k, block)
    with no_autocast(weight):
        if mask is None:
            return _pack(weight, nonzero(weight), k, block)
        return _pack(torch.where(mask, weight, 0), mask, k, block)


def _pack(weight: Tensor, mask: Tensor, k: int, block: tuple[int, int]) -> TieredWeight:
    tiers = smallest_tiers(mask, block, k)
    kept, blocks = to_blocks(mask, block), to_blocks(weight, block)
    dense, sparse24, few = ((tiers.flatten() == tier).nonzero().squeeze(1) for tier in (DENSE, SPARSE24, TOPK))

    _, bits = _pack24(kept[sparse24].to(weight.dtype).flatten(0, 1), None, False)  # completes to two of every four
    values, bitmask = _pack24(blocks[sparse24].flatten(0, 1), unpack_bits(bits, block[1]), False)
    count = kept[few].sum((1, 2))
    which, position = kept[few].flatten(1).nonzero(as_tuple=True)
    slot = torch.arange(len(which), device=weight.device) - (count.cumsum(0) - count)[which]
    positions = which.new_zeros(len(few), k).index_put((which, slot), position)
    stored = torch.arange(k, device=weight.device) < count.unsqueeze(1)
    return TieredWeight(
        tiers,
        blocks[dense],
        values.view(len(sparse24), block[0], block[1] // 2),
        bitmask.view(len(sparse24), block[0], block[1] // 8),
        torch.where(stored, blocks[few].flatten(1).gather(1, positions), 0),
        positions.to(_position_dtype(block)),
        block_starts(tiers),
    )


def unpack_tiered(packed: TieredWeight, rows: int, cols: int) -> Tensor:
    """Rebuilds the dense weight that ``pack_tiered`` packed, with zeros where nothing was kept.

    Args:
        packed: the packed weight. Differentiable in ``dense``, ``values`` and ``topk``.
        rows: rows of the dense weight.
        cols: columns of the dense weight.

    Returns:
        ``[rows, cols]`` in the dtype of ``packed.dense``, contiguous.

    Raises:
        TypeError: a wrong dtype.
        ValueError: shapes that do not belong together or to ``rows`` and ``cols``, or two devices.
    """
    check_ints(rows=rows, cols=cols)
    check_packed(packed)
    check_size(packed, rows, cols)
    with no_autocast(packed.dense):
        return unpack_blocks(packed, rows, cols)


def _position_dtype(block: tuple[int, int]) -> torch.dtype:
    return torch.uint8 if block[0] * block[1] <= 256 else torch.int16


def _check_block(block: tuple[int, int]) -> None:
    check_block(block)
    if not all(8 <= side <= 128 for side in block) or block[1] % 8:
        raise ValueError(f"block must have sides of 8 to 128 and columns a multiple of 8, got {tuple(block)}")


def check_packed(packed: TieredWeight) -> None:
    if not isinstance(packed, TieredWeight):
        raise TypeError(f"packed must be a TieredWeight, got {type(packed).__name__}")
    tiers, dense, values, bitmask, topk, positions, starts = packed
    for name, part, dim in (("dense", dense, 3), ("values", values, 3), ("topk", topk, 2)):
        check_weight(name, part, dim)
        check_like(name, part, dense.dtype, part.shape, dense)
    rows, cols = packed.block
    _check_block((rows, cols))
    check_like("values", values, dense.dtype, (len(values), rows, cols // 2), dense)
    check_like("bitmask", bitmask, torch.uint8, (len(values), rows, cols // 8), dense)
    check_like("positions", positions, _position_dtype((rows, cols)), topk.shape, dense)
    count = len(dense) + len(values) + len(topk)
    if not isinstance(tiers, Tensor) or tiers.dim() != 2 or tiers.numel() != count:
        raise ValueError(f"tiers must be a map of the {count} blocks that are stored, got {tiers!r:.60}")
    check_like("tiers", tiers, torch.uint8, tiers.shape, dense)
    check_like("starts", starts, torch.int32, (tiers.shape[0] + 1, 3), dense)


def check_size(packed: TieredWeight, rows: int, cols: int) -> None:
    shape = -(-rows // packed.block[0]), -(-cols // packed.block[1])
    if min(rows, cols) < 0 or packed.tiers.shape != shape:
        raise ValueError(
            f"tiers must have shape {shape} for a weight of {rows} x {cols} in blocks of {packed.block}, got "
            f"{tuple(packed.tiers.shape)}"
        )
