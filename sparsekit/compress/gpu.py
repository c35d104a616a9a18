"""The 2:4 candidate on a GPU, which has many kernels: a decode kernel, and the algorithms of vendors' libraries."""

import statistics
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .._layers import is_transposed
from .._timing import Call, Clock
from ..nn import Compressed, Plan, Route, RoutedLinear24
from ..ops import hardware_layouts
from ..ops._vendor import ONE_KERNEL, TWO_KERNELS, suggest
from ..ops.layouts import device_name
from .candidates import DENSE_COPY, Candidate, Tiered, bytes_24, not_24_reason
from .kinds import Kind
from .tune import expected, is_right

# The name of the decode kernel; others are a layout and how its library computes: "cusparselt_sm90:5:2:1" is algorithm
# 5 with split-K 2 of mode 1.
LINEAR24 = "linear24"
ALGORITHMS = 64  # more than any cuSPARSELt to 0.9 has; it refuses an id that it has not
SPLITS = tuple((split_k, mode) for split_k in (2, 4, 8) for mode in (ONE_KERNEL, TWO_KERNELS))
SCREENED, KEPT = 3, 2  # calls to screen an algorithm by, and how many of each library are timed in earnest


class Sparse24OnGpu(Candidate):
    """The 2:4 form on a GPU, in the layout that its tensor cores read or in the plain one that the decode kernel reads.

    A layer has one layout. The decode kernel and a dense copy are possible beside each.
    """

    name = "2:4"
    pattern = "2:4"
    allows_copy = True

    def unsupported_reason(self, layer: nn.Linear) -> str | None:
        return not_24_reason(layer)

    def nbytes(self, layer: nn.Linear) -> int:
        return bytes_24(layer)

    def build(self, layer: nn.Linear, kernels: Mapping[Any, str]) -> Compressed:
        weight = layer.weight
        layout = next(filter(None, map(_layout, kernels.values())), None)
        plan = Plan(self.routes(kernels), device_name(weight.device), weight.dtype, layout)
        return RoutedLinear24.from_linear(layer, transposed=is_transposed(layer)).follow(plan)

    def route(self, tokens: int, kernel: str) -> Route:
        if _layout(kernel) is None:
            return super().route(tokens, kernel)
        return Route(tokens, "hardware", *map(int, kernel.split(":")[1:]))

    def calls(self, kind: Kind, plain: nn.Linear, x: Tensor, clock: Clock) -> dict[str, Call | None]:
        """Returns the decode kernel, the dense copy if one is wanted, and the few best ways of each library."""
        tokens = kind.layout_size
        calls: dict[str, Call | None] = {LINEAR24: self.build(plain, {tokens: LINEAR24})}
        if kind.keep_dense:
            calls[DENSE_COPY] = self.build(plain, {tokens: DENSE_COPY})
        clock.start(plain, x)
        with torch.no_grad():
            exact = expected(plain, x)
            for layout in self._layouts(plain)[0]:
                base = self.build(plain, {tokens: f"{layout}:0:1:-1"})
                assert isinstance(base, RoutedLinear24)
                screen = _Screen(base, x, exact, clock)
                if layout.startswith("cutlass"):
                    screen.add([(0, 1, -1)])
                else:
                    screen.add((algorithm, 1, -1) for algorithm in range(ALGORITHMS))
                    screen.add((route.alg_id, *split) for route in screen.best() for split in SPLITS)
                    screen.add(_suggestions(base, x))
                calls |= {_name(layout, route): screen.call(route) for route in screen.best()}
                calls |= {_name(layout, route): None for route in screen.wrong}
        return calls

    def kernel_sets(self, layer: nn.Linear, measured: Collection[str]) -> list[frozenset[str]]:
        sets = [frozenset({LINEAR24})]
        for layout in self._layouts(layer)[0]:
            sets.append(frozenset({LINEAR24, *(name for name in measured if _layout(name) == layout)}))
        return sets

    def remark(self, layer: nn.Linear) -> str:
        return self._layouts(layer)[1]

    def _layouts(self, layer: nn.Linear) -> tuple[tuple[str, ...], str]:
        """Returns the hardware layouts that a weight can have on its device, and why there are no more."""
        weight = layer.weight
        cols = weight.shape[0 if is_transposed(layer) else 1]
        if weight.dtype == torch.float32:
            return (), "tensor cores multiply 2:4 weights in 16 bits only"
        if cols % 4 == 3:
            return (), f"{cols} columns end in a group of three"
        return hardware_layouts(weight.device)


GPU_CANDIDATES = (Sparse24OnGpu(), Tiered())


class _Screen:
    """The ways that were tried to multiply one input by one layer: the times of the right ones, and the wrong ones."""

    def __init__(self, layer: RoutedLinear24, x: Tensor, exact: Tensor, clock: Clock):
        self.layer, self.x, self.exact, self.clock = layer, x, exact, clock
        self.seconds: dict[Route, float] = {}
        self.wrong: list[Route] = []

    def call(self, route: Route) -> RoutedLinear24:
        """Returns a module with the layer's own tensors that takes one route: what is timed is what will be called."""
        module = RoutedLinear24.__new__(RoutedLinear24)
        module.__dict__.update(self.layer.__dict__)
        assert self.layer.plan is not None
        module.plan = replace(self.layer.plan, routes=(route,))
        return module

    def add(self, ways: Iterable[tuple[int, int, int]]) -> None:
        """Checks and times more ways, each an algorithm, a split-K and its mode."""
        for way in ways:
            route = Route(len(self.x), "hardware", *way)
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
        """Returns the fastest routes."""
        return sorted(self.seconds, key=lambda route: self.seconds[route])[:KEPT]


def _suggestions(layer: RoutedLinear24, x: Tensor) -> list[tuple[int, int, int]]:
    """Returns the way that the vendor's own search finds; none if it fails."""
    assert layer.hardware is not None
    try:
        found = suggest(x, layer.hardware, layer.bias, layer.out_features, layer.layout)
    except RuntimeError:
        return []
    return [found] if found else []


def _name(layout: str, route: Route) -> str:
    return f"{layout}:{route.alg_id}:{route.split_k}:{route.split_k_mode}"


def _layout(kernel: str) -> str | None:
    return kernel.partition(":")[0] if ":" in kernel else None
