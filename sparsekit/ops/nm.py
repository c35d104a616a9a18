"""N:M masks: keep the n largest magnitudes of every m consecutive entries."""

import torch
from torch import Tensor

from ._define import check_ints, check_like, check_weight, define, define_gradient
from .bits import pack_bits

MAX_M = 32


def magnitude_key(score: Tensor) -> Tensor:
    """Returns int32 keys in the order of magnitude: fp32 bits without the sign. All NaNs share one key, above Inf."""
    bits = score.float().view(torch.int32) & 0x7FFFFFFF
    return bits.clamp(max=0x7F800001)


def nm_mask_reference(score: Tensor, n: int, m: int) -> Tensor:
    full = score.shape[-1] // m * m
    key = magnitude_key(score[..., :full]).unflatten(-1, (full // m, m))
    kept = key.sort(dim=-1, descending=True, stable=True).indices[..., :n]
    mask = torch.ones(score.shape, dtype=torch.bool, device=score.device)
    mask[..., :full] = torch.zeros_like(key, dtype=torch.bool).scatter_(-1, kept, True).flatten(-2)
    return mask


def nm_mask_bits_reference(score: Tensor, n: int, m: int) -> Tensor:
    return pack_bits(nm_mask_reference(score, n, m))


def nm_prune_reference(weight: Tensor, n: int, m: int, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    mask = nm_mask_reference(weight if scale is None else weight.abs().float() * scale, n, m)
    return torch.where(mask, weight, 0).contiguous(), mask


def nm_prune_inplace_reference(weight: Tensor, n: int, m: int, scale: Tensor | None) -> Tensor:
    pruned, mask = nm_prune_reference(weight, n, m, scale)
    weight.copy_(pruned)
    return mask


def _mask_fake(score: Tensor, n: int, m: int, scale: Tensor | None = None) -> Tensor:
    return score.new_empty(score.shape, dtype=torch.bool)


def _bits_fake(score: Tensor, n: int, m: int) -> Tensor:
    return score.new_empty((*score.shape[:-1], (score.shape[-1] + 7) // 8), dtype=torch.uint8)


def _prune_fake(weight: Tensor, n: int, m: int, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    return weight.new_empty(weight.shape), _mask_fake(weight, n, m)


_nm_mask = define(nm_mask_reference, _mask_fake)
_nm_mask_bits = define(nm_mask_bits_reference, _bits_fake)
_nm_prune = define(nm_prune_reference, _prune_fake)
_nm_prune_ = define(nm_prune_inplace_reference, _mask_fake, mutates=("weight",))


def _save_mask(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])


def _prune_backward(ctx, grad, _):  # type: ignore[no-untyped-def]
    (mask,) = ctx.saved_tensors
    return torch.where(mask, grad, 0), None, None, None


define_gradient(_nm_prune, _save_mask, _prune_backward)


def nm_mask(score: Tensor, n: int, m: int) -> Tensor:
    """Marks the ``n`` largest magnitudes of every ``m`` consecutive entries of the last dimension.

    Equal magnitudes keep the lower index, ``-0.0`` equals ``0.0``, NaNs rank above Inf and equal each other. A tail
    shorter than ``m`` is kept. The mask is the same, bit for bit, on every device.

    Args:
        score: ``[..., cols]``, float32, float16 or bfloat16, any strides; the sign does not matter.
        n: entries kept of each group.
        m: group size; ``0 < n <= m <= 32``.

    Returns:
        bool mask of ``score``'s shape, contiguous, True where kept.

    Raises:
        TypeError: ``score`` is not one of the dtypes above.
        ValueError: ``score`` is a scalar, or not ``0 < n <= m <= 32``.
    """
    check_weight("score", score)
    check_pattern(n, m)
    return _nm_mask(score, n, m)


def nm_mask_bits(score: Tensor, n: int, m: int) -> Tensor:
    """Marks what ``nm_mask`` marks, but as bits, in one pass: an eighth of the memory of the bool mask.

    Args:
        score: ``[..., cols]``, float32, float16 or bfloat16, any strides; the sign does not matter.
        n: entries kept of each group.
        m: group size; ``0 < n <= m <= 32``.

    Returns:
        uint8 ``[..., ceil(cols / 8)]``, contiguous: eight columns to a byte, the first in the lowest bit, set where
        kept; bits past the last column are 0. ``sparsekit.ops.unpack_bits`` gives the bool mask back.

    Raises:
        TypeError, ValueError: as ``nm_mask``.
    """
    check_weight("score", score)
    check_pattern(n, m)
    return _nm_mask_bits(score, n, m)


def nm_prune(weight: Tensor, n: int, m: int, *, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Zeroes all but the ``n`` best of every ``m`` consecutive entries, in one pass that never stores the score.

    Entries are ranked by ``abs(weight) * scale``, one fp32 product, with the order and ties of ``nm_mask``. With
    Wanda's input norms as ``scale`` this is Wanda (https://arxiv.org/abs/2306.11695); without it, magnitude pruning.

    Args:
        weight: ``[..., cols]``, float32, float16 or bfloat16, any strides. Gradients pass where the mask is True.
        n: entries kept of each group.
        m: group size; ``0 < n <= m <= 32``.
        scale: float32 ``[cols]``, one factor per input column; None ranks by magnitude alone.

    Returns:
        ``(pruned, mask)``: a copy of ``weight`` with zeros where dropped, and the bool mask, both contiguous.

    Raises:
        TypeError, ValueError: as ``nm_mask``, and where ``scale`` is not float32 ``[cols]`` on ``weight``'s device.
    """
    check_weight("weight", weight)
    check_pattern(n, m)
    if scale is not None:
        check_like("scale", scale, torch.float32, weight.shape[-1:], weight)
    return _nm_prune(weight, n, m, scale)


@torch.no_grad()
def nm_prune_(weight: Tensor, n: int, m: int, *, scale: Tensor | None = None) -> Tensor:
    """Writes the zeros of ``nm_prune`` into ``weight`` itself and returns the mask.

    Runs outside autograd, as ``torch.nn.init`` does, so a Parameter can be given as it is.

    Args:
        weight: ``[..., cols]``, float32, float16 or bfloat16, any strides without overlap.
        n: entries kept of each group.
        m: group size; ``0 < n <= m <= 32``.
        scale: float32 ``[cols]``, one factor per input column; None ranks by magnitude alone.

    Returns:
        bool mask of ``weight``'s shape, contiguous.

    Raises:
        TypeError, ValueError: as ``nm_prune``; ``weight`` is untouched then.
    """
    check_weight("weight", weight)
    check_pattern(n, m)
    if scale is not None:
        check_like("scale", scale, torch.float32, weight.shape[-1:], weight)
    return _nm_prune_(weight, n, m, scale)


def check_pattern(n: int, m: int) -> None:
    check_ints(n=n, m=m)
    if not 0 < n <= m <= MAX_M:
        raise ValueError(f"a pattern n:m needs 0 < n <= m <= {MAX_M}, got {n}:{m}")
