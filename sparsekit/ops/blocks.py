"""Scores and masks over the blocks that tile a matrix."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ._define import check_ints, check_like, check_weight, define
from .nm import magnitude_key


def split_blocks(matrix: Tensor, block_rows: int, block_cols: int, fill: float = 0) -> Tensor:
    """Views ``[rows, cols]``, padded at the right and bottom with ``fill``, as ``[R, block_rows, C, block_cols]``."""
    rows, cols = matrix.shape
    padded = F.pad(matrix, (0, -cols % block_cols, 0, -rows % block_rows), value=fill)
    return padded.view(-(-rows // block_rows), block_rows, -(-cols // block_cols), block_cols)


def block_scores_reference(
    weight: Tensor, block_rows: int, block_cols: int, scale: Tensor | None, mask: Tensor | None
) -> Tensor:
    score = weight.abs().float()
    score = score if scale is None else score * scale
    return sum_blocks(score if mask is None else torch.where(mask, score, 0), block_rows, block_cols)


def sum_blocks(score: Tensor, block_rows: int, block_cols: int) -> Tensor:
    """Sums every block of an fp32 matrix, in the order of additions that ``block_scores`` documents."""
    rows, cols = -(-score.shape[0] // block_rows), -(-score.shape[1] // block_cols)
    if rows * cols == 0:
        return score.new_zeros((rows, cols))
    blocks = split_blocks(score, block_rows, block_cols)
    total = blocks[:, 0]
    for row in range(1, block_rows):  # rows one after the other
        total = total + blocks[:, row]
    width = 1 << (block_cols - 1).bit_length()
    total = F.pad(total, (0, width - block_cols))
    while width > 1:  # then column c and column c + width / 2
        width //= 2
        total = total[..., :width] + total[..., width:]
    return total.squeeze(-1)


def block_topk_mask_reference(score: Tensor, k: int, block_rows: int, block_cols: int) -> Tensor:
    rows, cols = score.shape
    if score.numel() == 0:
        return torch.zeros(rows, cols, dtype=torch.bool, device=score.device)
    blocks = split_blocks(magnitude_key(score), block_rows, block_cols, -1)
    key = blocks.transpose(1, 2)  # [R, C, block_rows, block_cols]
    kept = key.flatten(2).sort(dim=-1, descending=True, stable=True).indices[..., :k]
    mask = torch.zeros_like(key.flatten(2), dtype=torch.bool).scatter_(-1, kept, True).view_as(key)
    return mask.transpose(1, 2).flatten(2).flatten(0, 1)[:rows, :cols].contiguous()


def _scores_fake(weight: Tensor, block_rows: int, block_cols: int, scale: Tensor | None, mask: Tensor | None) -> Tensor:
    shape = -(-weight.shape[0] // block_rows), -(-weight.shape[1] // block_cols)
    return weight.new_empty(shape, dtype=torch.float32)


def _topk_fake(score: Tensor, k: int, block_rows: int, block_cols: int) -> Tensor:
    return score.new_empty(score.shape, dtype=torch.bool)


_block_scores = define(block_scores_reference, _scores_fake)
_block_topk_mask = define(block_topk_mask_reference, _topk_fake)


@torch.no_grad()
def block_scores(
    weight: Tensor, block: tuple[int, int] = (16, 16), *, scale: Tensor | None = None, mask: Tensor | None = None
) -> Tensor:
    """Sums ``abs(weight) * scale`` over every block of a matrix.

    Blocks at the right and bottom edges count as if padded with zeros. The order of the fp32 additions is fixed, so
    every device gives the same bits: the rows of a block are added one after the other, column by column; then, with
    the columns padded to a power of two, the right half is added to the left half until one sum is left.

    Args:
        weight: ``[rows, cols]``, float32, float16 or bfloat16, any strides.
        block: rows and columns of a block; 16x16 is what the three-tier pruner uses.
        scale: float32 ``[cols]``, one factor per input column; None means 1.
        mask: bool ``[rows, cols]``; only the entries where it is True count. None counts all.

    Returns:
        float32 ``[ceil(rows / block[0]), ceil(cols / block[1])]``.

    Raises:
        TypeError: a wrong dtype.
        ValueError: ``weight`` is not a matrix, a block side is not positive, or ``scale`` or ``mask`` has the wrong
            shape or device.
    """
    check_weight("weight", weight, 2)
    check_block(block)
    if scale is not None:
        check_like("scale", scale, torch.float32, weight.shape[-1:], weight)
    if mask is not None:
        check_like("mask", mask, torch.bool, weight.shape, weight)
    return _block_scores(weight, *fit_block(block, weight), scale, mask)


def block_topk_mask(score: Tensor, k: int, block: tuple[int, int] = (16, 16)) -> Tensor:
    """Marks the ``k`` largest magnitudes of every block of a matrix.

    Order and ties are ``nm_mask``'s, with the lower index counted along the rows of the block. A block at the edge
    that has fewer than ``k`` entries keeps them all. A block of ``(1, cols)`` is top-k per row.

    Args:
        score: ``[rows, cols]``, float32, float16 or bfloat16, any strides; the sign does not matter.
        k: entries kept per block, ``0 <= k <= block[0] * block[1]``.
        block: rows and columns of a block.

    Returns:
        bool ``[rows, cols]``, contiguous, True where kept.

    Raises:
        TypeError: ``score`` is not one of the dtypes above.
        ValueError: ``score`` is not a matrix, a block side is not positive, or ``k`` is out of range.
    """
    check_weight("score", score, 2)
    check_block(block)
    check_kept(k, block)
    return _block_topk_mask(score, k, *fit_block(block, score))


def check_block(block: tuple[int, int]) -> None:
    if not isinstance(block, tuple | list) or not all(isinstance(side, int) for side in block):
        raise TypeError(f"block must be two ints (rows, cols), got {block!r}")
    if len(block) != 2 or min(block) < 1:
        raise ValueError(f"block must be two positive sides (rows, cols), got {tuple(block)}")


def fit_block(block: tuple[int, int], matrix: Tensor) -> tuple[int, int]:
    """Returns a block that gives the same result, and is not much larger than the matrix, for which kernels allocate.

    The smaller block covers the matrix and enough zeros beyond it that the fp32 sums are added in the same order.
    """
    rows, cols = matrix.shape
    return (block[0] if block[0] <= rows + 1 else rows + 1), (block[1] if block[1] <= 4 * cols + 4 else 4 * cols + 4)


def check_kept(k: int, block: tuple[int, int]) -> None:
    check_ints(k=k)
    if not 0 <= k <= block[0] * block[1]:
        raise ValueError(f"k must be between 0 and {block[0] * block[1]} for a block of {tuple(block)}, got {k}")
