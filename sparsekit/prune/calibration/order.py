"""The order of the stages: one run of every batch through the dense model shows in which order it enters them."""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import nn

from ..._forwards import around_forwards
from .passes import Passes
from .stages import Stage, split_layers
from .statistics import Exchange

Route = tuple[int, ...]  # the indices of the stages that a batch enters, in order; one entered twice stands twice


@dataclass(frozen=True)
class StageOrder:
    """The stages in an order that suits every batch, and the route of each batch through them."""

    stages: list[Stage]
    routes: list[Route]


def find_order(stages: list[Stage], passes: Passes, exchange: Exchange) -> StageOrder:
    """Runs every batch once and finds the order in which stages can be pruned.

    A stage comes after all stages that any batch enters before it. If the layers of a stage run while the stage's own
    module does not, because the model calls its parts one by one, every layer becomes a stage of its own. All processes
    that ``exchange`` joins find the same order.

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

    paths: list[tuple[int, ...]] = []
    number = {module: index for index, module in enumerate(watched)}
    known: dict[tuple[int, ...], tuple[int, ...]] = {}  # thousands of batches share a few paths
    with passes.running(), around_forwards({module: around(module) for module in watched}):
        for index in passes.read():
            entered.clear()
            passes.run(index)
            path = tuple(number[module] for module in entered)
            paths.append(known.setdefault(path, path))
    ranks = exchange(({number[module] for module in bypassed}, list(known)))
    split = {watched[index] for indices, _ in ranks for index in indices}
    found = [part for stage in stages for part in (split_layers(stage.layers) if stage.module in split else [stage])]
    place = {number[stage.module]: index for index, stage in enumerate(found)}

    def route(path: tuple[int, ...]) -> Route:
        return tuple(place[index] for index in path if index in place)

    order = _order(len(found), [route(path) for _, all_paths in ranks for path in all_paths])
    rank = {stage: index for index, stage in enumerate(order)}
    routes = {path: tuple(rank[stage] for stage in route(path)) for path in known}
    return StageOrder([found[index] for index in order], [routes[path] for path in paths])


def _order(count: int, routes: Iterable[Route]) -> list[int]:
    """Orders stages so that each comes after those that any route enters before it.

    If routes contradict each other, the first one counts. Stages that no route enters come last.
    """
    before: list[set[int]] = [set() for _ in range(count)]
    seen: dict[int, None] = {}
    for route in routes:
        firsts = dict.fromkeys(route)
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
