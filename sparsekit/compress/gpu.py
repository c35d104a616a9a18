"""What computes a 2:4 layer on a GPU, and the plan that takes the fastest at every number of tokens."""

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from .._timing import PARITY_RATIO, Call, Clock, Timings
from ..nn import Plan, Route, RoutedLinear24
from ..ops import hardware_layouts
from ..ops._vendor import ONE_KERNEL, TWO_KERNELS, suggest
from ..ops.layouts import device_name
from .decide import ANY, WITH_DENSE, Objective, accepts, at_tokens, turned_down
from .tune import expected, is_right

# The name of the decode kernel; others are a layout and how its library computes: "cusparselt_sm90:5:2:1" is algorithm
# 5 with split-K 2 of mode 1.
LINEAR24 = "linear24"
ALGORITHMS = 64  # more than any cuSPARSELt to 0.9 has; it refuses an id that it has not
SPLITS = tuple((split_k, mode) for split_k in (2, 4, 8) for mode in (ONE_KERNEL, TWO_KERNELS))
SCREENED, KEPT = 3, 2  # calls to screen an algorithm by, and how many of each library race in earnest


def layouts(dtype: torch.dtype, cols: int, device: torch.device) -> tuple[tuple[str, ...], str]:
    """The hardware layouts that a weight can have on a device, and what there is to say about them."""
    if dtype == torch.float32:
        return (), "tensor cores multiply 2:4 weights in 16 bits only"
    if cols % 4 == 3:
        return (), f"{cols} columns end in a group of three"
    return hardware_layouts(device)


def offers(
    plain: nn.Linear, x: Tensor, names: Iterable[str], clock: Clock, *, transposed: bool, keep_dense: bool
) -> tuple[dict[str, Call], list[str]]:
    """What is worth racing on one input: the decode kernel, and of every library its best few ways.

    Args:
        plain: the layer, with a 2:4 weight.
        x: ``[tokens, columns]``.
        names: the hardware layouts to try.
        clock: what times a call.
        transposed: whether ``plain.weight`` is ``[in_features, out_features]``.
        keep_dense: whether a dense copy is worth racing: in this module, it costs the host more than in its own.

    Returns:
        ``(calls, wrong)``: what to call by name, and the names of what gave a wrong result.
    """

    def follow(layout: str | None, *routes: Route) -> RoutedLinear24:
        layer = RoutedLinear24.from_linear(plain, transposed=transposed)
        return layer.follow(Plan(device_name(x.device), x.dtype, layout, routes))

    calls: dict[str, Call] = {LINEAR24: follow(None, Route(ANY, "linear24"))}
    if keep_dense:
        calls[WITH_DENSE] = follow(None, Route(ANY, "dense"))
    wrong: list[str] = []
    clock.start(plain, x)
    with torch.no_grad():
        exact = expected(plain, x)
        for layout in names:
            screen = _Screen(follow(layout), x, exact, clock)
            if layout.startswith("cutlass"):
                screen.add([(0, 1, -1)])
            else:
                screen.add((algorithm, 1, -1) for algorithm in range(ALGORITHMS))
                screen.add((route.alg_id, *split) for route in screen.best() for split in SPLITS)
                screen.add(_suggestions(screen.layer, x))
            calls |= {_name(layout, route): screen.call(route) for route in screen.best()}
            wrong += [_name(layout, route) for route in screen.wrong]
    return calls, wrong


class _Screen:
    """Checks ways to multiply one layer by one input, and times those that are right."""

    def __init__(self, layer: RoutedLinear24, x: Tensor, exact: Tensor, clock: Clock):
        self.layer, self.x, self.exact, self.clock = layer, x, exact, clock
        self.seconds: dict[Route, float] = {}
        self.wrong: list[Route] = []

    def call(self, route: Route) -> RoutedLinear24:
        """A module on the layer's own tensors that takes one route, so that what is timed is what will be called."""
        module = RoutedLinear24.__new__(RoutedLinear24)
        module.__dict__.update(self.layer.__dict__)
        assert self.layer.plan is not None
        module.plan = replace(self.layer.plan, routes=(route,))
        return module

    def add(self, ways: Iterable[tuple[int, int, int]]) -> None:
        for way in ways:
            route = Route(ANY, "hardware", *way)
            call = self.call(route)
            try:
                right = is_right(call, self.x, self.exact)
            except RuntimeError:  # how a library refuses what it has not
                continue
            if right:
                self.seconds[route] = statistics.median(self.clock.seconds(call, self.x) for _ in range(SCREENED))
            else:
                self.wrong.append(route)

    def best(self) -> list[Route]:
        return sorted(self.seconds, key=lambda route: self.seconds[route])[:KEPT]


def _suggestions(layer: RoutedLinear24, x: Tensor) -> list[tuple[int, int, int]]:
    assert layer.hardware is not None
    try:
        found = suggest(x, layer.hardware, layer.bias, layer.out_features, layer.layout)
    except RuntimeError:
        return []
    return [found] if found else []


def _name(layout: str, route: Route) -> str:
    return f"{layout}:{route.alg_id}:{route.split_k}:{route.split_k_mode}"


def _layout(name: str) -> str | None:
    return name.partition(":")[0] if ":" in name else None


def _route(tokens: int, name: str) -> Route:
    if _layout(name) is None:
        return Route(tokens, "dense" if name == WITH_DENSE else "linear24")
    return Route(tokens, "hardware", *map(int, name.split(":")[1:]))


@dataclass(frozen=True)
class Decision:
    """The plan of a layer (None: it stays dense), what answers each number of tokens in it, and why; whether it stays
    only because the machine was too busy to tell.
    """

    plan: Plan | None
    names: dict[int, str]
    reason: str
    undecided: bool = False


def decide(
    timings: Mapping[int, Timings],
    calls: Mapping[int, int],
    device: torch.device,
    dtype: torch.dtype,
    names: Iterable[str],
    objective: Objective = "speed",
) -> Decision:
    """Takes the fastest at every token count; a layer has one layout, the one that needs least time over all calls.

    Where nothing is faster than the plain layer, a dense copy answers if there is one, else the layer stays.

    Args:
        timings: what was measured, by token count.
        calls: how often each count was seen.
        device, dtype: of the weight.
        names: the hardware layouts to choose from; what was measured on another GPU of this model may know more.
        objective: ``"size"`` takes what is no slower too, since every form but a dense copy is smaller.
    """
    plans: dict[str | None, dict[int, str]] = {}
    for layout in (None, *names):
        fastest = {tokens: _fastest(measured, layout, objective) for tokens, measured in sorted(timings.items())}
        chosen = {tokens: name for tokens, name in fastest.items() if name is not None}
        if len(chosen) == len(fastest) and set(chosen.values()) != {WITH_DENSE}:
            plans[layout] = chosen
    wrong = [f"{name}: a wrong result {at_tokens(tokens)}" for tokens, name in _wrong(timings)]
    remarks = [*wrong[:3], *([f"{len(wrong) - 3} more wrong results"] if len(wrong) > 3 else [])]
    if not plans:
        lost, undecided = _lost(timings)
        return Decision(None, {}, "; ".join([lost, *remarks]), undecided)

    def seconds(layout: str | None) -> float:
        return sum(calls[tokens] * _seconds(timings[tokens], name) for tokens, name in plans[layout].items())

    layout = min(plans, key=seconds)
    routes: list[Route] = []
    for tokens, name in plans[layout].items():
        route = _route(tokens, name)
        if routes and routes[-1][1:] == route[1:]:
            routes.pop()
        routes.append(route)
    ways = ", ".join(f"{name} at {tokens}" for tokens, name in plans[layout].items())
    unit = "token" if max(plans[layout]) == 1 else "tokens"
    plan = Plan(device_name(device), dtype, layout, tuple(routes))
    return Decision(plan, plans[layout], "; ".join([f"fastest: {ways} {unit}", *remarks]))


def _fastest(measured: Timings, layout: str | None, objective: Objective) -> str | None:
    fits = [
        name
        for name, timing in measured.items()
        if timing and accepts(timing, objective, smaller=name not in ("plain", WITH_DENSE))
        if _layout(name) in (None, layout)
    ]
    dense = measured.get(WITH_DENSE)
    even = WITH_DENSE if dense is not None and dense.ratio >= PARITY_RATIO else None
    return min(fits, key=lambda name: _seconds(measured, name), default=even)


def _seconds(measured: Timings, name: str) -> float:
    timing = measured[name]
    assert timing is not None
    return timing.seconds


def _wrong(timings: Mapping[int, Timings]) -> list[tuple[int, str]]:
    return [(tokens, name) for tokens, measured in timings.items() for name, timing in measured.items() if not timing]


def _lost(timings: Mapping[int, Timings]) -> tuple[str, bool]:
    """The best result at the token count where it is worst, and whether it is undecided there."""
    best = {}
    for tokens, measured in timings.items():
        right = [timing for name, timing in measured.items() if timing and name not in ("plain", WITH_DENSE)]
        if not right:
            return f"nothing gave a right result {at_tokens(tokens)}", False
        best[tokens] = max(right, key=lambda timing: (timing.faster, timing.ratio))
    worst = min(best, key=lambda tokens: (best[tokens].faster, best[tokens].ratio))
    return f"2:4: {turned_down(best[worst], worst)}", best[worst].undecided
