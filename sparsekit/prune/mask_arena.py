"""The logits and masks of all layers in one tensor each, so that one call draws or learns the masks of a model."""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._forwards import Around, around_forwards
from .._undo import restoring
from ..masks import Pattern, grouped, ungrouped
from ..ops import masked_weight, nm_mask_bits, pack_bits, unpack_bits
from .layers import PrunableLayer


@dataclass(frozen=True)
class Slot:
    """The place of a layer in the arena.

    Args:
        layer: the layer.
        start: its first entry; a multiple of m, and of 8, so that its bits are whole bytes.
        end: the end of its entries; up to ``stop`` follow unused groups.
        stop: the first entry of the next layer.
        full: the shape of its entries, ``[rows, ..., cols]`` without the tail that fills no group.
    """

    layer: PrunableLayer
    start: int
    end: int
    stop: int
    full: tuple[int, ...]


class MaskArena:
    """The logits of all layers, one for each weight, in one tensor ``[entries]``, group after group.

    Masks are its entries as bits, uint8 ``[entries / 8]``. A convolution's weight lies in groups along its input
    channels, or along its whole kernel where that is the layer's axis. A tail that fills no group has no entries: it is
    kept.

    Args:
        layers: the layers.
        pattern: ``n:m``.
        dtype: of the logits, float32 or bfloat16.
        device: of the logits.
    """

    def __init__(
        self, layers: Iterable[PrunableLayer], pattern: Pattern, dtype: torch.dtype, device: torch.device
    ) -> None:
        assert pattern.m is not None
        self.n, self.m = pattern.n, pattern.m
        self.slots: list[Slot] = []
        step, start = math.lcm(self.m, 8), 0
        for layer in layers:
            *rows, cols = grouped(layer.weight, layer.axis).shape
            full = (*rows, cols // self.m * self.m)
            end = start + math.prod(full)
            stop = start + -(-math.prod(full) // step) * step
            self.slots.append(Slot(layer, start, end, stop, full))
            start = stop
        self.groups = sum(slot.end - slot.start for slot in self.slots) // self.m
        self.logits = torch.empty(start, dtype=dtype, device=device)

    def pack(self, masks: Sequence[Tensor]) -> Tensor:
        """Returns bool masks, each in the shape of its layer's weight, as bits on the CPU.

        Raises:
            ValueError: a mask does not keep n of every group and all of the tail; names the layer.
        """
        parts = []
        for slot, mask in zip(self.slots, masks, strict=True):
            inputs = grouped(mask, slot.layer.axis)
            cols = slot.full[-1]
            entries = inputs[..., :cols].reshape(-1)
            if not inputs[..., cols:].all() or not (entries.view(-1, self.m).sum(1) == self.n).all():
                raise ValueError(
                    f"the first mask of layer {slot.layer.name!r} does not keep exactly {self.n} of every {self.m} "
                    "inputs: prune a copy of the model by the same pattern, and pass that as init"
                )
            unused = torch.arange(slot.stop - slot.end, device=mask.device) % self.m < self.n
            parts.append(pack_bits(torch.cat([entries, unused])).cpu())
        return torch.cat(parts)

    def set_logits(self, bits: Tensor, multiplier: float) -> None:
        """Sets the logits of kept entries to ``multiplier``, all others to 0."""
        for slot, part in self._parts(bits):
            kept = unpack_bits(part.to(self.logits.device), slot.stop - slot.start)
            self.logits[slot.start : slot.stop] = kept.to(self.logits.dtype) * multiplier

    def likeliest(self) -> Tensor:
        """Returns the mask of the n largest logits of every group, as bits on the CPU."""
        parts = []
        for slot in self.slots:
            groups = self.logits[slot.start : slot.stop].float().view(-1, self.m)
            score = (groups - groups.amin(1, keepdim=True)).view(-1)  # a mask ranks by magnitude
            parts.append(nm_mask_bits(score, self.n, self.m).cpu())
        return torch.cat(parts)

    def flips(self, bits: Tensor, other: Tensor) -> int:
        """Counts the groups in which two masks differ."""
        total = 0
        for (slot, one), (_, two) in zip(self._parts(bits), self._parts(other), strict=True):
            differ = unpack_bits(one ^ two.to(one.device), slot.end - slot.start)
            total += int(differ.view(-1, self.m).any(1).sum())
        return total

    def masks(self, bits: Tensor) -> Iterator[tuple[PrunableLayer, Tensor]]:
        """Yields the layers, each with its bool mask in the shape of its weight."""
        for slot, part in self._parts(bits):
            yield slot.layer, _mask(slot, part)

    @contextmanager
    def masking(self, bits: Tensor) -> Iterator[None]:
        """Makes the layers multiply by their masked weights until the end.

        A masked weight is made when its layer is called, and freed after the call, so that there is one at a time: the
        parameters are neither changed nor copied.
        """
        own: dict[nn.Module, dict[str, nn.Parameter]] = {}
        parts: dict[nn.Module, list[tuple[Slot, Tensor]]] = {}
        for slot, part in self._parts(bits):
            module, key = slot.layer.module, slot.layer.parameter
            own.setdefault(module, {})[key] = module.get_parameter(key)
            parts.setdefault(module, []).append((slot, part))

        def restore() -> None:
            for module, weights in own.items():
                module._parameters.update(weights)

        arounds = {module: _masked(own[module], parts[module]) for module in own}
        with restoring(restore), around_forwards(arounds):
            yield

    def _parts(self, bits: Tensor) -> Iterator[tuple[Slot, Tensor]]:
        for slot in self.slots:
            yield slot, bits[slot.start // 8 : slot.stop // 8]


def _masked(own: dict[str, nn.Parameter], parts: list[tuple[Slot, Tensor]]) -> Around:
    """Returns a function that runs the forward of a module with masked weights in place of its parameters."""

    def run(forward: Any, *args: Any, **kwargs: Any) -> Any:
        parameters: dict[str, Any] = parts[0][0].layer.module._parameters  # torch reads any tensor from it
        try:
            for slot, part in parts:
                parameters[slot.layer.parameter] = _masked_weight(slot, own[slot.layer.parameter].detach(), part)
            return forward(*args, **kwargs)
        finally:
            parameters.update(own)

    return run


def _masked_weight(slot: Slot, weight: Tensor, part: Tensor) -> Tensor:
    """Returns the weight of a layer with zeros where the bits of its mask drop entries."""
    axis, full = slot.layer.axis, slot.full[-1]
    bits = part[: (slot.end - slot.start + 7) // 8].to(weight.device)
    groups = grouped(weight, axis)
    if groups.is_contiguous():  # linear layers, and convolutions in the memory format channels_last
        masked = masked_weight(groups.view(-1, groups.shape[-1], 1), bits, full)
        return ungrouped(masked.view(groups.shape), axis, weight.shape)
    assert isinstance(axis, int)
    rows, cols = math.prod(weight.shape[:axis]), weight.shape[axis]
    return masked_weight(weight.reshape(rows, cols, -1), bits, full).view(weight.shape)


def _mask(slot: Slot, part: Tensor) -> Tensor:
    """Returns the bits of a layer's mask as a bool tensor in the shape of its weight."""
    weight = slot.layer.weight
    kept = unpack_bits(part.to(weight.device), slot.end - slot.start).view(slot.full)
    if tail := grouped(weight, slot.layer.axis).shape[-1] - slot.full[-1]:
        kept = F.pad(kept, (0, tail), value=True)
    return ungrouped(kept, slot.layer.axis, weight.shape)
