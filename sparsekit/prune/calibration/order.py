"""Finds an order of the stages: every batch runs through the dense model once, which shows how it enters them."""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import nn

from ..._forwards import around_forwards
from .batch_runner import BatchRunner
from .stages import Stage, split_layers
from .statistics import Exchange

StagePath = tuple[int, ...]  # the indices of the stages that a batch enters, in order; one that is entered twice, twice


@dataclass(frozen=True)
class StageOrder:
    """The stages in an order that suits every batch, and the path of each batch through them."""

    stages: list[Stage]
    paths: list[StagePath]


def find_order(stages: list[Stage], runner: BatchRunner, exchange: Exchange) -> StageOrder:
    """Runs every batch once and finds the order in which stages can be pruned.

    A stage comes after all stages that any batch enters before it. If the layers of a stage run without the stage's own
    module, because the model calls its parts one by one, every layer becomes a stage of its own. All processes that
    ``exchange`` joins find the same order.

    Raises:
        ValueError: there is no batch.
    """
    owner = {layer.module: stage for stage in stages for layer in stage.layers}
    watched = list(dict.fromkeys([*(stage.module for stage in stages), *owner]))
    entered: list[nn.Module] = []
    active: Counter[nn.Module] = Counter()
    bypassed: set[nn.Module] = set()  # modules of stages whose layers ran without them

    def around(module: nn.Module) -> Callable[..., Any]:
        def run(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            entered.append(module)
            active[module] += 1
            if module in owner and not active[owner[module].module]:
                bypassed.add(owner[module].module)
            try:
                return forward(*args, **kwargs)
            finally:
                active[module] -= 1

        return run

    entries: list[tuple[int, ...]] = []
    number = {module: index for index, module in enumerate(watched)}
    known: dict[tuple[int, ...], tuple[int, ...]] = {}  # equal tuples are kept once, for thousands of batches
    with runner.running(), around_forwards({module: around(module) for module in watched}):
        for index in runner.read():
            entered.clear()
            runner.run(index)
            modules = tuple(number[module] for module in entered)
            entries.append(known.setdefault(modules, modules))
    ranks = exchange(({number[module] for module in bypassed}, list(known)))
    split = {watched[index] for indices, _ in ranks for index in indices}
    found = [part for stage in stages for part in (split_layers(stage.layers) if stage.module in split else [stage])]
    place = {number[stage.module]: index for index, stage in enumerate(found)}

    def path(modules: tuple[int, ...]) -> StagePath:
        return tuple(place[index] for index in modules if index in place)

    order = _order(len(found), [path(modules) for _, all_known in ranks for modules in all_known])
    rank = {stage: index for index, stage in enumerate(order)}
    paths = {modules: tuple(rank[stage] for stage in path(modules)) for modules in known}
    return StageOrder([found[index] for index in order], [paths[modules] for modules in entries])


def _order(count: int, paths: Iterable[StagePath]) -> list[int]:
    """Orders stages so that each comes after those that any path enters before it.

    If paths contradict each other, the first one counts. Stages that no path enters come last.
    """
    before: list[set[int]] = [set() for _ in range(count)]
    seen: dict[int, None] = {}
    for path in paths:
        firsts = dict.fromkeys(path)
        seen |= firsts
        for earlier, later in pairwise(firsts):
            before[later].add(earlier)
    left = dict.fromkeys([*seen, *range(count)])
    order = []
    while left:
        ready = next((stage for stage in left if before[stage].isdisjoint(left)), next(iter(left)))
        order.append(ready)
        del left[ready]
    return order
