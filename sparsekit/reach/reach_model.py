"""Prunes and compresses a model to a speed that is measured."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from torch import nn

from .. import _timing
from .._batches import Forward, Progress, observing
from .._layers import Where, check_model
from .._undo import Undo, change
from ..compress.compress_model import own_tensors
from ..compress.measure import Measure
from ..compress.memory import resident_bytes
from ..compress.sites import LayerSite, find_sites
from ..compress.swap import Swap
from ..compress.watch import watch
from ..compress.whole import Passes, compare_passes, untimed_reason
from ..nn import Compressed
from ..prune.calibration import Calibration
from ..prune.layers import check_weights, find_layers, nothing_to
from ..prune.report import Skipped
from .plans import Plan, find_plan, saving
from .report import ReachLayer, ReachReport
from .variants import PATTERN24, Form, variants
from .ways import Way, measure_ways


def reach_(
    model: nn.Module,
    batches: Any,
    sample: Any,
    speedup: float = 1.5,
    *,
    forms: Sequence[Form] = ("2:4", "tiers"),
    where: Where | None = None,
    forward: Forward | None = None,
    calibration: Calibration | None = None,
    measure: Measure | None = None,
    progress: Progress | None = None,
) -> ReachReport:
    """Prunes and compresses a model until a pass is as many times as fast as asked, at the least error, in place.

    Every linear layer is pruned by each form on the inputs that the dense model gives it, and each result is timed by
    ``compress_``'s own measurement. Every layer then takes one form, or stays dense, so that a pass saves enough time
    and the squares of the layers' output errors add up to the least: a knapsack with one item of each layer, solved by
    dynamic programming. The whole model is timed with it, dense as it was and changed in turns, and the assignment is
    made anew until the measured speed is the one asked for, five times at most; the one with the least error of those
    that were fast enough is taken. Dense layers may become ``PrepackedLinear``, which has no error. Fine-tune before
    compressing for the least loss of quality: ``decompress_``, train with ``keep_masks``, ``compress_`` again.

    Args:
        model: the model; it is timed in evaluation mode and without gradients.
        batches: what layers are calibrated on, as for ``prune_``.
        sample: the batch that the model is timed on; it says how many tokens every layer gets.
        speedup: how many times as fast as the dense model, as it is, a pass on the sample is to be; above 1.
        forms: what layers may become: ``"2:4"`` by SparseGPT, ``"tiers"`` of 16 x 16 blocks in two mixtures, and by
            rounding weights as well, for inference only, ``"int8"``, ``"2:4 int8"`` and ``"2:4 int4"``.
        where: ``where(name, module)`` selects layers; None selects all. Layers that must stay dense, such as those with
            hooks or shared weights, stay.
        forward: ``forward(model, batch)`` replaces how a model is called.
        calibration: how the model is run on the batches; all layers are calibrated in one pass.
        measure: the time for measuring; its token counts must be None.
        progress: wraps the longest loops and iterates them, as ``tqdm`` does.

    Returns:
        The form, error and times of each layer, and the predicted and the measured speed-up.

    Raises:
        TypeError: ``model`` is not a module, or ``batches`` no batches.
        ValueError: an argument is out of range, no layer can be changed, the model cannot be timed, or the speed-up
            cannot be reached; the message then names the largest that was measured.
        RuntimeError: the model is being changed already, here or in another thread.

        Whatever is raised, also by the model or by an interrupt, leaves the model as it was.
    """
    check_model(model)
    measure = Measure() if measure is None else measure
    calibration = Calibration(sequential=False, forward=forward) if calibration is None else calibration
    _check(speedup, forms, measure, calibration)
    bytes_before = resident_bytes(model)

    def work(undo: Undo) -> ReachReport:
        passes = Passes([sample], forward, measure.budget, measure.graphs)
        if remark := untimed_reason(model, passes):
            raise ValueError(f"the speed of the model cannot be measured: {remark}")
        sites, fixed = _sites(model, sample, where, forward)
        layers, skipped = find_layers(model, PATTERN24, "input", where)
        layers = [layer for layer in layers if layer.name in sites]
        if not layers:
            raise ValueError(
                nothing_to("change", "linear layer that can be pruned and compressed", where, fixed + skipped)
            )
        check_weights(layers)
        found = {
            each[0].layer.name: each for each in variants(model, layers, batches, forms, calibration, progress or iter)
        }
        sites = {name: sites[name] for name in found}
        if not sites:
            raise ValueError("no calibration batch reached any of the layers")
        ways = measure_ways(
            sites,
            found,
            forms,
            measure,
            lambda device: bytes_before > _timing.cache_bytes(device),
            progress or iter,
        )
        trial = Swap(model, sites)
        undo.callback(trial.show, {})
        with observing(model):
            (plain,) = compare_passes(trial, {}, {}, passes)

            def ratio(plan: Plan) -> float:
                (timing,) = compare_passes(trial, _build(plan, sites, trial=True), {}, passes)
                return timing.ratio

            best, plans = find_plan(ways, speedup, plain.seconds, ratio)
        trial.show({})
        for way in best.plan.values():
            way.variant.write(undo)
        swap = Swap(model, sites)
        undo.callback(swap.undo)
        with own_tensors(sites.values()):
            swap.commit(_build(best.plan, sites, trial=False))
        return _report(ways, best.plan, speedup, plain.seconds, best.ratio, plans)

    return change(model, "pruned to a speed", work)


def _check(speedup: float, forms: Sequence[Form], measure: Measure, calibration: Calibration) -> None:
    if not speedup > 1:
        raise ValueError(f"speedup must be above 1, got {speedup}")
    if isinstance(forms, str) or not forms or (unknown := [form for form in forms if form not in get_args(Form)]):
        got = repr(forms) if isinstance(forms, str) or not forms else unknown[0]
        raise ValueError(f"forms must be of {', '.join(get_args(Form))}, got {got}")
    if measure.tokens is not None:
        raise ValueError("measure must have no token counts: the sample says how many tokens each layer gets")
    if calibration.sequential:
        raise ValueError("calibration must have sequential=False: all layers are calibrated on the dense model")


def _sites(
    model: nn.Module, sample: Any, where: Where | None, forward: Forward | None
) -> tuple[dict[str, LayerSite], list[Skipped]]:
    """Returns the linear layers that may be swapped, with their calls in the sample, and the others with reasons."""
    sites = [site for site in find_sites(model, where) if not isinstance(site.layer, nn.Conv2d)]
    watch(model, sites, [sample], forward)
    free = {site.name: site for site in sites if site.reason is None}
    return free, [Skipped(site.name, site.reason) for site in sites if site.reason is not None]


def _build(plan: Plan, sites: Mapping[str, LayerSite], *, trial: bool) -> dict[str, Compressed]:
    """Returns the modules of a plan, made of the layers or, while these are still dense, of their pruned copies."""
    with own_tensors(sites.values()):
        return {
            name: way.build(way.variant.module if trial else sites[name].layer)
            for name, way in plan.items()
            if way.option is not None
        }


def _report(
    ways: Mapping[str, Sequence[Way]], plan: Plan, asked: float, seconds: float, measured: float, plans: int
) -> ReachReport:
    plain = {name: each[0].seconds for name, each in ways.items()}
    layers = tuple(
        ReachLayer(name, way.form, way.error, 1000 * plain[name], 1000 * way.seconds) for name, way in plan.items()
    )
    sparse = [[way.error for way in each if way.form == "2:4"][:1] for each in ways.values()]
    everywhere = [error for errors in sparse for error in errors]
    return ReachReport(
        layers,
        asked=asked,
        predicted=seconds / max(seconds - saving(plan, plain), 1e-9),
        measured=measured,
        error=math.hypot(*(layer.error for layer in layers)),
        error_24=math.hypot(*everywhere) if everywhere else None,
        plans=plans,
    )
