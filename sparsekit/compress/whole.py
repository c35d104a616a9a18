"""Times the whole model with compressed layers against the model as it was: what does not pay there is given back."""

import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .._batches import Forward, run_batch
from .._trees import copied
from .swap import Swap
from .tune import PARITY_RATIO, Timing, compare, time_interleaved
from .watch import passes

LEAST = 5  # rounds: a pass of a whole model may take minutes
TRIES = 2  # before it is believed that something does not pay


@dataclass(frozen=True)
class Verdict:
    """Which layers stay compressed, and what a pass of the model takes then.

    Args:
        names: the layers that stay compressed.
        timings: of the compressed model against the plain one, by batch; none where no time was taken.
        remark: why no time was taken.
        given_back: the ratio that a pass had with a layer that was given back, by name.
    """

    names: frozenset[str]
    timings: tuple[Timing, ...] = ()
    remark: str = ""
    given_back: dict[str, float] = field(default_factory=dict)


class _Clock:
    """Times passes of a model: arguments are made ready first, and GPUs are waited for."""

    def __init__(self, gpus: Iterable[torch.device]):
        self.gpus = tuple(gpus)

    def start(self, call: Callable[[Any], Callable[[], Any]], x: Any) -> None:
        self.seconds(call, x)

    def seconds(self, call: Callable[[Any], Callable[[], Any]], x: Any) -> float:
        run = call(x)
        self._wait()
        begin = time.perf_counter()
        run()
        self._wait()
        return time.perf_counter() - begin

    def _wait(self) -> None:
        for gpu in self.gpus:
            torch.cuda.synchronize(gpu)


@dataclass(frozen=True)
class Passes:
    """What the whole model is timed on.

    Args:
        batches: the model runs on each.
        forward: how, as in ``compress_``.
        budget: seconds of one measurement over all batches.
    """

    batches: Sequence[Any]
    forward: Forward | None
    budget: float


def judge(swap: Swap, kinds: Sequence[Collection[str]], work: Passes) -> Verdict:
    """Times a model's own forward with and without its compressed layers, in turns.

    Where the whole is slower with all of them, kinds of layers are added one after the other, and one with which the
    model is slower than without is given back.

    Args:
        swap: the compressed modules.
        kinds: the names of the layers that were decided together.
        work: what the model is timed on.
    """
    names = frozenset(swap.modules)

    def pays(shown: frozenset[str], over: frozenset[str] = frozenset()) -> tuple[Timing, ...]:
        """Of two tries the better: one may have been disturbed."""
        best: tuple[Timing, ...] = ()
        for _ in range(TRIES):
            best = max(best, compare_passes(swap, shown, over, work), key=_slowest)
            if _no_slower(best):
                break
        return best

    with passes(swap.model):
        timings = pays(names)
        if _no_slower(timings):
            return Verdict(names, timings)
        kept: frozenset[str] = frozenset()
        given_back: dict[str, float] = {}
        for kind in kinds if len(kinds) > 1 else ():
            added = pays(kept | {*kind}, over=kept)
            if _no_slower(added):
                kept |= {*kind}
            else:
                given_back |= dict.fromkeys(kind, _slowest(added))
        if kept:
            timings = pays(kept)
        if kept and _no_slower(timings):
            return Verdict(kept, timings, given_back=given_back)
        return Verdict(frozenset(), given_back=dict.fromkeys(names, _slowest(timings)) | given_back)


def compare_passes(swap: Swap, shown: Collection[str], over: Collection[str], work: Passes) -> tuple[Timing, ...]:
    """Times passes of the model with some layers compressed against those with others; one timing for each batch."""

    def ready(names: Collection[str]) -> Callable[[Any], Callable[[], Any]]:
        def prepare(batch: Any) -> Callable[[], Any]:
            swap.show(names)
            arguments = copied(batch)
            return lambda: run_batch(swap.model, arguments, work.forward)

        return prepare

    gpus = {tensor.device for tensor in swap.model.parameters() if tensor.is_cuda}
    calls, clock = {"plain": ready(over), "compressed": ready(shown)}, _Clock(gpus)
    found = []
    for batch in work.batches:
        times = time_interleaved(calls, batch, clock, work.budget / len(work.batches), LEAST)
        found.append(compare(times["compressed"], times["plain"], times["plain"]))
    return tuple(found)


def _slowest(timings: tuple[Timing, ...]) -> float:
    return min((timing.ratio for timing in timings), default=0.0)


def _no_slower(timings: tuple[Timing, ...]) -> bool:
    return _slowest(timings) >= PARITY_RATIO
