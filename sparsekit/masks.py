"""Patterns, and the masks that layers carry: stored with the layer, never guessed from its zeros."""

import re
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from .ops import block_topk_mask, nm_mask, nm_prune, pack_bits, unpack_bits
from .ops.nm import MAX_M

Axis = int | Literal["flatten"]


@dataclass(frozen=True)
class Pattern:
    """What a mask keeps: ``n`` of every ``m`` inputs, or with ``m`` None all but the share ``ratio`` of every row."""

    n: int = 0
    m: int | None = None
    ratio: float = 0.0

    @staticmethod
    def parse(text: str) -> "Pattern":
        """Reads ``"2:4"`` (keep 2 of 4; any ``0 < n <= m <= 32``) or ``"50%"`` (drop half of every output row).

        Raises:
            ValueError: anything else.
        """
        if isinstance(text, str):
            if (nm := re.fullmatch(r"(\d+):(\d+)", text)) and 0 < int(nm[1]) <= int(nm[2]) <= MAX_M:
                return Pattern(n=int(nm[1]), m=int(nm[2]))
            if (percent := re.fullmatch(r"(\d+(?:\.\d+)?)%", text)) and float(percent[1]) <= 100:
                return Pattern(ratio=float(percent[1]) / 100)
        raise ValueError(f'a pattern is "n:m" with 0 < n <= m <= {MAX_M}, or "p%" with 0 <= p <= 100, got {text!r}')

    def __str__(self) -> str:
        return f"{self.n}:{self.m}" if self.m else f"{100 * self.ratio:.12g}%"

    def mask(self, score: Tensor) -> Tensor:
        """The bool mask of a score ``[rows, ..., cols]``: n of m along the last dimension, or the best of every row."""
        if self.m:
            return nm_mask(score, self.n, self.m)
        rows = score.flatten(1)
        cols = rows.shape[1]
        dropped = int(cols * self.ratio + 1e-6)  # 0.29 * 100 is 28.999999999999996
        return block_topk_mask(rows, cols - dropped, (1, max(cols, 1))).view(score.shape)

    def prune(self, weight: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Zeroes what the pattern drops of ``weight`` ``[rows, ..., cols]`` ranked by ``abs(weight) * scale``.

        Args:
            weight: float32, float16 or bfloat16, any strides.
            scale: float32 ``[cols]``, one factor per entry of the last dimension; None ranks by magnitude.

        Returns:
            ``(pruned, mask)``, contiguous.
        """
        if self.m:
            return nm_prune(weight, self.n, self.m, scale=scale)
        mask = self.mask(weight if scale is None else weight.abs().float() * scale)
        return torch.where(mask, weight, 0).contiguous(), mask


@dataclass(frozen=True)
class MaskInfo:
    """How a stored mask came to be: its pattern, and the weight dimension (or ``"flatten"``) its groups run along.

    The dimension of the inputs: 1 for Linear and Conv2d, 0 for transformers' Conv1D; ``"flatten"`` is Conv2d's
    ``(in, height, width)`` read as one dimension.
    """

    pattern: Pattern
    axis: Axis


def grouped(weight: Tensor, axis: Axis) -> Tensor:
    """``weight`` with the group dimension last: dimension ``axis``, or all but the first for ``"flatten"``.

    A view, except for ``"flatten"`` of a weight that is not contiguous.
    """
    return weight.flatten(1) if axis == "flatten" else weight.movedim(axis, -1)


def ungrouped(groups: Tensor, axis: Axis, shape: torch.Size) -> Tensor:
    """Undoes ``grouped``: a view of ``groups`` in the weight's own shape."""
    return groups.view(shape) if axis == "flatten" else groups.movedim(-1, axis)


def set_mask(module: nn.Module, mask: Tensor, info: MaskInfo) -> None:
    """Stores the mask of ``module.weight`` as a bit-packed buffer ``weight_mask`` that no state dict contains.

    The buffer is uint8 ``[rows, ceil(weight.numel() / rows / 8)]``: the bits of ``mask.flatten(1)``.

    Raises:
        ValueError: ``mask`` is not bool, or not of the weight's shape.
    """
    weight: Tensor = module.weight  # type: ignore[assignment]
    if mask.dtype != torch.bool or mask.shape != weight.shape:
        raise ValueError(f"mask must be bool {tuple(weight.shape)}, got {mask.dtype} {tuple(mask.shape)}")
    module.register_buffer("weight_mask", pack_bits(mask.flatten(1)), persistent=False)
    module.weight_mask_info = info  # type: ignore[assignment]


def get_mask(module: nn.Module) -> Tensor | None:
    """The stored bool mask of ``module.weight``, in its shape; None where there is none."""
    bits = module._buffers.get("weight_mask")
    if bits is None:
        return None
    shape: torch.Size = module.weight.shape  # type: ignore[assignment]
    return unpack_bits(bits, shape[1:].numel()).view(shape)


def get_mask_info(module: nn.Module) -> MaskInfo | None:
    """How the stored mask came to be; None where there is none."""
    return getattr(module, "weight_mask_info", None)


def remove_mask(module: nn.Module) -> None:
    """Forgets the stored mask; the weight stays as it is."""
    if "weight_mask" in module._buffers:
        del module._buffers["weight_mask"], module.weight_mask_info
