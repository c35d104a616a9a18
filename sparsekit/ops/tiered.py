"""The tiered format: a weight whose blocks are stored dense, as 2:4, or as at most k kept entries."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._define import call_op, check_like, check_weight, no_autocast
from .bits import nonzero, unpack_bits
from .blocks import block_scores, check_block, check_kept, split_blocks
from .nm import nm_mask
from .sparse24 import _pack24, _unpack24
from .tiers import DENSE, SPARSE24, TOPK


class TieredWeight(NamedTuple):
    """A weight in ``R x C`` blocks, each stored in the form that its tier names.

    Blocks at the edges are padded with zeros. The blocks of one form are stored row by row. ``dense``, ``values`` and
    ``topk`` have the dtype of the weight. The tensors are plain ones: ``deepcopy``, ``torch.compile`` and pytrees see
    them.

    Attributes:
        tiers: uint8 ``[R, C]``: 0 dense, 1 2:4, 2 top-k.
        dense: ``[n_dense, block_rows, block_cols]``.
        values: ``[n_24, block_rows, block_cols / 2]``, as ``Packed24`` has them for every row of the block.
        bitmask: uint8 ``[n_24, block_rows, block_cols / 8]``: two bits are set in every group of four.
        topk: ``[n_topk, k]``: the kept entries of a block.
        positions: ``[n_topk, k]``: their positions in the block, row-major and ascending; uint8 if a block has at most
            256 entries, else int16. A block that keeps fewer than ``k`` is padded with value 0 at position 0.
        starts: int32 ``[R + 1, 3]``: how many blocks of each form come before each row of blocks; ``from_parts``
            computes it from ``tiers``.
        shape: rows and columns of the dense weight, without the padding.
    """

    tiers: Tensor
    dense: Tensor
    values: Tensor
    bitmask: Tensor
    topk: Tensor
    positions: Tensor
    starts: Tensor
    shape: tuple[int, int]

    @classmethod
    def from_parts(
        cls,
        tiers: Tensor,
        dense: Tensor,
        values: Tensor,
        bitmask: Tensor,
        topk: Tensor,
        positions: Tensor,
        shape: tuple[int, int],
    ) -> "TieredWeight":
        """Builds a packed weight from stored tensors, checks that they belong together, and computes ``starts``.

        Raises:
            TypeError: a wrong dtype, or ``tiers`` is not a matrix.
            ValueError: wrong shapes, two devices, a tier above 2, numbers of blocks that are not those of ``tiers``, or
                positions outside a block.
        """
        if not isinstance(tiers, Tensor) or tiers.dim() != 2:
            raise TypeError(f"tiers must be a matrix, got {tiers!r:.60}")
        check_like("tiers", tiers, torch.uint8, tiers.shape, tiers)  # block_starts cannot count every dtype
        packed = cls(tiers, dense, values, bitmask, topk, positions, block_starts(tiers), shape)
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
        """The rows and columns of a block."""
        return self.dense.shape[1], self.dense.shape[2]

    @property
    def nbytes(self) -> int:
        """The bytes of the tensors."""
        return sum(part.nbytes for part in self.tensors)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors, in the order of the fields."""
        *tensors, _ = self
        return tuple(tensors)

    def to(self, device: torch.device | str) -> "TieredWeight":
        """Returns a copy of the weight on a device, or the same tensors if they are there."""
        tiers, dense, values, bitmask, topk, positions, starts = (each.to(device) for each in self.tensors)
        return TieredWeight(tiers, dense, values, bitmask, topk, positions, starts, self.shape)

    def to_dense(self) -> Tensor:
        """Rebuilds the dense weight, with zeros where nothing was kept.

        Differentiable in ``dense``, ``values`` and ``topk``.

        Returns:
            ``[rows, cols]`` in the dtype of ``dense``, contiguous.

        Raises:
            TypeError: a wrong dtype.
            ValueError: tensors whose shapes do not belong together or to ``shape``, or two devices.
        """
        check_packed(self)
        with no_autocast(self.dense):
            return unpack_blocks(self)


def block_starts(tiers: Tensor) -> Tensor:
    """Counts the blocks of each form that come before each row of blocks: int32 ``[R + 1, 3]``."""
    forms = torch.arange(3, dtype=torch.uint8, device=tiers.device)
    counts = (tiers.unsqueeze(-1) == forms).sum(1)
    return F.pad(counts.cumsum(0), (0, 0, 1, 0)).to(torch.int32)


def smallest_tiers(kept: Tensor, block: tuple[int, int], k: int) -> Tensor:
    """Returns the tier of the smallest form for each block of a bool mask ``[rows, cols]``: uint8 ``[R, C]``."""
    kept = F.pad(kept, (0, -kept.shape[1] % 4)).float()  # nm_mask keeps a whole tail, but 2:4 stores only two of it
    crowded = block_scores(kept.masked_fill(nm_mask(kept, 2, 4), 0), block) > 0
    fits_topk = block_scores(kept, block) <= k
    return torch.where(fits_topk, TOPK, torch.where(crowded, DENSE, SPARSE24)).to(torch.uint8)


def to_blocks(matrix: Tensor, block: tuple[int, int]) -> Tensor:
    """Splits ``[rows, cols]`` into ``[R * C, block_rows, block_cols]``, padded with zeros at the right and bottom."""
    return split_blocks(matrix, *block).transpose(1, 2).flatten(0, 1)


def order_of(packed: TieredWeight) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the indices of the dense, the 2:4 and the top-k blocks among all blocks, row by row.

    The lengths come from the stored tensors, so that ``torch.compile`` knows them without reading ``tiers``.
    """
    order = packed.tiers.flatten().argsort(stable=True)
    dense, sparse24, topk = order.split([len(packed.dense), len(packed.values), len(packed.topk)])
    return dense, sparse24, topk


def _spread(topk: Tensor, positions: Tensor, size: int) -> Tensor:
    """Writes the entries of top-k blocks, also -0.0, to their places in ``[n_topk, size]``; padding has no gradient."""
    stored = (positions != 0) | (topk != 0)
    first = torch.arange(topk.shape[1], device=topk.device) == 0  # positions ascend: elsewhere, 0 is padding
    target = torch.where(stored | first, positions.long(), size)
    values = torch.where(stored, topk, topk.detach())
    return topk.new_zeros(len(topk), size + 1).scatter(1, target, values)[:, :size]


def unpack_blocks(packed: TieredWeight) -> Tensor:
    """Rebuilds the dense weight as ``TieredWeight.to_dense`` does, without checks."""
    tiers, dense, values, bitmask, topk, positions, _, (rows, cols) = packed
    block_rows, block_cols = packed.block
    sparse24 = call_op(_unpack24, values.flatten(0, 1), bitmask.flatten(0, 1), block_cols)
    topk_blocks = _spread(topk, positions, block_rows * block_cols)
    shape = tiers.numel(), block_rows, block_cols
    forms = torch.cat([dense.flatten(), sparse24.flatten(), topk_blocks.flatten()]).view(shape)
    blocks = torch.empty_like(forms).index_copy(0, torch.cat(order_of(packed)), forms)
    whole = blocks.view(*tiers.shape, block_rows, block_cols).transpose(1, 2).flatten(2).flatten(0, 1)
    return whole[:rows, :cols].contiguous()


def pack_tiered(
    weight: Tensor, mask: Tensor | None = None, *, k: int = 10, block: tuple[int, int] = (16, 16)
) -> TieredWeight:
    """Packs any weight without loss: each block is stored in the smallest form that holds what it keeps.

    A block that keeps at most ``k`` entries becomes top-k; one that keeps at most two of every four consecutive columns
    becomes 2:4; any other is dense. With 35 % of the blocks dense, 45 % 2:4 and 20 % top-k, an fp32 weight takes 0.60
    of its dense bytes, a 16-bit weight 0.62.

    Args:
        weight: ``[rows, cols]``, float32, float16 or bfloat16, any strides. Differentiable.
        mask: bool ``[rows, cols]``, True where kept; entries that it drops are not stored. None keeps the non-zeros.
        k: entries that a top-k block holds, ``0 <= k <= block[0] * block[1]``; the three-tier pruner keeps 10 of 256.
        block: rows and columns of a block, 8 to 128 each, the columns a multiple of 8. Edges are padded with zeros.

    Returns:
        The packed weight; ``packed.to_dense()`` rebuilds the dense one. The number of blocks of each form depends on
        the data, so ``torch.compile`` cannot trace this function.

    Raises:
        TypeError: a wrong dtype.
        ValueError: ``weight`` is not a matrix or is on the meta device, ``mask`` has the wrong shape or device, or
            ``k`` or ``block`` is out of range.
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
    dense, sparse24, topk = ((tiers.flatten() == tier).nonzero().squeeze(1) for tier in (DENSE, SPARSE24, TOPK))

    _, bits = _pack24(kept[sparse24].to(weight.dtype).flatten(0, 1), None, False)  # completes each group to two entries
    values, bitmask = _pack24(blocks[sparse24].flatten(0, 1), unpack_bits(bits, block[1]), False)
    count = kept[topk].sum((1, 2))
    which, position = kept[topk].flatten(1).nonzero(as_tuple=True)
    slot = torch.arange(len(which), device=weight.device) - (count.cumsum(0) - count)[which]
    positions = which.new_zeros(len(topk), k).index_put((which, slot), position)
    stored = torch.arange(k, device=weight.device) < count.unsqueeze(1)
    return TieredWeight(
        tiers,
        blocks[dense],
        values.view(len(sparse24), block[0], block[1] // 2),
        bitmask.view(len(sparse24), block[0], block[1] // 8),
        torch.where(stored, blocks[topk].flatten(1).gather(1, positions), 0),
        positions.to(_position_dtype(block)),
        block_starts(tiers),
        (weight.shape[0], weight.shape[1]),
    )


def _position_dtype(block: tuple[int, int]) -> torch.dtype:
    return torch.uint8 if block[0] * block[1] <= 256 else torch.int16


def _check_block(block: tuple[int, int]) -> None:
    check_block(block)
    if not all(8 <= side <= 128 for side in block) or block[1] % 8:
        raise ValueError(f"block must have sides of 8 to 128 and columns a multiple of 8, got {tuple(block)}")


def check_packed(packed: TieredWeight) -> None:
    """Rejects anything but a ``TieredWeight`` whose tensors belong together and to its shape; reads no data."""
    if not isinstance(packed, TieredWeight):
        raise TypeError(f"packed must be a TieredWeight, got {type(packed).__name__}")
    tiers, dense, values, bitmask, topk, positions, starts, shape = packed
    if len(shape) != 2:
        raise ValueError(f"packed.shape must be rows and columns, got {tuple(shape)}")
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
    grid = -(-shape[0] // rows), -(-shape[1] // cols)
    if min(shape) < 0 or tiers.shape != grid:
        raise ValueError(
            f"tiers must have shape {grid} for a weight of {shape[0]} x {shape[1]} in blocks of {packed.block}, got "
            f"{tuple(tiers.shape)}"
        )
