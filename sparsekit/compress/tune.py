"""Measures the candidates of every layer against the plain layer, once for all layers of a kind."""

import copy
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .. import _timing
from .._batches import Progress
from .._timing import TOLERANCE, Call, Clock, Timings, paired_timing, time_interleaved
from ..nn import Compressed
from . import cache
from .candidates import Candidate
from .kinds import Kind, random_layer

REPEATS = 2  # of every measurement on a CPU, which other programs disturb for seconds at a time


def measure_kinds(
    kinds: Mapping[Kind, tuple[Any, Sequence[Candidate]]], budget: float, progress: Progress
) -> dict[Kind, Timings]:
    """Measures every kind of layer, on a CPU twice, and returns the less favorable times.

    Steady times come from the tune cache and go into it. Two that disagree leave it again: one of them was disturbed
    all the time, and nobody knows which.

    Args:
        kinds: a layer of each kind, and the candidates to measure for it.
        budget: seconds for a kind.
        progress: wraps the loop over the measurements and iterates it.
    """
    repeats = {kind: 1 if _timing.is_gpu(layer.weight.device) else REPEATS for kind, (layer, _) in kinds.items()}
    found: dict[Kind, Timings] = {}
    for repeat, kind in progress([(turn, kind) for turn in range(REPEATS) for kind in kinds if turn < repeats[kind]]):
        layer, candidates = kinds[kind]
        work = partial(_measure_kind, kind, layer, candidates, budget / repeats[kind])
        timings = cache.remembered(_key(kind, repeat), work, layer.weight.device)
        found[kind] = _timing.pessimistic(found[kind], timings) if kind in found else timings
    for kind, timings in found.items():
        if not cache.is_steady(timings):
            for repeat in range(repeats[kind]):
                cache.forget(_key(kind, repeat), kinds[kind][0].weight.device)
    return found


def _key(kind: Kind, repeat: int) -> dict[str, object]:
    return {**asdict(kind), "repeat": repeat}


def _measure_kind(kind: Kind, layer: nn.Module, candidates: Sequence[Candidate], budget: float) -> Timings:
    plain, x = random_layer(kind, layer)
    clock = _timing.clock(x.device, evict_cache=kind.evict_cache, graphs=kind.graphs)
    calls: dict[str, Call | None] = {}
    for candidate in candidates:
        calls |= candidate.calls(kind, plain, x, clock)
    right = {name: call for name, call in calls.items() if call is not None}
    dense = tuple(candidate.name for candidate in candidates if candidate.dense and candidate.name in right)
    timings = measure(right, plain, x, dense=dense, clock=clock, budget=budget)
    return timings | {name: None for name in calls if name not in right}


def measure(
    calls: Mapping[str, Call], plain: nn.Module, x: Tensor, *, dense: tuple[str, ...], clock: Clock, budget: float
) -> Timings:
    """Times calls that compute the same on one input against a module, and checks what they compute against it.

    A lossy layer is checked against its own reference instead.

    Rounds go on for ``budget`` seconds, with at least 9 and at most 101; the order changes from round to round. Every
    result is checked before and after, since some kernels are wrong now and then
    (https://github.com/pytorch/pytorch/issues/155333).

    Args:
        calls: what computes the same as ``plain``, by name.
        plain: the baseline and the reference.
        x: the input.
        dense: the names among which, with ``"plain"``, the best dense is chosen.
        clock: times a call.
        budget: seconds.

    Returns:
        One ``Timing`` per name, ``"plain"`` first; None for a call that is wrong.
    """
    with torch.no_grad():
        exact = expected(plain, x)
        of = {name: expected(call, x) if _is_lossy(call) else exact for name, call in calls.items()}
        right = {name: call for name, call in calls.items() if is_right(call, x, of[name])}
        times = time_interleaved({"plain": plain, **right}, x, clock, budget)
        for name, call in right.items():
            if not is_right(call, x, of[name]):
                del times[name]
    names = [name for name in ("plain", *dense) if name in times]
    best = min(names, key=lambda name: statistics.median(times[name]))
    return {
        name: paired_timing(times[name], times["plain"], times[best]) if name in times else None
        for name in ("plain", *calls)
    }


def expected(layer: Any, x: Tensor) -> Tensor:
    """Returns what a plain layer, or a lossy one, should give for the rows that are checked, in float64."""
    if _is_lossy(layer):
        return layer.reference(_checked(x)).double()
    return copy.deepcopy(layer).double()(_checked(x).double())


def _is_lossy(call: object) -> bool:
    return isinstance(call, Compressed) and call.lossy


def is_right(call: Call, x: Tensor, exact: Tensor) -> bool:
    """Returns whether a call gives ``expected(plain, x)``, up to the rounding of its dtype."""
    difference = (_checked(call(x)).double() - exact).abs().amax()
    return bool(difference <= TOLERANCE[x.dtype] * exact.abs().amax())


def _checked(x: Tensor) -> Tensor:
    """Returns some rows, the first and the last among them: all of them in float64 would take longer than timing."""
    count = 3 if x.device.type == "cpu" else 64
    return x[torch.linspace(0, len(x) - 1, min(count, len(x)), dtype=torch.float64, device=x.device).long()]
