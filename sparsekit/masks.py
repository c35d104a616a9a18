"""Patterns, and the masks of layers, which are stored with the layer and not deduced from its zeros."""

import re
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from ._state import (
    get_bits,
    mask_info_name,
    mask_name,
    remove_attribute,
    remove_bits,
    set_attribute,
    set_bits,
)
from .ops import block_scores, block_topk_mask, nm_mask, nm_prune, pack_bits, unpack_bits
from .ops.nm import MAX_M

Axis = int | Literal["flatten"]
BLOCK, K = (16, 16), 10  # the defaults of tiers, those of the three-tier pruner
LOST_ZEROS = "is not zero where its mask drops it"
WAY_BACK = "it was trained or merged without keep_masks; prune_ it again, or zero it by keep_masks"


@dataclass(frozen=True)
class Pattern:
    """A rule for masks: keep ``n`` of every ``m`` inputs, or, if ``m`` is None, drop the share ``ratio``.

    The share is dropped from every ``"row"``, from the whole ``"layer"``, or from the layer's blocks of
    ``(rows, cols)``, each of which is dropped or kept as a whole. With ``tiers``, every block of size ``unit`` is
    dense, 2:4, or keeps ``n`` entries, as a tier map says.
    """

    n: int = 0
    m: int | None = None
    ratio: float = 0.0
    unit: Literal["row", "layer"] | tuple[int, int] = "row"
    tiers: bool = False

    @staticmethod
    def parse(text: str) -> "Pattern":
        """Reads a pattern.

        ``"2:4"`` keeps 2 of 4 (any ``0 < n <= m <= 32``), ``"50%"`` drops half of every output row, ``"50% layer"``
        half of the layer, ``"50% 16x16"`` half of its blocks of 16 rows and 16 columns. ``"tiers 16x16 k=10"`` is the
        pattern of ``progressive_tiers``: a name, which chooses no mask by itself.

        Raises:
            ValueError: anything else.
        """
        if isinstance(text, str):
            if (nm := re.fullmatch(r"(\d+):(\d+)", text)) and 0 < int(nm[1]) <= int(nm[2]) <= MAX_M:
                return Pattern(n=int(nm[1]), m=int(nm[2]))
            share = re.fullmatch(r"(\d+(?:\.\d+)?)%(?: (layer|[1-9]\d*x[1-9]\d*))?", text)
            if share and float(share[1]) <= 100:
                return Pattern(ratio=float(share[1]) / 100, unit=_unit(share[2]))
            if tiers := re.fullmatch(r"tiers ([1-9]\d*x[1-9]\d*) k=(\d+)", text):
                return Pattern(n=int(tiers[2]), unit=_unit(tiers[1]), tiers=True)
        raise ValueError(
            f'a pattern is "n:m" with 0 < n <= m <= {MAX_M}, or "p%", "p% layer" or "p% 16x16" with 0 <= p <= 100, '
            f"got {text!r}"
        )

    def __str__(self) -> str:
        if self.m:
            return f"{self.n}:{self.m}"
        if self.tiers:
            return f"tiers {self.unit[0]}x{self.unit[1]} k={self.n}"
        unit = "" if self.unit == "row" else self.unit if self.unit == "layer" else f"{self.unit[0]}x{self.unit[1]}"
        return f"{100 * self.ratio:.12g}% {unit}".rstrip()

    def mask(self, score: Tensor) -> Tensor:
        """Returns the bool mask of the largest scores ``[rows, ..., cols]``; groups run along the last dimension."""
        if self.m:
            return nm_mask(score, self.n, self.m)
        rows = score.flatten(1)
        if self.unit == "row":
            return self._best(rows).view(score.shape)
        if self.unit == "layer":
            return self._best(rows.reshape(1, -1)).view(score.shape)
        kept = self._best(blocks := block_scores(rows, self.unit).reshape(1, -1))
        block_rows, block_cols = self.unit
        kept = kept.view(-(-rows.shape[0] // block_rows), -1) if blocks.numel() else kept.view(0, 0)
        return (
            kept.repeat_interleave(block_rows, 0)[: rows.shape[0]]
            .repeat_interleave(block_cols, 1)[:, : rows.shape[1]]
            .reshape(score.shape)
        )

    def _best(self, rows: Tensor) -> Tensor:
        cols = rows.shape[1]
        dropped = int(cols * self.ratio + 1e-6)  # 0.29 * 100 is 28.999999999999996
        return block_topk_mask(rows, cols - dropped, (1, max(cols, 1)))

    def prune(self, weight: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Zeroes the entries of ``weight`` ``[rows, ..., cols]`` that the pattern drops by ``abs(weight) * scale``.

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


def _unit(text: str | None) -> Literal["row", "layer"] | tuple[int, int]:
    if text == "layer":
        return "layer"
    if text is None:
        return "row"
    block_rows, block_cols = text.split("x")
    return int(block_rows), int(block_cols)


@dataclass(frozen=True)
class MaskInfo:
    """The pattern of a stored mask, and the weight dimension (or ``"flatten"``) that its groups run along.

    ``axis`` is the dimension of the inputs: 1 for Linear and Conv2d, 0 for transformers' Conv1D, 1 or 2 for the
    matrices of experts in one parameter; ``"flatten"`` takes Conv2d's ``(in, height, width)`` as one dimension.
    ``shape`` is the shape of the mask, set when the mask is stored.
    """

    pattern: Pattern
    axis: Axis
    shape: tuple[int, ...] | None = field(default=None, compare=False)


def grouped(weight: Tensor, axis: Axis) -> Tensor:
    """Returns ``weight`` with the group dimension last: dimension ``axis``, or all but the first for ``"flatten"``.

    It is a view, except for ``"flatten"`` of a weight that is not contiguous.
    """
    return weight.flatten(1) if axis == "flatten" else weight.movedim(axis, -1)


def ungrouped(groups: Tensor, axis: Axis, shape: torch.Size) -> Tensor:
    """Undoes ``grouped``: returns a view of ``groups`` in the shape of the weight."""
    return groups.view(shape) if axis == "flatten" else groups.movedim(-1, axis)


def set_mask(module: nn.Module, mask: Tensor, info: MaskInfo, parameter: str = "weight") -> None:
    """Stores the mask of a parameter in a bit-packed buffer, ``weight_mask``, that no state dict contains.

    The buffer is uint8 ``[rows, ceil(weight.numel() / rows / 8)]``: the bits of ``mask.flatten(1)``.

    Args:
        module: holds the parameter.
        mask: bool, of the parameter's shape.
        info: its pattern and axis.
        parameter: the parameter's name; its mask is the buffer ``f"{parameter}_mask"``.

    Raises:
        ValueError: ``mask`` is not bool, or not of the weight's shape.
    """
    weight: Tensor = getattr(module, parameter)
    if mask.dtype != torch.bool or mask.shape != weight.shape:
        raise ValueError(f"mask must be bool {tuple(weight.shape)}, got {mask.dtype} {tuple(mask.shape)}")
    set_mask_bits(module, pack_bits(mask.unsqueeze(-1).flatten(1)), replace(info, shape=tuple(mask.shape)), parameter)


def set_mask_bits(module: nn.Module, bits: Tensor, info: MaskInfo, parameter: str = "weight") -> None:
    """Stores a bit-packed mask as ``set_mask`` does; several modules may share the buffer.

    If ``info.shape`` is None, it becomes the current shape of the parameter.
    """
    if info.shape is None:
        info = replace(info, shape=tuple(getattr(module, parameter).shape))
    # A mask exists only if both are set, so that an interrupt between the two lines leaves none.
    set_attribute(module, mask_info_name(parameter), info)
    set_bits(module, mask_name(parameter), bits)


def get_mask_bits(module: nn.Module, parameter: str = "weight") -> Tensor | None:
    """Returns the bit-packed mask as it is stored; None if there is none."""
    return get_bits(module, mask_name(parameter)) if mask_info_name(parameter) in module.__dict__ else None


def get_mask(module: nn.Module, parameter: str = "weight") -> Tensor | None:
    """Returns the stored bool mask of a parameter of ``module``, in its shape; None if there is none.

    Raises:
        ValueError: since the mask was stored, the parameter has changed its shape, or has come to be computed.
    """
    bits, info = get_mask_bits(module, parameter), get_mask_info(module, parameter)
    if bits is None or info is None:
        return None
    if reason := outdated_mask_reason(module, parameter):
        raise ValueError(reason)
    assert info.shape is not None
    return unpack_bits(bits, torch.Size(info.shape[1:]).numel()).view(info.shape)


def outdated_mask_reason(module: nn.Module, parameter: str = "weight") -> str | None:
    """Returns why the stored mask does not fit the parameter; None if it does, or if there is no mask."""
    info = get_mask_info(module, parameter)
    if info is None:
        return None
    way = "call prune_ again, or forget the mask with sparsekit.masks.remove_mask"
    own = module._parameters.get(parameter)
    # A computed weight is never read: spectral_norm would change its buffers, and a compressed layer would unpack.
    if own is None and (parameter in module.__dict__ or is_parametrized(module, parameter)):
        return f"its {parameter} has a stored mask and is computed from other parameters since: {way}"
    if own is not None and tuple(own.shape) != info.shape:
        return f"its {parameter} has the shape {tuple(own.shape)}, and the stored mask has {info.shape}: {way}"
    return None


def lost_zeros_reason(module: nn.Module, parameter: str = "weight") -> str | None:
    """Returns a reason if entries that the stored mask of a parameter drops are not zero; else None.

    Training without ``keep_masks`` or merging LoRA leads to that. The result is also None if there is no mask, or if
    this process does not have the values of the parameter.
    """
    mask, weight = get_mask(module, parameter), module._parameters.get(parameter)
    if mask is None or weight is None or weight.is_meta or hasattr(weight, "to_local"):
        return None
    dropped = weight.detach()[~mask]
    filled = int(dropped.count_nonzero())
    return f"its {parameter} {LOST_ZEROS} ({filled} of {dropped.numel()}): {WAY_BACK}" if filled else None


def check_masks(model: nn.Module) -> None:
    """Checks that all stored masks still fit their weights.

    Raises:
        ValueError: since it was masked, a parameter has changed its shape or has come to be computed; names its layer.
    """
    for name, module in model.named_modules():
        for parameter in masked_parameters(module):
            if reason := outdated_mask_reason(module, parameter):
                raise ValueError(f"layer {name!r}: {reason}")


def get_mask_info(module: nn.Module, parameter: str = "weight") -> MaskInfo | None:
    """Returns the pattern and axis of the stored mask; None if there is none."""
    return None if get_mask_bits(module, parameter) is None else module.__dict__[mask_info_name(parameter)]


def masked_parameters(module: nn.Module) -> tuple[str, ...]:
    """Returns the names of the module's own parameters that have a stored mask, such as ``("weight",)``."""
    names = (name.removesuffix("_mask") for name, _ in module._buffers.items() if name.endswith("_mask"))
    return tuple(name for name in names if get_mask_bits(module, name) is not None)


def remove_mask(module: nn.Module, parameter: str = "weight") -> None:
    """Removes the stored mask; the weight stays as it is."""
    remove_attribute(module, mask_info_name(parameter))
    remove_bits(module, mask_name(parameter))


def tier_sizes(module: nn.Module) -> tuple[tuple[int, int], int]:
    """Returns the block size and ``k`` of the tiers in the stored mask; 16x16 and 10 if it has none."""
    info = get_mask_info(module)
    if info is None or not info.pattern.tiers or isinstance(info.pattern.unit, str):
        return BLOCK, K
    return info.pattern.unit, info.pattern.n
