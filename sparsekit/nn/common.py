"""Helpers of all compressed layers: autocast, transposed weights, stored masks, torch.fx, and changes of weights."""

import operator
from collections.abc import Sequence
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn

from ..masks import get_mask_bits, get_mask_info, set_mask_bits
from ..ops._define import DTYPES


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Returns the dtype in which autocast computes a linear layer on ``x``; None if it is off or ignores ``x``."""
    device = x.device.type
    enabled = device != "meta" and torch.is_autocast_enabled(device) and x.dtype in DTYPES
    return torch.get_autocast_dtype(device) if enabled else None


Stamp = tuple[tuple[int, int], ...]  # of each weight: its address, and how often it was written to


def stamp_of(weights: Sequence[Tensor]) -> Stamp:
    """Returns numbers that change when weights are written to or given other memory.

    They miss writes through ``.data``, and writes to inference tensors, which do not count them.
    """
    return tuple([(weight.data_ptr(), 0 if weight.is_inference() else weight._version) for weight in weights])


def are_same(tensors: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    """Returns whether both are the same tensors, not only equal ones."""
    return len(tensors) == len(others) and all(map(operator.is_, tensors, others))


def oriented(weight: Tensor, transposed: bool) -> Tensor:
    """Transposes a weight if ``transposed``: from the way its layer stores it to ``[outputs, inputs]``, or back."""
    return weight.t() if transposed else weight


def carry_mask(source: nn.Module, target: nn.Module) -> None:
    """Gives ``target`` the stored mask of ``source``, if there is one: the same buffer, not a copy."""
    bits, info = get_mask_bits(source), get_mask_info(source)
    if bits is not None and info is not None:
        set_mask_bits(target, bits, info)


def fx_node(layer: nn.Module, input: torch.fx.Proxy) -> Any:
    """Adds a call of ``layer`` to the graph that ``torch.fx`` traces, as a single node, which ``nn.Linear`` is too.

    Raises:
        ValueError: the layer is traced alone, not as a part of a model.
    """
    tracer: Any = input.tracer
    if tracer.root is layer:
        raise ValueError(f"torch.fx cannot trace a {type(layer).__name__} alone: trace a model that holds it")
    return tracer.create_proxy("call_module", tracer.path_of_module(layer), (input,), {})
