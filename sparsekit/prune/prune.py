"""The one verb: prune a model in place, all of it or nothing."""

import os
import time
from collections.abc import Generator, Iterable, Sequence
from contextlib import closing
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .._batches import Forward, Progress, as_batches, check_functions, evaluating, passes, run_batch
from .._changing import change
from .._fingerprint import digest_batches
from .._layers import Where, check_model, count_weights
from .._reads import watch_reads
from .._trees import copied
from .._undo import Undo
from ..masks import Pattern, grouped, ungrouped
from .apply import apply_mask
from .batchnorm import reestimate, tracked_batchnorms
from .calibration import calibrated
from .experts import find_experts, gather_inputs, prune_experts
from .full_precision import full_precision
from .held import HeldBatches
from .inputs import Gather, Inputs
from .layers import Layer, check_result, check_weights, find_layers, first_reasons, nothing_to
from .methods import Method
from .padding import TokenMask
from .ranks import Group, Ranks, local_buffers
from .report import LayerReport, PruneReport, Skipped
from .resume import Finished, call_of
from .store import Store


def prune_(
    model: nn.Module,
    method: Method,
    batches: Any = None,
    *,
    where: Where | None = None,
    sequential: bool = True,
    forward: Forward | None = None,
    axis: Literal["input", "flatten"] = "input",
    token_mask: TokenMask | None = None,
    batchnorm: bool = True,
    group: Group = "world",
    progress: Progress | None = None,
    resume: str | os.PathLike[str] | None = None,
) -> PruneReport:
    """Prunes the Linear and Conv2d layers of a model, and its experts, in place, and stores each mask with its layer.

    Works on any tree of modules, including transformers' Conv1D. The weights stay dense tensors with zeros in them;
    ``keep_masks`` fine-tunes them. Make a ``torch.optim.swa_utils.AveragedModel`` afterwards: it pairs buffers by their
    order, and masks are some. Whatever fails, ``KeyboardInterrupt`` included, the model is as it was.

    Left out, with the reason in the report, is every other parameter of at least two dimensions and one group, and
    every layer that may compute something else than its class says or whose weight is not its own: a subclass with a
    ``forward`` of its own; weights that are not initialized, computed (parametrized), of a tensor subclass, tied to
    another parameter or in its memory, or read by a parent that does not call the layer, as ``nn.MultiheadAttention``
    does; convolutions in groups; layers with too few inputs for one group, or that no batch reached.

    Experts are parameters ``[experts, ...]`` of whose matrices a module multiplies its inputs by one or another, as
    transformers' mixtures have them. Every matrix is pruned by itself, in groups along its inputs, on the tokens that
    are routed to it; one that gets none, by magnitude, and the report says so. Which dimension the inputs run along is
    known of transformers' experts and of gated ones; else the batches must show it.

    Args:
        model: pruned in place; evaluation mode meanwhile.
        method: ``Magnitude("2:4")``, ``Wanda("2:4")``, or another ``Method``.
        batches: calibration inputs, one batch or an iterable that can be read again, such as a list or a DataLoader;
            the model is given copies of them, on the device they are on. A mapping is called as ``model(**batch)``,
            a tuple or list as ``model(*batch)``, anything else as ``model(batch)``. ``Wanda`` needs them; with
            ``Magnitude`` they only serve to report errors. Any number of them: a loader is read once, whatever shuffles
            it, and what it makes is held in a file where it is much.
        where: ``where(name, module)`` selects layers; None selects all.
        sequential: whether every stage is calibrated on what the pruned stages before it produce, which is better. A
            stage is an item of an outermost ModuleList or Sequential, or a layer outside them. It waits for every batch
            that comes to it, whatever route that takes, and runs three times on each in all: to find the order, to be
            measured, and pruned. The model is called from the start for every stage, but finished stages only give what
            they gave before, in bounded memory; where a stage leaves more behind than its output, such as a cache that
            others read, they run again. False calibrates all layers in one pass over the dense model.
        forward: ``forward(model, batch)`` runs a batch in place of the calls above.
        axis: what the groups of a Conv2d run along: ``"input"`` channels, which hardware needs, or ``"flatten"`` for
            (channels, height, width) read as one, as some published systems do. The masks remember it.
        token_mask: ``token_mask(batch)`` returns which tokens of a batch count, ``[batch, tokens]`` with 0 for padding,
            or None where all do. By default a batch that is a mapping says so by its ``attention_mask``, and for a
            decoder by its ``decoder_attention_mask``, where that is ``[batch, tokens]``; a mask of another shape says
            nothing about padding. What a convolution sees counts whole.
        batchnorm: whether every BatchNorm that runs after a pruned layer gets the statistics that its inputs have then,
            in one more pass over the batches (``reestimate_batchnorm_``): those of the dense model are wrong by then.
        group: the processes that prune the model together where ``torch.distributed`` is initialized, each with batches
            of its own: all of them call ``prune_``, their statistics are added up, and all get the same masks and
            weights. ``"world"`` is all processes, ``"alone"`` this one without the others; or a process group.
        progress: wraps the longest loop and iterates it, as ``tqdm`` does.
        resume: a folder where every finished block is kept. The same call goes on after the last block that it finds
            there; another one is refused: it needs the same weights, method, layers, and batches, in the same order, so
            seed what shuffles. Only with ``sequential`` batches, which are read once more. Of ``forward`` only the name
            can be compared.

    Returns:
        What was done to each layer, what was left out and why, and the time it took.

    Raises:
        TypeError: ``model``, ``method`` or ``group`` is something else, or ``batches`` can be read only once while
            several passes are needed.
        ValueError: the method needs batches and there are none, nothing can be pruned, a weight or a calibration input
            is NaN or infinite, or a new weight would be; the processes of the group hold different models; or
            ``resume`` holds another run, or a file that is damaged or missing.
        RuntimeError: the model is being changed already, here or in another thread, or another process has failed.
    """
    started = time.perf_counter()
    _check(model, method, batches, axis)
    check_functions(forward=forward, token_mask=token_mask, progress=progress)
    if resume is not None and (batches is None or not sequential):
        raise ValueError("resume goes on block by block: it needs batches and sequential=True")
    batchnorms = tracked_batchnorms(model) if batchnorm and batches is not None else {}
    store = Store()
    if batches is not None:
        again = sequential or bool(batchnorms)
        batches = HeldBatches(as_batches(batches, reused=again), store if again else None)
    ranks = Ranks("alone" if batches is None else group, method.statistic)

    def work(undo: Undo) -> PruneReport:
        pattern = Pattern.parse(method.pattern)
        observed = None if batches is None else find_experts(model, batches.first, forward)
        layers, skipped = find_layers(model, pattern, axis, where, observed)
        if not layers:
            raise ValueError(nothing_to("prune", "layer that can be pruned", where, skipped))
        check_weights(layers)
        read = ranks.exchange(None if resume is None else digest_batches(batches))
        finished = None
        if resume is not None:
            finished = Finished(resume, call_of(model, method, layers, read, forward, token_mask, axis), layers)
        done = None if finished is None else sorted(finished.names)
        ranks.agree({"method": repr(method), "axis": axis, "finished": done}, layers)
        reports: list[LayerReport] = []
        gather = partial(gather_inputs, statistic=method.statistic, token_mask=token_mask)
        shown = _shown(model, gather, layers, batches, sequential, forward, progress or iter, finished, ranks)
        missed: list[Layer] = []
        with evaluating(model), local_buffers(model), closing(store), closing(shown):
            if finished is not None:
                reports += _restore(finished, layers, undo)
                if ranks.rank == 0:
                    finished.begin()
            for members, gathered in shown:
                block = []
                for layer, inputs in zip(members, ranks.share(gathered), strict=True):
                    if inputs is None or len(inputs.sample) or method.statistic is None:
                        block.append((layer, _prune_layer(layer, method, pattern, inputs, ranks, undo)))
                    else:
                        missed.append(layer)
                reports += [report for _, report in block]
                if finished is not None and block and ranks.rank == 0:
                    finished.add(block)
            if missed:
                reasons = _why_missed(model, missed, [] if batches is None else batches.first(), forward)
                skipped += [Skipped(layer.name, reasons[layer]) for layer in missed]
            if not reports:
                raise ValueError(f"no calibration batch reached any of the selected layers{first_reasons(skipped)}")
            norms: tuple[str, ...] = ()
            if batchnorms:
                pruned = {report.name for report in reports}
                after = {layer.module for layer in layers if layer.name in pruned}
                norms = reestimate(model, batchnorms, batches, forward, ranks, undo, after)
        seconds = time.perf_counter() - started
        return PruneReport(repr(method), tuple(reports), tuple(skipped), seconds, count_weights(model), norms)

    return change(model, "pruned", ranks.together(work))


def _check(model: nn.Module, method: Method, batches: Any, axis: str) -> None:
    check_model(model)
    if not isinstance(method, Method):
        raise TypeError(f'method must be a Method such as Wanda("2:4"), got {method!r}')
    if method.statistic is not None and batches is None:
        raise ValueError(f"{method!r} needs calibration batches, got None")
    if axis not in ("input", "flatten"):
        raise ValueError(f'axis must be "input" or "flatten", got {axis!r}')


def _shown(
    model: nn.Module,
    gather: Gather,
    layers: list[Layer],
    batches: Any,
    sequential: bool,
    forward: Forward | None,
    progress: Progress,
    finished: Finished | None,
    ranks: Ranks,
) -> Generator[tuple[Sequence[Layer], Sequence[Inputs | None]]]:
    if batches is None:
        yield from (([layer], [None]) for layer in progress(layers))
        return
    yield from calibrated(
        model,
        layers,
        gather,
        batches,
        sequential=sequential,
        forward=forward,
        progress=progress,
        finished=() if finished is None else finished.names,
        exchange=ranks.exchange,
    )


def _why_missed(
    model: nn.Module, layers: Sequence[Layer], batches: Sequence[Any], forward: Forward | None
) -> dict[Layer, str]:
    """Why no batch reached these layers: a pass may read their weights without calling them."""
    with passes(model), watch_reads(model, [layer.module for layer in layers]) as reads:
        for batch in batches:
            run_batch(model, copied(batch), forward)
    return {layer: reads.get(layer.module, "no calibration batch reached it") for layer in layers}


def _restore(finished: Finished, layers: list[Layer], undo: Undo) -> Iterable[LayerReport]:
    """Gives the layers of finished blocks what an earlier run found."""
    by_name = {layer.name: layer for layer in layers}
    for index in range(len(finished)):
        for report, weight, mask in finished.read(index):
            layer = by_name[report.name]
            device = layer.weight.device
            with full_precision():
                apply_mask(layer, weight.to(device), mask.to(device), Pattern.parse(report.pattern), undo)
            yield report


def _prune_layer(
    layer: Layer, method: Method, pattern: Pattern, inputs: Inputs | None, ranks: Ranks, undo: Undo
) -> LayerReport:
    weight, started, remark = layer.weight.detach(), time.perf_counter(), ""
    with full_precision():
        if layer.experts:
            pruned, mask, remark = prune_experts(layer, method, inputs, _prune_matrix)
        else:
            pruned, mask = _prune_matrix(layer, method, inputs)
        ranks.exchange()  # one that could not prune the layer says so here
        pruned, mask = ranks.broadcast(pruned), ranks.broadcast(mask)
        check_result(layer, pruned, method)
        error = None if inputs is None else inputs.sample.relative_error(weight, pruned)
        apply_mask(layer, pruned, mask, pattern, undo)
        dropped = mask.numel() - int(torch.count_nonzero(mask))
    seconds = time.perf_counter() - started
    shape, weights = tuple(weight.shape), weight.numel()
    return LayerReport(layer.name, shape, str(pattern), dropped, weights, error, seconds, remark)


def _prune_matrix(layer: Layer, method: Method, inputs: Inputs | None) -> tuple[Tensor, Tensor]:
    """The new weight of a layer, and its mask, as the layer keeps them."""
    weight = layer.weight.detach()
    dense = grouped(weight, layer.axis)
    pruned, mask = method.prune(dense, None if inputs is None else inputs.statistic)
    if pruned.shape != dense.shape or mask.shape != dense.shape:
        shapes = f"a weight {tuple(pruned.shape)} and a mask {tuple(mask.shape)}"
        raise ValueError(f"{method!r} must return both of the shape {tuple(dense.shape)} that it got, got {shapes}")
    new = ungrouped(pruned, layer.axis, weight.shape).to(weight.dtype)
    return new, ungrouped(mask, layer.axis, weight.shape)
