"""What the layers of this package share: autocast, orientation, stored masks, and how torch.fx sees them."""

from typing import Any

import torch
import torch.fx
from torch import Tensor, nn

from ..masks import get_mask_bits, get_mask_info, set_mask_bits
from ..ops._define import DTYPES


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast computes a linear layer on ``x`` in; None where it is off, or leaves ``x`` as it is."""
    device = x.device.type
    enabled = device != "meta" and torch.is_autocast_enabled(device) and x.dtype in DTYPES
    return torch.get_autocast_dtype(device) if enabled else None


Stamp = tuple[tuple[Tensor, int, int], ...]


def stamp_of(*weights: Tensor) -> Stamp:
    """What ``has_changed`` compares: each weight itself, its address, and how often it was written to.

    Inference tensors do not count their writes, and a write through ``.data`` leaves no trace in any.
    """
    return tuple((weight, weight.data_ptr(), 0 if weight.is_inference() else weight._version) for weight in weights)


def has_changed(stamp: Stamp, *weights: Tensor) -> bool:
    """Whether other weights are there than at ``stamp``, or one was written to; a compiled graph takes them for
    constants.
    """
    if torch.compiler.is_compiling():
        return False
    return any(
        one is not other or counts != other_counts
        for (one, *counts), (other, *other_counts) in zip(stamp, stamp_of(*weights), strict=True)
    )


def oriented(weight: Tensor, transposed: bool) -> Tensor:
    """The weight as ``[outputs, inputs]``, or back as the layer keeps it."""
    return weight.t() if transposed else weight


def carry_mask(source: nn.Module, target: nn.Module) -> None:
    """Gives ``target`` the stored mask of ``source``: the same buffer, not a copy."""
    bits, info = get_mask_bits(source), get_mask_info(source)
    if bits is not None and info is not None:
        set_mask_bits(target, bits, info)


def fx_node(layer: nn.Module, input: torch.fx.Proxy) -> Any:
    """A call of ``layer`` in the graph that ``torch.fx`` traces: a leaf, as ``nn.Linear`` is.

    Raises:
        ValueError: the layer itself is what is traced.
    """
    tracer: Any = input.tracer
    if tracer.root is layer:
        raise ValueError(f"torch.fx cannot trace a {type(layer).__name__} alone: trace a model that holds it")
    return tracer.create_proxy("call_module", tracer.path_of_module(layer), (input,), {})
