"""The linear layers of a model: where they are, and why one must stay what it is."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import nn

from .._layers import (
    Where,
    check_where,
    declared_shape,
    expert_axes,
    hooks_reason,
    input_dim,
    is_transposed,
    selects,
    shared_weight_reasons,
    unsupported_reason,
)
from .._replace import Slots, parent_slots
from ..masks import outdated_mask_reason

EXPERTS = "experts in one parameter stay dense: no kernel multiplies by them"

SHARDED = "its weight is sharded (FSDP), a DTensor between two passes: compress before sharding"

REGISTERED = {"_modules", "_parameters", "_buffers"}


@dataclass
class LinearSite:
    """A linear layer of a model.

    Args:
        name: its name in the model.
        layer: the layer.
        slots: where its parents hold it.
        reason: why it must stay what it is; None where it may be swapped.
        shape: ``(out_features, in_features)``; of experts as they are stored.
        calls: how often the batches call it, by token count rounded up to a power of two.
    """

    name: str
    layer: nn.Linear
    slots: Slots
    reason: str | None
    shape: tuple[int, ...]
    calls: Counter[int] = field(default_factory=Counter)


def find_sites(model: nn.Module, where: Where | None) -> list[LinearSite]:
    """Returns the linear layers and parameters of experts that ``where`` selects, in the order of ``named_modules``."""
    check_where(where)
    slots, shared = parent_slots(model), shared_weight_reasons(model)
    sharded, aliases = _sharded(model), _aliases(model)
    sites = []
    for name, layer in model.named_modules():
        if input_dim(layer) is None and (experts := _experts(layer)) and selects(where, name, layer):
            sites += [
                LinearSite(f"{name}.{key}".lstrip("."), layer, [], EXPERTS, shape) for key, shape in experts.items()
            ]
        if input_dim(layer) is None or isinstance(layer, nn.Conv2d) or not selects(where, name, layer):
            continue
        reason = shared.get((layer, "weight")) or (SHARDED if layer in sharded else None) or aliases.get(layer)
        reason = reason or must_stay_reason(layer)
        if layer is model:
            reason = "it is the model itself: use from_linear of Linear24, TieredLinear or PrepackedLinear"
        rows, cols = declared_shape(layer)
        shape = (cols, rows) if input_dim(layer) == 0 else (rows, cols)
        sites.append(LinearSite(name, layer, slots.get(layer, []), reason, shape))
    return sites


def must_stay_reason(layer: nn.Module) -> str | None:
    """Returns why a linear layer must stay what it is, whatever is faster; None where it may be swapped."""
    if reason := unsupported_reason(layer):
        return reason
    if type(layer) is not nn.Linear and not is_transposed(layer):
        return f"{type(layer).__name__} may compute something else than nn.Linear"
    if reason := hooks_reason(layer) or outdated_mask_reason(layer):
        return reason
    weight = layer.get_parameter("weight")
    if layer.training and (weight._backward_hooks or weight._post_accumulate_grad_hooks):
        return "its weight has hooks, and is trained"
    known = {"weight", "bias", "weight_mask", "weight_fading"}
    own = (layer._parameters.keys() | layer._buffers.keys() | layer._modules.keys()) - known
    return f"it also holds {', '.join(sorted(own))}" if own else None


def other_dtype_reason(layer: nn.Linear, dtypes: Iterable[torch.dtype]) -> str | None:
    """Returns why a layer must stay if it computes in these dtypes, or None if they are that of its weight."""
    if others := sorted({str(dtype) for dtype in dtypes if dtype != layer.weight.dtype}):
        return f"it runs in {', '.join(others)}, its weight is {layer.weight.dtype}: convert the model to compress it"
    return None


def _sharded(model: nn.Module) -> set[nn.Module]:
    """Returns the modules whose parameters FSDP shards, although after a pass they may look like any others."""
    kinds = {"FSDPModule", "FullyShardedDataParallel"}
    parents = [module for module in model.modules() if kinds & {base.__name__ for base in type(module).__mro__}]
    return {module for parent in parents for module in parent.modules()}


def _aliases(model: nn.Module) -> dict[nn.Module, str]:
    """Returns the layers that a module also holds in a plain attribute, such as a list, where none can be replaced."""
    found: dict[nn.Module, str] = {}
    for parent in model.modules():
        for key, value in vars(parent).items():
            if key not in REGISTERED:
                where = f"{type(parent).__name__}.{key} holds it outside of its modules"
                found |= {module: where for module in _modules_in(value) if module is not parent}
    return found


def _modules_in(value: Any, depth: int = 3) -> Iterator[nn.Module]:
    if isinstance(value, nn.Module):
        yield value
    elif isinstance(value, list | tuple | set | dict) and depth:
        for item in value.values() if isinstance(value, dict) else value:
            yield from _modules_in(item, depth - 1)
    elif isinstance(value, MethodType):
        yield from _modules_in(value.__self__, 0)
    elif isinstance(value, partial) and depth:
        yield from _modules_in([value.func, *value.args, value.keywords], depth - 1)


def _experts(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of a module's parameters that are known to hold the matrices of experts."""
    return {key: tuple(module.get_parameter(key).shape) for key in expert_axes(module)}
