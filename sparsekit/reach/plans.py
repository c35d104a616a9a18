"""Plans: an assignment of a way to every layer, measured in the whole model and made anew by what was measured."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from .assign import least_cost, most_saving
from .ways import Way

ROUNDS = 5  # assignments that are measured after the fastest one
MORE = 1.05  # times the time to save, after an assignment that was too slow

Plan = dict[str, Way]


@dataclass(frozen=True)
class Measured:
    """A plan and how many times as fast as the plain model it is.

    Args:
        plan: the way of each layer.
        ratio: as measured in whole passes.
    """

    plan: Plan
    ratio: float

    @property
    def cost(self) -> float:
        return sum(way.error**2 for way in self.plan.values())


def find_plan(
    ways: Mapping[str, Sequence[Way]], speedup: float, seconds: float, measure: Callable[[Plan], float]
) -> tuple[Measured, int]:
    """Returns the plan of the least error that was measured to be as fast as asked, and how many were measured.

    The first plan is the fastest one: what is slower than asked even so cannot be reached. What it saved of a pass,
    over what its layers save alone, says how much the others have to save; each measured plan corrects that.

    Args:
        ways: those of each layer, the plain one first.
        speedup: how many times as fast a pass is to be.
        seconds: of a plain pass.
        measure: returns how many times as fast a pass is with a plan.

    Raises:
        ValueError: the fastest plan is slower than asked.
    """
    plain = {name: each[0].seconds for name, each in ways.items()}
    offers = [[way.offer(plain[name]) for way in each] for name, each in ways.items()]

    def as_plan(indices: Sequence[int]) -> Plan:
        return {name: each[index] for index, (name, each) in zip(indices, ways.items(), strict=True)}

    def measured(indices: Sequence[int]) -> Measured:
        plan = as_plan(indices)
        return Measured(plan, measure(plan))

    fastest = most_saving(offers)
    tried = {tuple(fastest): measured(fastest)}
    best = last = tried[tuple(fastest)]
    if best.ratio < speedup:
        raise ValueError(
            f"a speed-up of {speedup:.2f} cannot be reached: with the fastest form of every layer a pass is "
            f"{best.ratio:.2f}x as fast; ask for less or allow more forms"
        )
    of_alone = 1.0  # the time that layers save alone, for each second that they save in the model
    for _ in range(ROUNDS):
        alone, real = saving(last.plan, plain), seconds * (1 - 1 / last.ratio)
        if alone > 0 and real > 0:
            of_alone = alone / real
        need = seconds * (1 - 1 / speedup) * of_alone
        indices = least_cost(offers, need)
        while indices is not None and (known := tried.get(tuple(indices))) and known.ratio < speedup:
            need *= MORE  # it was too slow
            indices = least_cost(offers, need)
        if indices is None or tuple(indices) in tried:
            break
        last = tried[tuple(indices)] = measured(indices)
        if last.ratio >= speedup and last.cost < best.cost:
            best = last
    return best, len(tried)


def saving(plan: Plan, plain: Mapping[str, float]) -> float:
    """Returns the seconds that a plan saves by the times of its layers."""
    return math.fsum(plain[name] - way.seconds for name, way in plan.items())
