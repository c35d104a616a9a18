"""The one verb: prune a model in place, all of it or nothing."""

import time
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .._batches import Forward, Progress, as_batches, evaluating
from .._layers import Where, check_model
from ..masks import MaskInfo, Pattern, get_mask, get_mask_info, grouped, remove_mask, set_mask, ungrouped
from ..ops import pack_bits, unpack_bits
from .calibrate import Block, Inputs, collect, execution_order, split_blocks
from .layers import Layer, check_weights, find_layers
from .methods import Method
from .report import LayerReport, PruneReport, Skipped

BITS = {2: torch.int16, 4: torch.int32}


def prune_(
    model: nn.Module,
    method: Method,
    batches: Any = None,
    *,
    where: Where | None = None,
    sequential: bool = True,
    forward: Forward | None = None,
    axis: Literal["input", "flatten"] = "input",
    progress: Progress | None = None,
) -> PruneReport:
    """Prunes the Linear and Conv2d layers of a model in place and stores each mask with its layer.

    Works on any tree of modules, including transformers' Conv1D. The weights stay dense tensors with zeros in them;
    ``keep_masks`` fine-tunes them. Left out, with the reason in the report: weights that are tied to another
    module's (an embedding and its head) or that a fused parent reads itself (``nn.MultiheadAttention``,
    ``nn.TransformerEncoderLayer``), convolutions in groups, layers with too few inputs for one group, and layers
    whose statistics no batch reached. Whatever fails, ``KeyboardInterrupt`` included, the model is as it was.

    Args:
        model: pruned in place; evaluation mode meanwhile.
        method: ``Magnitude("2:4")``, ``Wanda("2:4")``, or another ``Method``.
        batches: calibration inputs, one batch or an iterable that can be read again, such as a list or a DataLoader;
            the model is given them as they are, on the device they are on. A mapping is called as ``model(**batch)``,
            a tuple or list as ``model(*batch)``, anything else as ``model(batch)``. ``Wanda`` needs them; with
            ``Magnitude`` they only serve to report errors.
        where: ``where(name, module)`` selects layers; None selects all.
        sequential: whether every block sees the inputs that the pruned blocks before it produce, which is better and
            costs a partial forward pass over all batches per block. A block is an item of an outermost ModuleList or
            Sequential, or a layer outside them. False calibrates all layers in one pass over the dense model.
        forward: ``forward(model, batch)`` runs a batch in place of the calls above.
        axis: what the groups of a Conv2d run along: ``"input"`` channels, which hardware needs, or ``"flatten"`` for
            (channels, height, width) read as one, as some published systems do. The masks remember it.
        progress: wraps the longest loop and iterates it, as ``tqdm`` does.

    Returns:
        What was done to each layer, what was left out and why, and the time it took.

    Raises:
        TypeError: ``model`` or ``method`` is something else, or ``batches`` can be read only once while several
            passes are needed.
        ValueError: the method needs batches and there are none, nothing can be pruned, or a weight or a calibration
            input is not a number.
    """
    started = time.perf_counter()
    _check(model, method, batches, axis)
    pattern = Pattern.parse(method.pattern)
    layers, skipped = find_layers(model, pattern, axis, where)
    if not layers:
        reasons = "".join(f"; {layer.name}: {layer.reason}" for layer in skipped[:3])
        raise ValueError(f"nothing to prune: where selects no layer that can be pruned{reasons}")
    check_weights(layers)
    reports: list[LayerReport] = []
    with ExitStack() as undo, evaluating(model):
        for layer, inputs in _calibrated(model, method, layers, batches, sequential, forward, progress or iter):
            if inputs is None or len(inputs.sample) or method.statistic is None:
                reports.append(_prune_layer(layer, method, pattern, inputs, undo))
            else:
                skipped.append(Skipped(layer.name, "no calibration batch reached it"))
        if not reports:
            raise ValueError("no calibration batch reached any of the selected layers")
        undo.pop_all()
    return PruneReport(repr(method), tuple(reports), tuple(skipped), time.perf_counter() - started)


def _check(model: nn.Module, method: Method, batches: Any, axis: str) -> None:
    check_model(model)
    if not isinstance(method, Method):
        raise TypeError(f'method must be a Method such as Wanda("2:4"), got {method!r}')
    if method.statistic is not None and batches is None:
        raise ValueError(f"{method!r} needs calibration batches, got None")
    if axis not in ("input", "flatten"):
        raise ValueError(f'axis must be "input" or "flatten", got {axis!r}')


def _calibrated(
    model: nn.Module,
    method: Method,
    layers: list[Layer],
    batches: Any,
    sequential: bool,
    forward: Forward | None,
    progress: Progress,
) -> Iterable[tuple[Layer, Inputs | None]]:
    """Yields every layer when its inputs are known; it must be pruned before the next one is asked for."""
    if batches is None:
        for layer in progress(layers):
            yield layer, None
        return
    batches = as_batches(batches, reused=sequential)
    if not sequential:
        block = Block(model, tuple(layers))
        yield from zip(layers, collect(model, block, method.statistic, progress(batches), forward), strict=True)
        return
    for block in progress(execution_order(model, split_blocks(model, layers), batches, forward)):
        yield from zip(block.layers, collect(model, block, method.statistic, batches, forward), strict=True)


def _prune_layer(layer: Layer, method: Method, pattern: Pattern, inputs: Inputs | None, undo: ExitStack) -> LayerReport:
    weight = layer.weight.detach()
    pruned, mask = method.prune(grouped(weight, layer.axis), None if inputs is None else inputs.statistic)
    pruned, mask = ungrouped(pruned, layer.axis, weight.shape), ungrouped(mask, layer.axis, weight.shape)
    error = None if inputs is None else inputs.sample.relative_error(weight, pruned)
    _remember(undo, layer.module, weight, pruned)
    weight.copy_(pruned)
    set_mask(layer.module, mask, MaskInfo(pattern, layer.axis))
    dropped = mask.numel() - int(mask.sum())
    return LayerReport(layer.name, tuple(weight.shape), str(pattern), dropped, weight.numel(), error)


def _remember(undo: ExitStack, module: nn.Module, weight: Tensor, pruned: Tensor) -> None:
    """Notes how to get the layer back: the values that change, one bit for each weight, and the mask it had."""
    bits = BITS[weight.element_size()]  # compared as bits: -0.0 must come back too
    changed = weight.view(bits) != pruned.view(bits)
    where, values = pack_bits(changed.flatten(1)), weight.masked_select(changed)
    mask, info = get_mask(module), get_mask_info(module)

    def restore() -> None:
        changed = unpack_bits(where, weight.shape[1:].numel()).view(weight.shape)
        weight.masked_scatter_(changed, values)
        remove_mask(module) if mask is None or info is None else set_mask(module, mask, info)

    undo.callback(restore)
