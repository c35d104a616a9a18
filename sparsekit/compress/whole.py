"""Times the whole model, compressed against plain: a layer with which a pass is slower, or fails, is given back."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from .._batches import Forward, observing, run_batch
from .._forwards import around_forwards
from .._timing import MAX_SPREAD, PARITY_RATIO, PassClock, Timing, paired_timing, time_interleaved
from .._trees import copied
from ..nn import Compressed
from .choose import Choice, Loss
from .swap import Swap

LEAST = 3  # rounds: a pass of a whole model may take minutes
TRIES = 2  # before it is believed that something does not pay


@dataclass(frozen=True)
class Passes:
    """The passes by which a whole model is timed.

    Args:
        batches: the model runs on each.
        forward: how, as in ``compress_``.
        budget: seconds of one measurement over all batches.
        graphs: whether the model will run under CUDA graphs.
    """

    batches: Sequence[Any]
    forward: Forward | None
    budget: float
    graphs: bool = False


@dataclass(frozen=True)
class Verdict:
    """What the whole model says of the choices for its layers.

    Args:
        choices: those that stand.
        modules: the compressed modules that stay.
        timings: the compressed model against the plain one, by batch.
        remark: why no time was taken.
        forms: one form for all layers against what was chosen for each, by batch, for every form that was tried.
    """

    choices: dict[str, Choice]
    modules: dict[str, Compressed]
    timings: tuple[Timing, ...] = ()
    remark: str = ""
    forms: Mapping[str, tuple[Timing, ...]] = field(default_factory=dict)

    def with_form(self, form: str, timings: tuple[Timing, ...]) -> "Verdict":
        """Returns the verdict with a form that was tried."""
        return replace(self, forms={**self.forms, form: timings})

    def with_modules(
        self, modules: dict[str, Compressed], choices: dict[str, Choice], timings: tuple[Timing, ...]
    ) -> "Verdict":
        """Returns the verdict with other modules."""
        return replace(self, modules=modules, choices=choices, timings=timings)


def judge(swap: Swap, choices: Mapping[str, Choice], modules: Mapping[str, Compressed], passes: Passes) -> Verdict:
    """Times passes of a model with and without its compressed layers, in turns, and gives back what does not pay.

    Where the whole is slower with all of them, groups of layers are added one after the other. A group with which the
    model is slower than without is given back, and so is one with which a pass fails.

    Args:
        swap: the model.
        choices: what was decided for each layer. Layers of one shape and decision are a group.
        modules: the compressed modules.
        passes: what the model is timed on.
    """
    kept, losses, timings = dict(modules), dict[str, Loss](), tuple[Timing, ...]()
    if not kept or (remark := untimed_reason(swap.model, passes)):
        return Verdict(dict(choices), kept, remark=remark if kept else "")
    with observing(swap.model):
        swap.show({})
        try:
            run_batch(swap.model, copied(passes.batches[0]), passes.forward)
        except Exception as error:  # it consumes what it is given, say, or counts its calls
            return Verdict(dict(choices), kept, remark=f"not timed, since a second pass of it fails: {_line(error)}")
        for name in _still_called(swap, modules, passes):
            losses[name] = Loss("a pass calls the plain layer, whatever is in its place")
            del kept[name]
        if kept:
            timings, loss = wins_over_plain(swap, kept, passes)
            if loss is not None:
                losses |= dict.fromkeys(kept, loss)
                kept, timings = _groups_that_pay(swap, choices, kept, losses, passes)
    lost = losses.keys() - kept.keys()
    stand = {name: choice.given_back(losses[name]) if name in lost else choice for name, choice in choices.items()}
    return Verdict(stand, kept, timings)


def _groups_that_pay(
    swap: Swap,
    choices: Mapping[str, Choice],
    modules: Mapping[str, Compressed],
    losses: dict[str, Loss],
    passes: Passes,
) -> tuple[dict[str, Compressed], tuple[Timing, ...]]:
    """Returns the modules that stay if groups are added one by one; notes in ``losses`` what is lost with others."""
    groups: dict[object, dict[str, Compressed]] = {}
    for name, module in modules.items():
        groups.setdefault((swap.sites[name].shape, choices[name].decision), {})[name] = module
    kept: dict[str, Compressed] = {}
    for group in groups.values() if len(groups) > 1 else ():
        _, loss = _wins(swap, kept | group, kept, passes)
        if loss is None:
            kept |= group
        else:
            losses |= dict.fromkeys(group, loss)
    timings, loss = wins_over_plain(swap, kept, passes) if kept else ((), None)
    return (kept, timings) if loss is None else ({}, ())


def _still_called(swap: Swap, modules: Mapping[str, Compressed], passes: Passes) -> set[str]:
    """Returns the layers that a pass calls though others are in their place: somebody holds them outside of modules."""
    called: set[str] = set()

    def around(name: str) -> Callable[..., Any]:
        def run(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            called.add(name)
            return forward(*args, **kwargs)

        return run

    swap.show(modules)
    with around_forwards({swap.sites[name].layer: around(name) for name in modules}), suppress(Exception):
        run_batch(swap.model, copied(passes.batches[0]), passes.forward)  # what fails will fail again
    return called


def untimed_reason(model: nn.Module, passes: Passes) -> str:
    """Returns why a model cannot be timed, or its time would say nothing; empty where it can."""
    if not passes.batches:
        return "not timed, since there are no batches to run it on"
    if passes.graphs:
        return "not timed, since it will run under CUDA graphs"
    if any(module._compiled_call_impl is not None or _is_compiled(module) for module in model.modules()):
        return "not timed, since it is compiled"
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if distributed and torch.distributed.get_world_size() > 1:  # all ranks would have to run equally often
        return "not timed, since other processes may take part in a pass"
    return ""


def _is_compiled(module: nn.Module) -> bool:
    return type(module).__name__ == "OptimizedModule"


def wins_over_plain(
    swap: Swap, modules: Mapping[str, Compressed], passes: Passes
) -> tuple[tuple[Timing, ...], Loss | None]:
    """Returns how a model with these modules compares with the plain one, and what is lost; None where nothing is."""
    return _wins(swap, modules, {}, passes)


def _wins(
    swap: Swap, modules: Mapping[str, Compressed], over: Mapping[str, Compressed], passes: Passes
) -> tuple[tuple[Timing, ...], Loss | None]:
    """Returns the better of two tries, since one may have been disturbed, and what is lost; None where nothing is."""
    best: tuple[Timing, ...] = ()
    try:
        for _ in range(TRIES):
            best = max(best, compare_passes(swap, modules, over, passes), key=_least_ratio)
            if _least_ratio(best) >= PARITY_RATIO:
                return best, None
    except Exception as error:
        return (), Loss(f"with it a pass fails: {_line(error)}")
    slowest = min(best, key=lambda timing: timing.ratio)
    loss = f"with it a pass takes {1 / slowest.ratio:.2f} times as long"
    if slowest.ratio * (1 + slowest.spread) >= PARITY_RATIO and slowest.spread > MAX_SPREAD:
        return best, Loss(f"undecided, the machine is busy (spread {slowest.spread:.1f}): {loss}", undecided=True)
    return best, Loss(loss)


def _least_ratio(timings: tuple[Timing, ...]) -> float:
    return min((timing.ratio for timing in timings), default=0.0)


def total_ratio(timings: tuple[Timing, ...]) -> float:
    """Returns how many times faster all batches together are."""
    return sum(timing.ratio * timing.seconds for timing in timings) / sum(timing.seconds for timing in timings)


def _line(error: Exception) -> str:
    text = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def compare_passes(
    swap: Swap, modules: Mapping[str, Compressed], over: Mapping[str, Compressed], passes: Passes
) -> tuple[Timing, ...]:
    """Times passes of the model with some compressed modules against those with others; one timing for each batch, as
    far as the budget goes.
    """

    def ready(shown: Mapping[str, Compressed]) -> Callable[[Any], Callable[[], Any]]:
        def prepare(batch: Any) -> Callable[[], Any]:
            swap.show(shown)
            arguments = copied(batch)
            return lambda: run_batch(swap.model, arguments, passes.forward)

        return prepare

    gpus = {tensor.device for tensor in swap.model.parameters() if tensor.is_cuda}
    calls, clock = {"plain": ready(over), "compressed": ready(modules)}, PassClock(gpus)
    found: list[Timing] = []
    begin = time.perf_counter()
    for batch in passes.batches:
        if found and time.perf_counter() - begin > passes.budget:
            break  # a pass may take minutes
        times = time_interleaved(calls, batch, clock, passes.budget / len(passes.batches), LEAST)
        found.append(paired_timing(times["compressed"], times["plain"], times["plain"]))
    return tuple(found)
