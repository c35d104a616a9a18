"""Rows of which tokens are masked, with all numbers of masked tokens evenly among them."""

import torch
from torch import Tensor

from ._row_random import row_seeds, row_uniforms
from .absorbing import check_tokens


def masked_batches(
    rows: Tensor, mask_token: int, *, batch_size: int = 16, seed: int = 0
) -> list[tuple[Tensor, Tensor]]:
    """Returns batches on which a model of masked tokens is calibrated, with the mask ratios that it meets in use.

    Of ``n`` rows, row ``i`` has a ratio from ``i / n`` to ``(i + 1) / n`` of its tokens masked. Masked and plain text
    excite other inputs of a layer, so that what is dropped for plain text alone is not what can be spared::

        sk.prune_(model, sk.SparseGPT("2:4"), sk.diffusion.masked_batches(rows, model.mask_token))

    Args:
        rows: int64 ``[rows, length]`` without the mask token.
        mask_token: the number of the mask token.
        batch_size: the number of rows in a batch.
        seed: what is drawn from; on every device the same tokens are masked.

    Returns:
        Tuples of the tokens with masks, and which are masked, bool like the tokens: the arguments of a model.

    Raises:
        ValueError: an argument is out of range, or rows contain the mask token.
    """
    check_tokens(rows, mask_token)
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    part = torch.arange(len(rows), device=rows.device)
    free = torch.ones_like(rows, dtype=torch.bool)
    masked = mask_evenly(row_seeds([seed], rows.device), free, part, part, len(rows))
    return [*zip(rows.masked_fill(masked, mask_token).split(batch_size), masked.split(batch_size), strict=True)]


def mask_evenly(key: Tensor, free: Tensor, streams: Tensor, part: Tensor, parts: int) -> Tensor:
    """Draws which free tokens are masked, at least one in each row: a share of them that lies in a part of 0 to 1.

    Args:
        key: the seed, int64 ``[1]``.
        free: which tokens can be masked, bool ``[rows, length]``.
        streams: what each row is drawn from, int64 ``[rows]``.
        part: which part the share of each row lies in, int64 ``[rows]``.
        parts: the number of equal parts.
    """
    uniforms = row_uniforms(key.expand(len(free)), free.shape[1], streams)
    count = free.sum(1)
    k = ((part + uniforms[:, 0, 1]) / parts * count).long().clamp(max=count - 1) + 1
    keys = uniforms[..., 0].masked_fill(~free, 2)  # behind all others
    return keys.argsort(1).argsort(1) < k[:, None]
