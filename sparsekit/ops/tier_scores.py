"""The scores that every block of a matrix would keep in each tier."""

import torch
from torch import Tensor

from ._define import define
from .blocks import block_topk_mask_reference, fit_block, sum_blocks
from .nm import nm_mask_reference
from .tiers import check_tier_arguments


def tier_scores_reference(
    weight: Tensor,
    k: int,
    block_rows: int,
    block_cols: int,
    scale: Tensor | None,
    score_scale: Tensor | None,
    squared: bool,
) -> Tensor:
    ranked = weight if scale is None else weight.abs().float() * scale
    score = weight.abs().float()
    score = score if score_scale is None else score * score_scale
    score = score * score if squared else score
    sparse24 = nm_mask_reference(ranked, 2, 4)
    topk = block_topk_mask_reference(ranked, k, block_rows, block_cols)
    kept = score, torch.where(sparse24, score, 0), torch.where(topk, score, 0)
    return torch.stack([sum_blocks(part, block_rows, block_cols) for part in kept])


def _fake(
    weight: Tensor,
    k: int,
    block_rows: int,
    block_cols: int,
    scale: Tensor | None,
    score_scale: Tensor | None,
    squared: bool,
) -> Tensor:
    shape = 3, -(-weight.shape[0] // block_rows), -(-weight.shape[1] // block_cols)
    return weight.new_empty(shape, dtype=torch.float32)


_tier_scores = define(tier_scores_reference, _fake)


@torch.no_grad()
def tier_scores(
    weight: Tensor,
    k: int,
    block: tuple[int, int] = (16, 16),
    *,
    scale: Tensor | None = None,
    score_scale: Tensor | None = None,
    squared: bool = False,
) -> Tensor:
    """Sums the score that every block of a matrix would keep in each tier, in one pass and without a mask.

    The difference of two of these sums is what a block loses when it is demoted. Without ``squared``, each sum has the
    bits of the ``scores`` that ``tier_prune`` returns when all blocks are in that tier.

    Args:
        weight: ``[rows, cols]``, float32, float16 or bfloat16, any strides.
        k: entries kept of a top-k block, ``0 <= k <= block[0] * block[1]``; 0 skips that tier, whose sums are then 0.
        block: rows and columns of a block; the columns are a multiple of 4.
        scale: float32 ``[cols]``, one factor per input column, for the choice inside a block; None ranks by magnitude.
        score_scale: float32 ``[cols]``, the factors of the scores ``abs(weight) * score_scale``; None means 1.
        squared: whether to sum the squares of the scores, which are fp32 products. With Wanda's input norms, the square
            is what dropping an entry adds to the squared error of the output, if the inputs are uncorrelated.

    Returns:
        float32 ``[3, ceil(rows / block[0]), ceil(cols / block[1])]``: what a block keeps as dense, as 2:4
        and as top-k.

    Raises:
        TypeError: a wrong dtype.
        ValueError: ``weight`` is not a matrix, a block side is not positive or its columns no multiple of 4, ``k`` is
            out of range, or ``scale`` or ``score_scale`` has the wrong shape or device.
    """
    check_tier_arguments(weight, k, block, scale=scale, score_scale=score_scale)
    return _tier_scores(weight, k, *fit_block(block, weight), scale, score_scale, squared)
