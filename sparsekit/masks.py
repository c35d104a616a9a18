"""Patterns, and the masks that layers carry: stored with the layer, never guessed from its zeros."""

import re
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from .ops import block_topk_mask, nm_mask, pack_bits, unpack_bits
from .ops.nm import MAX_M

Axis = int | Literal["flatten"]


@dataclass(frozen=True)
class Pattern:
    """What a mask keeps: ``n`` of every ``m`` inputs, or where ``m`` is None the share ``ratio`` dropped per output row."""

    n: int = 0
    m: int | None = None
    ratio: float = 0.0

    @staticmethod
    def parse(text: str) -> "Pattern":
        """Reads ``"2:4"`` (keep 2 of 4; any ``0 < n <= m <= 32``) or ``"50%"`` (drop half of every output row).

        Raises:
            ValueError: anything else.
        """
        if (nm := re.fullmatch(r"(\d+):(\d+)", text)) and 0 < int(nm[1]) <= int(nm[2]) <= MAX_M:
            return Pattern(n=int(nm[1]), m=int(nm[2]))
        if (percent := re.fullmatch(r"(\d+(?:\.\d+)?)%", text)) and float(percent[1]) <= 100:
            return Pattern(ratio=float(percent[1]) / 100)
        raise ValueError(f'a pattern is "n:m" with 0 < n <= m <= {MAX_M}, or "p%" with 0 <= p <= 100, got {text!r}')

    def __str__(self) -> str:
        return f"{self.n}:{self.m}" if self.m else f"{100 * self.ratio:g}%"

    def mask(self, score: Tensor) -> Tensor:
        """The bool mask of a score ``[rows, cols]`` whose groups run along the last dimension."""
        if self.m:
            return nm_mask(score, self.n, self.m)
        cols = score.shape[-1]
        return block_topk_mask(score, cols - int(cols * self.ratio), (1, max(cols, 1)))


@dataclass(frozen=True)
class MaskInfo:
    """How a stored mask came to be: its pattern, and the weight dimension (or ``"flatten"``) its groups run along."""

    pattern: Pattern
    axis: Axis


def grouped(weight: Tensor, axis: Axis) -> Tensor:
    """A view of ``weight`` with the group dimension last: dimension ``axis``, or all but the first for ``"flatten"``.

    A contiguous weight is needed for ``"flatten"``, so that the result shares its memory.
    """
    return weight.view(weight.shape[0], -1) if axis == "flatten" else weight.movedim(axis, -1)


def set_mask(module: nn.Module, mask: Tensor, info: MaskInfo) -> None:
    """Stores the mask of ``module.weight`` as a bit-packed buffer ``weight_mask`` that no state dict contains."""
    module.register_buffer("weight_mask", pack_bits(mask), persistent=False)
    module.weight_mask_info = info  # type: ignore[assignment]


def get_mask(module: nn.Module) -> Tensor | None:
    """The stored bool mask of ``module.weight``, in its shape; None where there is none."""
    bits = getattr(module, "weight_mask", None)
    weight = module.weight
    return None if bits is None or not isinstance(weight, Tensor) else unpack_bits(bits, weight.shape[-1])


def get_mask_info(module: nn.Module) -> MaskInfo | None:
    """How the stored mask came to be; None where there is none."""
    return getattr(module, "weight_mask_info", None)


def remove_mask(module: nn.Module) -> None:
    """Forgets the stored mask; the weight stays as it is."""
    if "weight_mask" in module._buffers:
        del module._buffers["weight_mask"], module.weight_mask_info
