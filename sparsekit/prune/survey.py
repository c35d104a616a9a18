"""A look at how every batch goes through the dense model, before anything is pruned."""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import nn

from .._forwards import around_forwards
from .inputs import Exchange
from .passes import Passes
from .stages import Stage, split_layers

Route = tuple[int, ...]  # the stages that a batch enters, by index, as often and in the order in which it does


@dataclass(frozen=True)
class Survey:
    """The stages in an order that suits every batch, and the route of each batch through them."""

    stages: list[Stage]
    routes: list[Route]


def survey(stages: list[Stage], passes: Passes, exchange: Exchange) -> Survey:
    """Runs every batch once, and finds the order in which stages can be pruned.

    A stage comes after those that any batch enters before it. A stage whose layers run without it, because its parts
    are called one by one, falls apart into its layers. All processes that ``exchange`` joins find the same.

    Raises:
        ValueError: there is no batch.
    """
    owner = {layer.module: stage for stage in stages for layer in stage.layers}
    watched = list(dict.fromkeys([*(stage.module for stage in stages), *owner]))
    entered: list[nn.Module] = []
    active: Counter[nn.Module] = Counter()
    apart: set[nn.Module] = set()

    def around(module: nn.Module) -> Callable[..., Any]:
        def run(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            entered.append(module)
            active[module] += 1
            if module in owner and not active[owner[module].module]:
                apart.add(owner[module].module)
            try:
                return forward(*args, **kwargs)
            finally:
                active[module] -= 1

        return run

    paths: list[tuple[int, ...]] = []
    number = {module: index for index, module in enumerate(watched)}
    known: dict[tuple[int, ...], tuple[int, ...]] = {}  # thousands of batches take few ways
    with passes.running(), around_forwards({module: around(module) for module in watched}):
        for index in passes.read():
            entered.clear()
            passes.run(index)
            path = tuple(number[module] for module in entered)
            paths.append(known.setdefault(path, path))
    ranks = exchange(({number[module] for module in apart}, list(known)))
    broken = {watched[index] for indices, _ in ranks for index in indices}
    found = [part for stage in stages for part in (split_layers(stage.layers) if stage.module in broken else [stage])]
    place = {number[stage.module]: index for index, stage in enumerate(found)}

    def route(path: tuple[int, ...]) -> Route:
        return tuple(place[index] for index in path if index in place)

    order = _order(len(found), [route(path) for _, all_paths in ranks for path in all_paths])
    rank = {stage: index for index, stage in enumerate(order)}
    routes = {path: tuple(rank[stage] for stage in route(path)) for path in known}
    return Survey([found[index] for index in order], [routes[path] for path in paths])


def _order(count: int, routes: Iterable[Route]) -> list[int]:
    """Puts stages after all that some route enters before them; where routes contradict each other, the first counts.

    Those that no route enters come last.
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
