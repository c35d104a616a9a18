"""Finds the layers of a model that can train sparse, and says why the others cannot."""

from torch import nn
from torch.nn.parameter import is_lazy

from .._layers import (
    Where,
    check_where,
    declared_shape,
    input_dim,
    selects,
    shared_weight_reasons,
    unsupported_reason,
)
from ..nn import Compressed
from ..nn.compressed import weight_shape
from .layer import MaskedLinear
from .report import TrainLayerReport


def select_layers(model: nn.Module, where: Where | None) -> tuple[dict[str, nn.Linear], tuple[TrainLayerReport, ...]]:
    """Returns the selected layers that can train sparse, by name, and reports of those that cannot."""
    layers: dict[str, nn.Linear] = {}
    check_where(where)
    skipped, shared = [], shared_weight_reasons(model)
    for name, module in model.named_modules():
        compressed = isinstance(module, Compressed)
        if not (compressed or input_dim(module) is not None) or not selects(where, name, module):
            continue
        if reason := shared.get((module, "weight")) or _dense_reason(module):
            skipped.append(
                TrainLayerReport(name, weight_shape(module) if compressed else declared_shape(module), "plain", reason)
            )
        else:
            layers[name] = module
    return layers, tuple(skipped)


def _dense_reason(layer: nn.Module) -> str | None:
    """Returns why a layer must train dense; None if it can train sparse."""
    weight = layer._parameters.get("weight")
    if isinstance(layer, Compressed) or (weight is not None and is_lazy(weight)):
        return unsupported_reason(layer)
    if type(layer) not in (nn.Linear, MaskedLinear):
        return f"it is a {type(layer).__name__}, only nn.Linear trains sparse"
    if "forward" in layer.__dict__:
        return "its forward is replaced"
    if type(layer) is nn.Linear and (reason := unsupported_reason(layer, prepare=True)):
        return reason
    if layer.get_parameter("weight").is_inference():
        return "its weight was made in inference mode, and autograd refuses it"
    weight = layer.get_parameter("weight")
    if weight.dim() != 2:
        return f"its weight has {weight.dim()} dimensions: FSDP flattens it, call sparse_training_ before"
    cols = weight.shape[1]
    return f"its {cols} inputs do not fill one group of 2:4" if cols < 4 else None
