"""Tiers: every block of a matrix is dense, 2:4 or top-k."""

import torch
from torch import Tensor

from ._define import check_like, check_weight, define, define_gradient
from .bits import nonzero
from .blocks import block_scores_reference, block_topk_mask_reference, check_block, check_kept, fit_block
from .nm import nm_mask_reference

DENSE, SPARSE24, TOPK = 0, 1, 2


def tier_prune_reference(
    weight: Tensor,
    tiers: Tensor,
    k: int,
    block_rows: int,
    block_cols: int,
    scale: Tensor | None,
    score_scale: Tensor | None,
    nested: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, cols = weight.shape
    score = weight if scale is None else weight.abs().float() * scale
    tier = tiers.repeat_interleave(block_rows, 0)[:rows].repeat_interleave(block_cols, 1)[:, :cols]
    sparse24 = nm_mask_reference(score, 2, 4)
    if nested:
        left = torch.where(sparse24, score, 0)
        topk = block_topk_mask_reference(left, k, block_rows, block_cols) & nonzero(left)
    else:
        topk = block_topk_mask_reference(score, k, block_rows, block_cols)
    mask = torch.where(tier == SPARSE24, sparse24, topk) | (tier == DENSE)
    scores = block_scores_reference(weight, block_rows, block_cols, score_scale, mask)
    return torch.where(mask, weight, 0).contiguous(), mask.contiguous(), scores


def _tier_prune_fake(
    weight: Tensor,
    tiers: Tensor,
    k: int,
    block_rows: int,
    block_cols: int,
    scale: Tensor | None,
    score_scale: Tensor | None,
    nested: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    pruned, mask = weight.new_empty(weight.shape), weight.new_empty(weight.shape, dtype=torch.bool)
    return pruned, mask, weight.new_empty(tiers.shape, dtype=torch.float32)


_tier_prune = define(tier_prune_reference, _tier_prune_fake)


def _save_mask(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _, mask, scores = output
    ctx.save_for_backward(mask)
    ctx.mark_non_differentiable(mask, scores)


def _prune_backward(ctx, grad, _mask, _scores):  # type: ignore[no-untyped-def]
    (mask,) = ctx.saved_tensors
    return torch.where(mask, grad, 0), None, None, None, None, None, None, None


define_gradient(_tier_prune, _save_mask, _prune_backward)


def tier_prune(
    weight: Tensor,
    tiers: Tensor,
    k: int,
    block: tuple[int, int] = (16, 16),
    *,
    scale: Tensor | None = None,
    score_scale: Tensor | None = None,
    nested: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Prunes every block of a matrix by its tier, and scores what is left of it, in one pass.

    A block of tier 0 stays dense. A block of tier 1 keeps the 2 best of every 4 consecutive columns, as ``nm_prune``
    does. A block of any higher tier keeps its ``k`` best entries, as ``block_topk_mask`` does. Entries are ranked by
    ``abs(weight) * scale``, one fp32 product, with the order and ties of ``nm_mask``.

    The scores, which decide which blocks are demoted next, are those of ``block_scores(weight, block,
    scale=score_scale, mask=mask)``, bit for bit.

    Args:
        weight: ``[rows, cols]``, float32, float16 or bfloat16, any strides. Gradients of ``pruned`` pass where the mask
            is True; the mask and the scores have none.
        tiers: uint8 ``[ceil(rows / block[0]), ceil(cols / block[1])]``: 0 is dense, 1 is 2:4, 2 and above are top-k.
        k: entries kept of a top-k block, ``0 <= k <= block[0] * block[1]``; a block at the edge that has fewer
            keeps them all.
        block: rows and columns of a block; the columns are a multiple of 4, so that no group of 2:4 spans two blocks.
            16x16 is what the three-tier pruner uses.
        scale: float32 ``[cols]``, one factor per input column, for the choice inside a block; None ranks by magnitude.
        score_scale: float32 ``[cols]``, the factors of the scores; None means 1. With ``scale`` None and Wanda's input
            norms here, blocks are chosen by Wanda's score and entries by magnitude, as the three-tier pruner does.
        nested: whether a top-k block keeps only entries that 2:4 would keep and that are not 0, as in the three-tier
            pruner, whose blocks are 2:4 before they become top-k.

    Returns:
        ``(pruned, mask, scores)``: a copy of ``weight`` with zeros where dropped, and the bool mask, both contiguous;
        float32 scores of ``tiers``'s shape.

    Raises:
        TypeError: a wrong dtype.
        ValueError: ``weight`` is not a matrix, a block side is not positive or its columns no multiple of 4, ``k`` is
            out of range, or ``tiers``, ``scale`` or ``score_scale`` has the wrong shape or device.
    """
    check_tier_arguments(weight, k, block, scale=scale, score_scale=score_scale)
    rows, cols = block
    shape = -(-weight.shape[0] // rows), -(-weight.shape[1] // cols)
    check_like("tiers", tiers, torch.uint8, shape, weight)
    return _tier_prune(weight, tiers, k, *fit_block(block, weight), scale, score_scale, nested)


def check_tier_arguments(weight: Tensor, k: int, block: tuple[int, int], **scales: Tensor | None) -> None:
    check_weight("weight", weight, 2)
    check_block(block)
    if block[1] % 4:
        raise ValueError(f"the columns of block must be a multiple of 4, got {tuple(block)}")
    check_kept(k, block)
    for name, factors in scales.items():
        if factors is not None:
            check_like(name, factors, torch.float32, weight.shape[-1:], weight)
