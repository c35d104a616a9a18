"""Times the whole model with compressed layers against the model as it was: what does not pay there is given back."""

import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .._batches import Forward, observing, run_batch
from .._forwards import around_forwards
from .._timing import PARITY_RATIO, Timing, paired_timing, time_interleaved
from .._trees import copied
from .decide import Choice
from .swap import Swap

LEAST = 3  # rounds: a pass of a whole model may take minutes
TRIES = 2  # before it is believed that something does not pay


@dataclass(frozen=True)
class Verdict:
    """Which layers stay compressed, and what a pass of the model takes then.

    Args:
        names: the layers that stay compressed.
        timings: of the compressed model against the plain one, by batch; none where no time was taken.
        remark: why no time was taken.
        given_back: why a layer does not stay compressed, by name.
    """

    names: frozenset[str]
    timings: tuple[Timing, ...] = ()
    remark: str = ""
    given_back: dict[str, str] = field(default_factory=dict)


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
        graphs: whether it will run under CUDA graphs.
    """

    batches: Sequence[Any]
    forward: Forward | None
    budget: float
    graphs: bool = False


def judge(swap: Swap, choices: Mapping[str, Choice], work: Passes) -> Verdict:
    """Times a model's own forward with and without its compressed layers, in turns.

    Where the whole is slower with all of them, kinds of layers are added one after the other, and one with which the
    model is slower than without is given back; so is one with which a pass fails.

    Args:
        swap: the compressed modules.
        choices: what was decided for each of them; those of one shape and decision stay or go together.
        work: what the model is timed on.
    """
    names = frozenset(swap.modules)
    if not names or (remark := _untimed(swap.model, work)):
        return Verdict(names, remark=remark if names else "")
    with observing(swap.model):
        swap.show(())
        try:
            run_batch(swap.model, copied(work.batches[0]), work.forward)
        except Exception as error:  # it consumes what it is given, say, or counts its calls
            return Verdict(names, remark=f"not timed, since a second pass of it fails: {_line(error)}")
        given_back = dict.fromkeys(_still_called(swap, work), "a pass calls the plain layer, whatever is in its place")
        names -= given_back.keys()
        if not names:
            return Verdict(names, given_back=given_back)
        timings, loss = _pays(swap, names, frozenset(), work)
        if loss is None:
            return Verdict(names, timings, given_back=given_back)
        kinds: dict[object, set[str]] = {}
        for name in names:
            kinds.setdefault((swap.sites[name].shape, choices[name].decision), set()).add(name)
        kept: frozenset[str] = frozenset()
        given_back |= dict.fromkeys(names, loss)
        for kind in kinds.values() if len(kinds) > 1 else ():
            _, lost = _pays(swap, kept | kind, kept, work)
            if lost is None:
                kept |= kind
            else:
                given_back |= dict.fromkeys(kind, lost)
        if kept:
            timings, loss = _pays(swap, kept, frozenset(), work)
            if loss is None:
                return Verdict(kept, timings, given_back=given_back)
        return Verdict(frozenset(), given_back=given_back)


def _still_called(swap: Swap, work: Passes) -> set[str]:
    """The layers that a pass calls though others hang in their place: somebody holds them outside of all modules."""
    called: set[str] = set()

    def around(name: str) -> Callable[..., Any]:
        def run(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            called.add(name)
            return forward(*args, **kwargs)

        return run

    swap.show(swap.modules)
    with around_forwards({site.layer: around(name) for name, site in swap.sites.items()}), suppress(Exception):
        run_batch(swap.model, copied(work.batches[0]), work.forward)  # what fails will fail again
    return called


def _untimed(model: nn.Module, work: Passes) -> str:
    """Why it would say nothing to time a model, or could not be done; empty where it would."""
    if not work.batches:
        return "not timed, since there are no batches to run it on"
    if work.graphs:
        return "not timed, since it will run under CUDA graphs"
    if any(module._compiled_call_impl is not None or _is_compiled(module) for module in model.modules()):
        return "not timed, since it is compiled"
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if distributed and torch.distributed.get_world_size() > 1:  # all ranks would have to run equally often
        return "not timed, since other processes may take part in a pass"
    return ""


def _is_compiled(module: nn.Module) -> bool:
    return type(module).__name__ == "OptimizedModule"


def _pays(
    swap: Swap, shown: frozenset[str], over: frozenset[str], work: Passes
) -> tuple[tuple[Timing, ...], str | None]:
    """The better of two tries, since one may have been disturbed; and what is lost, None where nothing is."""
    best: tuple[Timing, ...] = ()
    try:
        for _ in range(TRIES):
            best = max(best, compare_passes(swap, shown, over, work), key=_slowest)
            if _slowest(best) >= PARITY_RATIO:
                return best, None
    except Exception as error:
        return (), f"with it a pass fails: {_line(error)}"
    return best, f"with it a pass takes {1 / _slowest(best):.2f} times as long"


def _slowest(timings: tuple[Timing, ...]) -> float:
    return min((timing.ratio for timing in timings), default=0.0)


def _line(error: Exception) -> str:
    text = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def compare_passes(swap: Swap, shown: Collection[str], over: Collection[str], work: Passes) -> tuple[Timing, ...]:
    """Times passes of the model with some layers compressed against those with others; one timing for each batch, as
    far as the budget goes.
    """

    def ready(names: Collection[str]) -> Callable[[Any], Callable[[], Any]]:
        def prepare(batch: Any) -> Callable[[], Any]:
            swap.show(names)
            arguments = copied(batch)
            return lambda: run_batch(swap.model, arguments, work.forward)

        return prepare

    gpus = {tensor.device for tensor in swap.model.parameters() if tensor.is_cuda}
    calls, clock = {"plain": ready(over), "compressed": ready(shown)}, _Clock(gpus)
    found: list[Timing] = []
    begin = time.perf_counter()
    for batch in work.batches:
        if found and time.perf_counter() - begin > work.budget:
            break  # a pass may take minutes
        times = time_interleaved(calls, batch, clock, work.budget / len(work.batches), LEAST)
        found.append(paired_timing(times["compressed"], times["plain"], times["plain"]))
    return tuple(found)
