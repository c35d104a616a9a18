"""The masks that learning starts from: a method's, those of a pruned copy, or those that the model has stored."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .._batches import Forward
from .._layers import Where
from .._undo import undoing
from ..masks import Pattern, get_mask, get_mask_bits, get_mask_info, masked_parameters, remove_mask, set_mask_bits
from .calibration import Calibration
from .calibration.ranks import Group
from .layers import PrunableLayer, check_weights, find_layers, nothing_to
from .masked_losses import set_noise
from .methods import Method, Wanda
from .prune_model import prune_
from .refinements import Swaps
from .report import Skipped

CALIBRATED = 16  # batches that a method gets: more change few masks
Init = Method | nn.Module | Mapping[str, Tensor] | None
Found = tuple[list[PrunableLayer], list[Tensor], tuple[Skipped, ...]]


class MaskOnly(Method):
    """A method that chooses the masks of another one and leaves all weights as they are."""

    method: Method

    def __init__(self, method: Method) -> None:
        for name, value in (("pattern", method.pattern), ("method", method), ("statistic", method.statistic)):
            object.__setattr__(self, name, value)

    def for_layer(self, layer: PrunableLayer) -> Method:
        return MaskOnly(self.method.for_layer(layer))

    def without_inputs(self) -> Method:
        return MaskOnly(self.method.without_inputs())

    def __repr__(self) -> str:
        return repr(self.method)

    def prune(self, weight: Tensor, statistic: Any) -> tuple[Tensor, Tensor]:
        return weight, self.method.prune(weight, statistic)[1]


def first_masks(
    model: nn.Module,
    init: Init,
    pattern: Pattern,
    axis: Literal["input", "flatten"],
    where: Where | None,
    batches: Sequence[Any],
    forward: Forward,
    group: Group,
    seed: int,
) -> Found:
    """Returns the layers to learn, the first mask of each in the shape of its weight, and what is left out and why.

    The model is unchanged. ``seed`` chooses the noise that a method's statistics are computed with.

    Raises:
        TypeError: ``init`` is of another type.
        ValueError: no layer has a first mask, a mask does not fit, or the dropped weights are zero already.
    """
    layers, skipped = find_layers(model, pattern, axis, where)
    if init is None:
        stored = any(_stored(layer.module, layer.parameter, pattern) is not None for layer in layers)
        init = model if stored else Swaps(Wanda(str(pattern)))
    if isinstance(init, Method):
        if Pattern.parse(init.pattern) != pattern:
            raise ValueError(f"init must choose masks of {pattern}, got {init!r}")
        calibration = Calibration(sequential=False, forward=forward, batchnorm=False, group=group)
        found = _of_method(model, init, axis, where, calibration, batches, seed)
    else:
        found = _given(init, layers, skipped, pattern, where)
    check_weights(found[0])
    for layer, mask in zip(*found[:2], strict=True):
        weight = layer.weight.detach()
        if weight.masked_fill(mask.to(weight.device), 0).any():
            return found
    raise ValueError(
        "the weights that the first masks drop are all zero, so no other mask can be better: load the dense weights, "
        "and pass the pruned model, or its masks, as init"
    )


def _of_method(
    model: nn.Module,
    method: Method,
    axis: Literal["input", "flatten"],
    where: Where | None,
    calibration: Calibration,
    batches: Sequence[Any],
    seed: int,
) -> Found:
    """Prunes the model by a method that leaves the weights as they are, reads the masks, and removes them again."""
    some = [batches[i] for i in range(min(len(batches), CALIBRATED))]
    gpus = list({tensor.device for tensor in model.parameters() if tensor.is_cuda})
    with torch.random.fork_rng(gpus), undoing() as undo:  # never committed
        set_noise(model, seed)
        for module in model.modules():
            undo.callback(_restore_masks, module, _masks_of(module))
        report = prune_(model, MaskOnly(method), some, axis=axis, where=where, calibration=calibration)
        names = {layer.name for layer in report.layers}
        pattern = Pattern.parse(method.pattern)
        layers = [layer for layer in find_layers(model, pattern, axis, where)[0] if layer.name in names]
        masks = [get_mask(layer.module, layer.parameter) for layer in layers]
    return layers, [mask for mask in masks if mask is not None], report.skipped


def _given(
    init: Any, layers: Sequence[PrunableLayer], skipped: Sequence[Skipped], pattern: Pattern, where: Where | None
) -> Found:
    """Finds the masks of the layers in a model or a mapping."""
    given: dict[str, Tensor | None]
    if isinstance(init, nn.Module):
        modules = dict(init.named_modules())
        given = {layer.name: _stored(modules.get(layer.path), layer.parameter, pattern) for layer in layers}
    elif isinstance(init, Mapping):
        given = {layer.name: init.get(layer.name) for layer in layers}
        if unknown := sorted(set(init) - set(given)):
            raise ValueError(f"init has a mask for {unknown[0]!r}, which is no layer that can be pruned")
    else:
        raise TypeError(
            f"init must be a Method, a pruned copy of the model or a mapping of masks, got {type(init).__name__}"
        )
    found = [(layer, mask) for layer in layers if (mask := given[layer.name]) is not None]
    missed = [
        Skipped(layer.name, f"init has no {pattern} mask for it") for layer in layers if given[layer.name] is None
    ]
    if not found:
        what = "layer that can be pruned and has a first mask"
        raise ValueError(nothing_to("learn", what, where, [*missed, *skipped]))
    for layer, mask in found:
        shape = tuple(layer.weight.shape)
        if mask.dtype != torch.bool or mask.shape != shape:
            raise ValueError(
                f"the first mask of layer {layer.name!r} must be bool {shape}, got {mask.dtype} {tuple(mask.shape)}"
            )
    return [layer for layer, _ in found], [mask for _, mask in found], (*missed, *skipped)


def _stored(module: nn.Module | None, parameter: str, pattern: Pattern) -> Tensor | None:
    info = None if module is None else get_mask_info(module, parameter)
    return None if module is None or info is None or info.pattern != pattern else get_mask(module, parameter)


def _masks_of(module: nn.Module) -> dict[str, Any]:
    return {key: (get_mask_bits(module, key), get_mask_info(module, key)) for key in masked_parameters(module)}


def _restore_masks(module: nn.Module, before: Mapping[str, Any]) -> None:
    for key in masked_parameters(module):
        if key not in before:
            remove_mask(module, key)
    for key, (bits, info) in before.items():
        set_mask_bits(module, bits, info, key)
