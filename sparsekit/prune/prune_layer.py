"""Prunes one layer: asks the method for a weight and a mask, checks them, and puts them into the layer."""

import time
from collections.abc import Iterable

import torch
from torch import Tensor

from .._undo import Undo
from ..masks import Pattern, grouped, ungrouped
from .apply_mask import apply_mask
from .calibration.experts import ExpertInputs
from .calibration.inputs import LayerInputs
from .calibration.ranks import Ranks
from .full_precision import full_precision
from .layers import PrunableLayer, check_result
from .methods import Method
from .report import PruneLayerReport


def prune_layer(
    layer: PrunableLayer, method: Method, pattern: Pattern, inputs: LayerInputs | None, ranks: Ranks, undo: Undo
) -> PruneLayerReport:
    """Prunes a layer in place; all processes get the weight and mask of the first one."""
    weight, started, remark = layer.weight.detach(), time.perf_counter(), ""
    with full_precision():
        if layer.experts:
            pruned, mask, remark = _prune_experts(layer, method, inputs)
        else:
            pruned, mask = _prune_matrix(layer, method, inputs)
        ranks.exchange()  # raises if another process could not prune the layer
        pruned, mask = ranks.broadcast(pruned), ranks.broadcast(mask)
        check_result(layer, pruned, method)
        error = None if inputs is None else inputs.sample.relative_error(weight, pruned)
        apply_mask(layer, pruned, mask, pattern, undo)
        dropped = mask.numel() - int(torch.count_nonzero(mask))
    seconds = time.perf_counter() - started
    shape, weights = tuple(weight.shape), weight.numel()
    return PruneLayerReport(layer.name, shape, str(pattern), dropped, weights, error, seconds, remark)


def _prune_matrix(layer: PrunableLayer, method: Method, inputs: LayerInputs | None) -> tuple[Tensor, Tensor]:
    """Returns the new weight of a layer and its mask, both in the layout of the layer's weight."""
    weight = layer.weight.detach()
    dense = grouped(weight, layer.axis)
    pruned, mask = method.for_layer(layer).prune(dense, None if inputs is None else inputs.statistic)
    if pruned.shape != dense.shape or mask.shape != dense.shape:
        shapes = f"a weight {tuple(pruned.shape)} and a mask {tuple(mask.shape)}"
        raise ValueError(f"{method!r} must return both of the shape {tuple(dense.shape)} that it got, got {shapes}")
    new = ungrouped(pruned, layer.axis, weight.shape).to(weight.dtype)
    return new, ungrouped(mask, layer.axis, weight.shape)


def _prune_experts(layer: PrunableLayer, method: Method, inputs: LayerInputs | None) -> tuple[Tensor, Tensor, str]:
    """Prunes every expert of a layer; an expert that no token reached is pruned by magnitude.

    Returns:
        The new weights and the masks, ``[experts, ...]`` both, and a remark about experts that no token reached.
    """
    found, missed = list[tuple[Tensor, Tensor]](), 0
    each_inputs: Iterable[LayerInputs | None] = (
        inputs.experts if isinstance(inputs, ExpertInputs) else [None] * len(layer.experts)
    )
    for expert, own in zip(layer.experts, each_inputs, strict=True):
        if own is not None and own.statistic is not None and not len(own.sample):
            missed += 1
            found.append(_prune_matrix(expert, method.without_inputs(), None))
        else:
            found.append(_prune_matrix(expert, method, own))
    weights, masks = (torch.stack(each) for each in zip(*found, strict=True))
    remark = f"{missed} of {len(found)} experts got no token and are pruned by magnitude" if missed else ""
    return weights, masks, remark
