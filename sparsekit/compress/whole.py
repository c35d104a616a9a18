"""Times the whole model, compressed against plain: a layer with which a pass is slower, or fails, is given back."""

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .._batches import Forward, observing, run_batch
from .._forwards import around_forwards
from .._timing import PARITY_RATIO, PassClock, Timing, paired_timing, time_interleaved
from .._trees import copied
from .choose import Choice
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


def judge(
    swap: Swap, choices: Mapping[str, Choice], passes: Passes
) -> tuple[dict[str, Choice], tuple[Timing, ...], str]:
    """Times passes of a model with and without its compressed layers, in turns, and gives back what does not pay.

    Where the whole is slower with all of them, groups of layers are added one after the other. A group with which the
    model is slower than without is given back, and so is one with which a pass fails.

    Args:
        swap: the compressed modules.
        choices: what was decided for each layer. Layers of one shape and decision are a group.
        passes: what the model is timed on.

    Returns:
        ``(choices, timings, remark)``: the choices that stand; the compressed model against the plain one, by batch;
        and why no time was taken.
    """
    kept = frozenset(swap.modules)
    if not kept or (remark := _untimed(swap.model, passes)):
        return dict(choices), (), remark if kept else ""
    with observing(swap.model):
        swap.show(())
        try:
            run_batch(swap.model, copied(passes.batches[0]), passes.forward)
        except Exception as error:  # it consumes what it is given, say, or counts its calls
            return dict(choices), (), f"not timed, since a second pass of it fails: {_line(error)}"
        losses = dict.fromkeys(_still_called(swap, passes), "a pass calls the plain layer, whatever is in its place")
        timings: tuple[Timing, ...] = ()
        kept -= losses.keys()
        if kept:
            timings, loss = _pays(swap, kept, frozenset(), passes)
            if loss is not None:
                losses |= dict.fromkeys(kept, loss)
                kept, timings = _groups_that_pay(swap, choices, kept, losses, passes)
    lost = losses.keys() - kept
    stand = {name: choice.given_back(losses[name]) if name in lost else choice for name, choice in choices.items()}
    return stand, timings, ""


def _groups_that_pay(
    swap: Swap, choices: Mapping[str, Choice], names: frozenset[str], losses: dict[str, str], passes: Passes
) -> tuple[frozenset[str], tuple[Timing, ...]]:
    """Returns the layers that stay if groups are added one by one, and notes in ``losses`` what is lost with others."""
    groups: dict[object, set[str]] = {}
    for name in [name for name in swap.modules if name in names]:
        groups.setdefault((swap.sites[name].shape, choices[name].decision), set()).add(name)
    kept: frozenset[str] = frozenset()
    for group in groups.values() if len(groups) > 1 else ():
        _, loss = _pays(swap, kept | group, kept, passes)
        if loss is None:
            kept |= group
        else:
            losses |= dict.fromkeys(group, loss)
    timings, loss = _pays(swap, kept, frozenset(), passes) if kept else ((), None)
    return (kept, timings) if loss is None else (frozenset(), ())


def _still_called(swap: Swap, passes: Passes) -> set[str]:
    """Returns the layers that a pass calls though others are in their place: somebody holds them outside of modules."""
    called: set[str] = set()

    def around(name: str) -> Callable[..., Any]:
        def run(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            called.add(name)
            return forward(*args, **kwargs)

        return run

    swap.show(swap.modules)
    with around_forwards({site.layer: around(name) for name, site in swap.sites.items()}), suppress(Exception):
        run_batch(swap.model, copied(passes.batches[0]), passes.forward)  # what fails will fail again
    return called


def _untimed(model: nn.Module, passes: Passes) -> str:
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


def _pays(
    swap: Swap, shown: frozenset[str], over: frozenset[str], passes: Passes
) -> tuple[tuple[Timing, ...], str | None]:
    """Returns the better of two tries, since one may have been disturbed, and what is lost; None where nothing is."""
    best: tuple[Timing, ...] = ()
    try:
        for _ in range(TRIES):
            best = max(best, compare_passes(swap, shown, over, passes), key=_slowest)
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


def compare_passes(swap: Swap, shown: Collection[str], over: Collection[str], passes: Passes) -> tuple[Timing, ...]:
    """Times passes of the model with some layers compressed against those with others; one timing for each batch, as
    far as the budget goes.
    """

    def ready(names: Collection[str]) -> Callable[[Any], Callable[[], Any]]:
        def prepare(batch: Any) -> Callable[[], Any]:
            swap.show(names)
            arguments = copied(batch)
            return lambda: run_batch(swap.model, arguments, passes.forward)

        return prepare

    gpus = {tensor.device for tensor in swap.model.parameters() if tensor.is_cuda}
    calls, clock = {"plain": ready(over), "compressed": ready(shown)}, PassClock(gpus)
    found: list[Timing] = []
    begin = time.perf_counter()
    for batch in passes.batches:
        if found and time.perf_counter() - begin > passes.budget:
            break  # a pass may take minutes
        times = time_interleaved(calls, batch, clock, passes.budget / len(passes.batches), LEAST)
        found.append(paired_timing(times["compressed"], times["plain"], times["plain"]))
    return tuple(found)
