"""2:4 masks in both directions: a weight that is pruned with one is 2:4, and so is its transpose."""

from itertools import combinations, product

import torch
from torch import Tensor

from ._define import check_weight, define
from .nm import nm_mask_reference

PAIRS = tuple(combinations(range(4), 2))
# The 4x4 tiles with two kept in every row and every column, each as the pair of every row, in lexicographic order.
PATTERNS = tuple(
    rows
    for rows in product(range(len(PAIRS)), repeat=4)
    if all(sum(column in PAIRS[pair] for pair in rows) == 2 for column in range(4))
)


def tile_masks(device: torch.device) -> Tensor:
    """Returns every pattern as the mask of a tile: bool ``[90, 4, 4]``."""
    kept = [[[column in PAIRS[pair] for column in range(4)] for pair in rows] for rows in PATTERNS]
    return torch.tensor(kept, device=device)


def transposable_mask24_reference(score: Tensor) -> Tensor:
    rows, cols = (size // 4 * 4 for size in score.shape)
    mask = torch.ones(score.shape, dtype=torch.bool, device=score.device)
    mask[rows:, :cols] = nm_mask_reference(score[rows:, :cols], 2, 4)
    mask[:rows, cols:] = nm_mask_reference(score[:rows, cols:].t(), 2, 4).t()
    magnitude = score[:rows, :cols].float().abs().nan_to_num(nan=torch.inf, posinf=torch.inf)
    tiles = magnitude.unflatten(1, (cols // 4, 4)).unflatten(0, (rows // 4, 4)).transpose(1, 2)  # [R, C, row, column]
    lower, upper = zip(*PAIRS, strict=True)
    pair_sums = tiles[..., lower] + tiles[..., upper]  # [R, C, row, pair]
    pair = list(zip(*PATTERNS, strict=True))
    top = pair_sums[..., 0, pair[0]] + pair_sums[..., 1, pair[1]]  # [R, C, pattern]
    bottom = pair_sums[..., 2, pair[2]] + pair_sums[..., 3, pair[3]]
    best = tile_masks(score.device)[(top + bottom).argmax(-1)]
    mask[:rows, :cols] = best.transpose(1, 2).flatten(2, 3).flatten(0, 1)
    return mask


def _mask_fake(score: Tensor) -> Tensor:
    return score.new_empty(score.shape, dtype=torch.bool)


_transposable_mask24 = define(transposable_mask24_reference, _mask_fake)


def transposable_mask24(score: Tensor) -> Tensor:
    """Marks two entries of each row and of each column of every 4x4 tile, so that their magnitudes sum to the most.

    A weight pruned with this mask is 2:4 and so is its transpose: the forward and the backward pass of a linear layer
    can both use the sparse tensor cores.

    All 90 such patterns of a tile are compared, by the float32 sum of what they keep: the two entries of each row are
    added, lower column first, then (row 0 + row 1) + (row 2 + row 3). NaN counts as Inf. Ties keep the earlier pattern:
    patterns are ordered by the kept columns of row 0, then of row 1, 2 and 3, where pairs of columns have the order
    (0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3). The mask is the same, bit for bit, on every device.

    Args:
        score: ``[rows, cols]``, float32, float16 or bfloat16, any strides; the sign does not matter. Rows past the
            last full tile are 2:4 along the columns, and columns past it are 2:4 along the rows, as in ``nm_mask``; the
            corner that is past both is kept.

    Returns:
        bool mask of ``score``'s shape, contiguous, True where kept.

    Raises:
        TypeError: ``score`` is not one of the dtypes above.
        ValueError: ``score`` is not two-dimensional.

    Source: Hubara et al. state the problem and approximate its solution, https://arxiv.org/abs/2102.08124.
    """
    check_weight("score", score, dim=2)
    return _transposable_mask24(score)
