"""The inner loop of SparseGPT, which drops weights column by column and updates the later columns to compensate."""

import torch
from torch import Tensor

from ._define import check_ints, check_like, define
from .nm import check_pattern, nm_mask_reference


def sparsegpt_columns_reference(
    weight: Tensor, factor: Tensor, mask: Tensor | None, n: int, m: int
) -> tuple[Tensor, Tensor, Tensor]:
    updated, error = weight.clone(), torch.zeros_like(weight)
    kept = torch.ones_like(weight, dtype=torch.bool) if mask is None else mask.clone()
    scale = factor.diagonal()
    for col in range(weight.shape[1]):
        group = slice(col, min(col + m, weight.shape[1]))
        if mask is None and col % m == 0:
            kept[:, group] = nm_mask_reference(updated[:, group] / scale[group], n, m)
        error[:, col] = torch.where(kept[:, col], 0, updated[:, col] / scale[col])
        updated[:, col:] -= torch.outer(error[:, col], factor[col, col:])
    return torch.where(kept, updated, 0), error, kept


def _fake(weight: Tensor, factor: Tensor, mask: Tensor | None, n: int, m: int) -> tuple[Tensor, Tensor, Tensor]:
    return weight.new_empty(weight.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape).bool()


_sparsegpt_columns = define(sparsegpt_columns_reference, _fake)


@torch.no_grad()
def sparsegpt_columns(
    weight: Tensor, factor: Tensor, *, mask: Tensor | None = None, n: int = 2, m: int = 4
) -> tuple[Tensor, Tensor, Tensor]:
    """Prunes consecutive columns from left to right, and updates the weights to the right of each dropped one.

    A dropped weight ``w`` in column ``j`` leaves the error ``e = w / factor[j, j]``, and ``e * factor[j, j:]`` is
    subtracted from the rest of its row. Without a mask, a group of ``m`` columns keeps the ``n`` entries with the
    largest ``abs(w / factor[j, j])`` once the columns before the group are done, with the order and ties of
    ``nm_mask``; a tail shorter than ``m`` is kept. (SparseGPT, https://arxiv.org/abs/2301.00774)

    Args:
        weight: float32 ``[rows, cols]``.
        factor: float32 ``[cols, cols]``, the part of the upper Cholesky factor ``U`` that belongs to these columns; the
            inverse of the second moments is ``U^T U``.
        mask: bool ``[rows, cols]``, True where kept; None chooses ``n`` of every ``m``.
        n: entries kept of each group.
        m: group size; ``0 < n <= m <= 32``.

    Returns:
        ``(pruned, error, mask)``: the updated weights with zeros where dropped; the errors, by which the caller updates
        the columns after these (``rest -= error @ U[columns, rest]``); and the bool mask of what was kept.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device or pattern.
    """
    check_like("weight", weight, torch.float32, weight.shape, weight)
    if weight.dim() != 2:
        raise ValueError(f"weight must have 2 dimensions, got shape {tuple(weight.shape)}")
    check_like("factor", factor, torch.float32, (weight.shape[1], weight.shape[1]), weight)
    if mask is not None:
        check_like("mask", mask, torch.bool, weight.shape, weight)
    check_ints(n=n, m=m)
    check_pattern(n, m)
    return _sparsegpt_columns(weight, factor, mask, n, m)
