"""The masks that learning starts from: a method's, those of a pruned copy, or those that the model has stored."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .._batches import Forward, observing
from .._forwards import Around, around_forwards, watch_reads
from .._layers import Where
from .._trees import copied
from .._undo import claiming, undoing
from ..masks import Pattern, get_mask, get_mask_bits, get_mask_info, masked_parameters, remove_mask, set_mask_bits
from .calibration import Calibration
from .calibration.ranks import Group, Ranks, local_buffers
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
    ranks: Ranks,
    seed: int,
) -> Found:
    """Returns the layers to learn, the first mask of each in the shape of its weight, and what is left out and why.

    The model is unchanged. ``seed`` chooses the noise that a method's statistics are computed with.

    Raises:
        TypeError: ``init`` is of another type.
        ValueError: no layer has a first mask, a mask does not fit, or the dropped weights are zero already.
    """

    def read() -> tuple[Method | None, Found, list[Any]]:
        layers, skipped = find_layers(model, pattern, axis, where)
        stored = any(_stored(layer.module, layer.parameter, pattern) is not None for layer in layers)
        source = init if init is not None else model if stored else Swaps(Wanda(str(pattern)))
        some = [batches[i] for i in range(min(len(batches), CALIBRATED))]
        if not isinstance(source, Method):
            return None, _given(source, layers, skipped, pattern, where), some
        if Pattern.parse(source.pattern) != pattern:
            raise ValueError(f"init must choose masks of {pattern}, got {source!r}")
        return source, ([], [], ()), some

    method, found, some = ranks.all_or_none(read)
    ranks.agree({"init": repr(method)}, ())
    if method is not None:
        calibration = Calibration(sequential=False, forward=forward, batchnorm=False, group=group)
        found = _of_method(model, method, axis, where, calibration, some, seed)
    if method is None or method.statistic is None:
        found = ranks.all_or_none(lambda: _that_are_called(found, model, forward, some, ranks, where, seed))
    ranks.all_or_none(lambda: _check(found))
    return found


def _check(found: Found) -> None:
    check_weights(found[0])
    for layer, mask in zip(*found[:2], strict=True):
        weight = layer.weight.detach()
        if weight.masked_fill(mask.to(weight.device), 0).any():
            return
    raise ValueError(
        "the weights that the first masks drop are all zero, so no other mask can be better: load the dense weights, "
        "and pass the pruned model, or its masks, as init"
    )


def _that_are_called(
    found: Found, model: nn.Module, forward: Forward, some: list[Any], ranks: Ranks, where: Where | None, seed: int
) -> Found:
    """Leaves out the layers that no batch calls: what reads their weights instead would go on with the dense ones."""
    layers, masks, skipped = found
    called: set[nn.Module] = set()

    def recorded(module: nn.Module) -> Around:
        def run(forward: Any, *args: Any, **kwargs: Any) -> Any:
            called.add(module)
            return forward(*args, **kwargs)

        return run

    modules = {layer.module for layer in layers}
    with claiming(model, "pruned"), local_buffers(model), observing(model), watch_reads(model, modules) as reads:
        with around_forwards({module: recorded(module) for module in modules}):
            set_noise(model, seed)
            for batch in some:
                if called != modules:
                    forward(model, copied(batch))
    names = set().union(*ranks.exchange([layer.name for layer in layers if layer.module in called]))
    kept = [(layer, mask) for layer, mask in zip(layers, masks, strict=True) if layer.name in names]
    missed = [
        Skipped(layer.name, reads.get(layer.module, "no batch reached it"))
        for layer in layers
        if layer.name not in names
    ]
    skipped = (*missed, *skipped)
    if not kept:
        raise ValueError(nothing_to("learn", "layer that is called and has a first mask", where, skipped))
    return [layer for layer, _ in kept], [mask for _, mask in kept], skipped


def _of_method(
    model: nn.Module,
    method: Method,
    axis: Literal["input", "flatten"],
    where: Where | None,
    calibration: Calibration,
    some: list[Any],
    seed: int,
) -> Found:
    """Prunes the model by a method that leaves the weights as they are, reads the masks, and removes them again."""
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
        selected = "" if where is None else " and that where selects"
        if unknown := sorted(set(init) - set(given)):
            raise ValueError(f"init has a mask for {unknown[0]!r}, which is no layer that can be pruned{selected}")
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
        if not isinstance(mask, Tensor):
            raise TypeError(f"the first mask of layer {layer.name!r} must be a tensor, got {type(mask).__name__}")
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
