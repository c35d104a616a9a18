"""Times what a layer could become against what it is."""

import copy
import statistics
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .._timing import TOLERANCE, Call, Clock, Timings, paired_timing, time_interleaved


def measure(
    calls: Mapping[str, Call], plain: nn.Module, x: Tensor, *, dense: tuple[str, ...], clock: Clock, budget: float
) -> Timings:
    """Times calls that compute the same on one input against a module, and checks what they compute against it.

    Rounds go on for ``budget`` seconds, with at least 9 and at most 101; the order changes from round to round. Every
    result is checked before and after, since some kernels are wrong now and then
    (https://github.com/pytorch/pytorch/issues/155333).

    Args:
        calls: what computes the same as ``plain``, by name.
        plain: the baseline and the reference.
        x: the input.
        dense: the names among which, with ``"plain"``, the best dense is chosen.
        clock: what times a call.
        budget: seconds.

    Returns:
        One ``Timing`` per name, ``"plain"`` first; None for a call that is wrong.
    """
    with torch.no_grad():
        exact = expected(plain, x)
        right = {name: call for name, call in calls.items() if is_right(call, x, exact)}
        times = time_interleaved({"plain": plain, **right}, x, clock, budget)
        for name, call in right.items():
            if not is_right(call, x, exact):
                del times[name]
    names = [name for name in ("plain", *dense) if name in times]
    best = min(names, key=lambda name: statistics.median(times[name]))
    return {
        name: paired_timing(times[name], times["plain"], times[best]) if name in times else None
        for name in ("plain", *calls)
    }


def expected(plain: nn.Module, x: Tensor) -> Tensor:
    """What a right call gives for the rows that are checked, in float64."""
    return copy.deepcopy(plain).double()(_checked(x).double())


def is_right(call: Call, x: Tensor, exact: Tensor) -> bool:
    """Whether a call gives ``expected(plain, x)``, up to the rounding of its dtype."""
    difference = (_checked(call(x)).double() - exact).abs().amax()
    return bool(difference <= TOLERANCE[x.dtype] * exact.abs().amax())


def _checked(x: Tensor) -> Tensor:
    """Some rows, the first and the last among them: the whole product in float64 would take longer than the race."""
    count = 3 if x.device.type == "cpu" else 64
    return x[torch.linspace(0, len(x) - 1, min(count, len(x)), dtype=torch.float64, device=x.device).long()]
