"""The linear layers and convolutions of a model: where they are, and why one must stay what it is."""

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
from .sizes import Size

ALONE = "use from_linear of Linear24, TieredLinear or PrepackedLinear"

ALONE_CONV = "use from_conv2d of Conv2d24 or PrepackedConv2d"

EXPERTS = "experts in one parameter stay dense: no kernel multiplies by them"

SHARDED = "its weight is sharded (FSDP), a DTensor between two passes: compress before sharding"

REGISTERED = {"_modules", "_parameters", "_buffers"}


@dataclass
class LayerSite:
    """A linear layer or convolution of a model.

    Args:
        name: its name in the model.
        layer: the layer: an ``nn.Linear``, a ``Conv1D`` of transformers or an ``nn.Conv2d``.
        slots: where its parents hold it.
        reason: why it must stay what it is; None where it may be swapped.
        shape: ``(out_features, in_features)``; of convolutions and experts that of the weight.
        calls: how often the batches call it, by the size of its input, as ``sizes.size_of`` returns it.
    """

    name: str
    layer: Any
    slots: Slots
    reason: str | None
    shape: tuple[int, ...]
    calls: Counter[Size] = field(default_factory=Counter)


def find_sites(model: nn.Module, where: Where | None) -> list[LayerSite]:
    """Returns the layers and parameters of experts that ``where`` selects, in the order of ``named_modules``."""
    check_where(where)
    slots, shared = parent_slots(model), shared_weight_reasons(model)
    sharded, aliases = _sharded(model), _aliases(model)
    sites = []
    for name, layer in model.named_modules():
        if input_dim(layer) is None and (experts := _experts(layer)) and selects(where, name, layer):
            sites += [
                LayerSite(f"{name}.{key}".lstrip("."), layer, [], EXPERTS, shape) for key, shape in experts.items()
            ]
        if input_dim(layer) is None or not selects(where, name, layer):
            continue
        reason = shared.get((layer, "weight")) or (SHARDED if layer in sharded else None) or aliases.get(layer)
        reason = reason or must_stay_reason(layer)
        if layer is model:
            reason = f"it is the model itself: {ALONE_CONV if isinstance(layer, nn.Conv2d) else ALONE}"
        shape = declared_shape(layer)
        shape = shape[::-1] if input_dim(layer) == 0 else shape
        sites.append(LayerSite(name, layer, slots.get(layer, []), reason, shape))
    return sites


def must_stay_reason(layer: nn.Module) -> str | None:
    """Returns why a layer must stay what it is, whatever is faster; None where it may be swapped."""
    if reason := unsupported_reason(layer):
        return reason
    if type(layer) not in (nn.Linear, nn.Conv2d) and not is_transposed(layer):
        plain = "nn.Conv2d" if isinstance(layer, nn.Conv2d) else "nn.Linear"
        return f"{type(layer).__name__} may compute something else than {plain}"
    if isinstance(layer, nn.Conv2d) and (reason := _convolution_reason(layer)):
        return reason
    if reason := hooks_reason(layer) or outdated_mask_reason(layer):
        return reason
    weight = layer.get_parameter("weight")
    if layer.training and (weight._backward_hooks or weight._post_accumulate_grad_hooks):
        return "its weight has hooks, and is trained"
    known = {"weight", "bias", "weight_mask", "weight_fading"}
    own = (layer._parameters.keys() | layer._buffers.keys() | layer._modules.keys()) - known
    return f"it also holds {', '.join(sorted(own))}" if own else None


def _convolution_reason(conv: nn.Conv2d) -> str | None:
    """Returns why no kernel computes a convolution; None where there are some."""
    if conv.groups != 1:
        return f"it has {conv.groups} groups, and only convolutions of one are swapped"
    if conv.padding_mode != "zeros":
        return f"it pads in the mode {conv.padding_mode!r}, and only padding with zeros is computed"
    if conv.weight.device.type != "cpu":
        return f"convolutions stay dense on {conv.weight.device.type}"
    if conv.weight.dtype != torch.float32:
        return f"its weight is {conv.weight.dtype}, and convolutions are swapped in torch.float32 only"
    return None


def other_dtype_reason(layer: nn.Module, dtypes: Iterable[torch.dtype]) -> str | None:
    """Returns why a layer must stay if it computes in these dtypes, or None if they are that of its weight."""
    own = layer.get_parameter("weight").dtype
    if others := sorted({str(dtype) for dtype in dtypes if dtype != own}):
        return f"it runs in {', '.join(others)}, its weight is {own}: convert the model to compress it"
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
