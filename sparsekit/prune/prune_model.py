"""``prune_``: prunes a model in place, all of it or nothing."""

import os
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from functools import partial
from typing import Any, Literal

from torch import nn

from .._batches import Progress, as_batches, check_functions, evaluating, observing, run_batch
from .._digest import digest_batches
from .._forwards import watch_reads
from .._layers import Where, check_model, count_weights
from .._trees import copied
from .._undo import Undo, change
from ..masks import Pattern
from .apply_mask import apply_mask
from .batchnorm import reestimate, tracked_batchnorms
from .calibration import Calibration, calibrate
from .calibration.experts import find_experts, make_inputs
from .calibration.held_batches import HeldBatches
from .calibration.inputs import LayerInputs
from .calibration.output_store import OutputStore
from .calibration.ranks import Ranks, local_buffers
from .full_precision import full_precision
from .layers import PrunableLayer, check_weights, find_layers, first_reasons, nothing_to
from .methods import Method
from .prune_layer import prune_layer
from .report import PruneLayerReport, PruneReport, Skipped
from .resume import FinishedStages, describe_call


def prune_(
    model: nn.Module,
    method: Method,
    batches: Any = None,
    *,
    where: Where | None = None,
    axis: Literal["input", "flatten"] = "input",
    calibration: Calibration | None = None,
    progress: Progress | None = None,
    resume: str | os.PathLike[str] | None = None,
) -> PruneReport:
    """Prunes the Linear and Conv2d layers of a model, and its experts, in place, and stores each mask with its layer.

    It works on any tree of modules, including transformers' Conv1D. The weights stay dense tensors with zeros in them,
    which ``keep_masks`` fine-tunes. Make a ``torch.optim.swa_utils.AveragedModel`` after pruning: it pairs buffers by
    their order, and masks are buffers. If anything fails, or is interrupted, the model is as it was.

    The report lists every other parameter that has at least two dimensions and one group, and why it was left out. So
    are layers that may compute something else than their class says, or whose weight is not their own: a subclass with
    its own ``forward``; a weight that is not initialized, computed (parametrized), of a tensor subclass, tied to
    another parameter or in its memory, or read by a parent that does not call the layer, as ``nn.MultiheadAttention``
    does. Also left out are convolutions in groups, and layers that have too few inputs for one group or that no batch
    reaches.

    Experts are parameters ``[experts, ...]`` of a module that multiplies each token by some of the matrices, as in
    transformers' mixtures of experts. Every matrix is pruned by itself, in groups along its inputs, on the tokens that
    are routed to it; one that gets no token is pruned by magnitude, and the report says so. For transformers' experts
    and gated ones it is known along which dimension the inputs run; for others the batches must show it.

    Args:
        model: pruned in place; in evaluation mode while it is pruned.
        method: ``Magnitude("2:4")``, ``Wanda("2:4")``, or another ``Method``.
        batches: calibration inputs: one batch, or an iterable that can be read again, such as a list or a DataLoader.
            The model gets copies of them, on their device. ``Wanda`` needs them; with ``Magnitude`` they only serve to
            report errors. There may be any number of them: a loader is read once, even if it shuffles, and its batches
            are kept in a file if they are large.
        where: ``where(name, module)`` selects layers; None selects all.
        axis: what the groups of a Conv2d run along: ``"input"`` channels, which hardware needs, or ``"flatten"`` for
            (channels, height, width) read as one, as some published systems do. It is stored with the mask.
        calibration: how the model is run on the batches; None is ``Calibration()``.
        progress: wraps the longest loop and iterates it, as ``tqdm`` does.
        resume: a folder in which every finished stage is stored. The same call goes on after the last stage that it
            finds there. A different call is rejected: weights, method, layers and batches must be the same, and the
            batches in the same order, so seed a loader that shuffles. Needs batches and sequential calibration; the
            batches are read once more. Functions in ``calibration`` are compared by their names only.

    Returns:
        What was done to each layer, what was left out and why, and the time it took.

    Raises:
        TypeError: ``model``, ``method``, ``calibration`` or its ``group`` has a wrong type, or ``batches`` can be read
            only once while several passes are needed.
        ValueError: the method needs batches and there are none, nothing can be pruned, a weight or a calibration input
            is NaN or infinite, or a new weight would be; the processes of the group hold different models; or
            ``resume`` holds another run, or a file in it is damaged or missing.
        RuntimeError: the model is being changed already, here or in another thread, or another process has failed.
    """
    started = time.perf_counter()
    calibration = Calibration() if calibration is None else calibration
    _check(model, method, batches, axis, calibration)
    check_functions(progress=progress)
    if resume is not None and (batches is None or not calibration.sequential):
        raise ValueError("resume goes on stage by stage: it needs batches and sequential calibration")
    batchnorms = tracked_batchnorms(model) if calibration.batchnorm and batches is not None else {}
    store = OutputStore()
    if batches is not None:
        reused = calibration.sequential or bool(batchnorms)
        batches = HeldBatches(as_batches(batches, reused=reused), store if reused else None)
    ranks = Ranks("alone" if batches is None else calibration.group, method.statistic)

    def work(undo: Undo) -> PruneReport:
        pattern = Pattern.parse(method.pattern)
        observed = None if batches is None else find_experts(model, batches.first, calibration.forward)
        layers, skipped = find_layers(model, pattern, axis, where, observed)
        if not layers:
            raise ValueError(nothing_to("prune", "layer that can be pruned", where, skipped))
        check_weights(layers)
        for layer in layers:
            for each in layer.experts or (layer,):
                method.for_layer(each)  # raises if it cannot
        digests = ranks.exchange(None if resume is None else digest_batches(batches))
        finished = None
        if resume is not None:
            finished = FinishedStages(resume, describe_call(model, method, layers, digests, calibration, axis), layers)
        done = None if finished is None else sorted(finished.names)
        ranks.agree({"method": repr(method), "axis": axis, "finished": done}, layers)
        reports: list[PruneLayerReport] = []
        missed: list[PrunableLayer] = []
        stages = _stages(model, layers, method, batches, calibration, ranks, progress or iter, done or ())
        with evaluating(model), local_buffers(model), closing(store), closing(stages):
            if finished is not None:
                reports += _restore(finished, layers, undo)
                if ranks.rank == 0:
                    finished.begin()
            for members, collected in stages:
                stage = []
                for layer, inputs in zip(members, ranks.add_up(collected), strict=True):
                    if inputs is None or len(inputs.sample) or method.statistic is None:
                        stage.append((layer, prune_layer(layer, method, pattern, inputs, ranks, undo)))
                    else:
                        missed.append(layer)
                reports += [report for _, report in stage]
                if finished is not None and stage and ranks.rank == 0:
                    finished.add(stage)
            if missed:
                reasons = _missed_reasons(model, missed, batches, calibration)
                skipped += [Skipped(layer.name, reasons[layer]) for layer in missed]
            if not reports:
                raise ValueError(f"no calibration batch reached any of the selected layers{first_reasons(skipped)}")
            norms: tuple[str, ...] = ()
            if batchnorms:
                pruned = {report.name for report in reports}
                after = {layer.module for layer in layers if layer.name in pruned}
                norms = reestimate(model, batchnorms, batches, calibration.forward, ranks, undo, after)
        seconds = time.perf_counter() - started
        return PruneReport(repr(method), tuple(reports), tuple(skipped), seconds, count_weights(model), norms)

    return change(model, "pruned", ranks.together(work))


def _check(model: nn.Module, method: Method, batches: Any, axis: str, calibration: Calibration) -> None:
    check_model(model)
    if not isinstance(method, Method):
        raise TypeError(f'method must be a Method such as Wanda("2:4"), got {method!r}')
    if method.statistic is not None and batches is None:
        raise ValueError(f"{method!r} needs calibration batches, got None")
    if axis not in ("input", "flatten"):
        raise ValueError(f'axis must be "input" or "flatten", got {axis!r}')
    check_calibration(calibration)


def check_calibration(calibration: Any) -> None:
    """Rejects anything but a ``Calibration``."""
    if not isinstance(calibration, Calibration):
        raise TypeError(f"calibration must be a Calibration such as Calibration(sequential=False), got {calibration!r}")


def _stages(
    model: nn.Module,
    layers: list[PrunableLayer],
    method: Method,
    batches: HeldBatches | None,
    calibration: Calibration,
    ranks: Ranks,
    progress: Progress,
    done: Sequence[str],
) -> Generator[tuple[Sequence[PrunableLayer], Sequence[LayerInputs | None]]]:
    """Yields the layers of each stage with their inputs; without batches, one layer after the other with None."""
    if batches is None:
        yield from (([layer], [None]) for layer in progress(layers))
    else:
        make = partial(make_inputs, statistic=method.statistic, token_mask=calibration.token_mask)
        yield from calibrate(model, layers, make, batches, calibration, ranks, progress=progress, finished=done)


def _missed_reasons(
    model: nn.Module, layers: Sequence[PrunableLayer], batches: HeldBatches | None, calibration: Calibration
) -> dict[PrunableLayer, str]:
    """Finds out why no batch reached these layers: a pass may read their weights without calling them."""
    with observing(model), watch_reads(model, [layer.module for layer in layers]) as reads:
        for batch in [] if batches is None else batches.first():
            run_batch(model, copied(batch), calibration.forward)
    return {layer: reads.get(layer.module, "no calibration batch reached it") for layer in layers}


def _restore(finished: FinishedStages, layers: list[PrunableLayer], undo: Undo) -> Iterator[PruneLayerReport]:
    """Writes the weights and masks of stages that an earlier run finished into their layers; yields the reports."""
    by_name = {layer.name: layer for layer in layers}
    for index in range(len(finished)):
        for report, weight, mask in finished.read(index):
            layer = by_name[report.name]
            device = layer.weight.device
            with full_precision():
                apply_mask(layer, weight.to(device), mask.to(device), Pattern.parse(report.pattern), undo)
            yield report
