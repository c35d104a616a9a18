"""Timings from a table, for compress_ on an acted GPU."""

from functools import partial

import torch
from compressing import blocks

from sparsekit import _timing
from sparsekit.compress import Timing, forms, whole
from sparsekit.nn import RoutedLinear24, TieredLinear
from sparsekit.nn.routed import Routed


class TableClock:
    """Reads times from a table, which has a number or a function of the token count for ``"plain"``, ``"linear24"``,
    ``"tiered"`` and routes."""

    def __init__(self, table):
        self.table, self.evict_cache = table, False
        self.asked = []

    def start(self, call, x):
        pass

    def seconds(self, call, x):
        name = "tiered" if isinstance(call, TieredLinear) else "plain"
        if isinstance(call, Routed):
            (route,) = call.plan.routes
            sparse = "linear24" if isinstance(call, RoutedLinear24) else "tiered"
            name = {"hardware": route[2:], "sparse": sparse}.get(route.kernel, route.kernel)
        seconds = self.table.get(name, self.table.get("other", 9.0))
        self.asked.append((name, len(x)))
        return seconds(len(x)) if callable(seconds) else seconds


def install_clock(monkeypatch):
    """Makes ``compress_`` measure by a table, and returns it; ``(alg_id, split_k, split_k_mode)`` is an algorithm."""
    table = {"plain": 1.0, "dense": 1.0, "linear24": 9.0, "clocks": []}

    def make(device, *, evict_cache, graphs):
        made = TableClock(table)
        made.evict_cache, made.graphs = evict_cache, graphs
        table["clocks"].append(made)
        return made

    monkeypatch.setattr(_timing, "clock", make)
    fast, same = Timing(0.5, 2.0, 1.0, 2.0, 0.0), Timing(1.0, 1.0, 0.5, 1.0, 0.0)
    for module, timing in ((whole, fast), (forms, same)):
        compare = partial(lambda timing, swap, shown, over, work: (timing,) * len(work.batches), timing)
        monkeypatch.setattr(module, "compare_passes", compare)
    return table


def model_of(dtype=torch.float16, **kwargs):
    return blocks(1, **kwargs).to(dtype)


def up_to_16(seconds, otherwise=9.0):
    """Returns the times of what takes ``seconds`` with up to 16 tokens."""
    return lambda tokens: seconds if tokens <= 16 else otherwise


def batches_of(*tokens, dtype=torch.float16):
    return [torch.randn(count, 16).to(dtype) for count in tokens]
