"""Refinements on top of the mask of any method: better members for every group, and the best weights for a mask."""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ..masks import Pattern
from .methods import Method
from .second_order import damped
from .statistics import Gram

BASE = ("pattern", "method")
WINDOW = 32  # columns that trade places where the pattern has no groups


@dataclass(frozen=True, init=False, repr=False)
class Refinement(Method):
    """A method that starts from the mask of another."""

    method: Method

    statistic = Gram

    def __init__(self, method: Method) -> None:
        if not isinstance(method, Method):
            raise TypeError(f'method must be a Method such as Wanda("2:4"), got {method!r}')
        if method.statistic is not None and not issubclass(Gram, method.statistic):
            raise TypeError(f"{type(method).__name__} needs {method.statistic.__name__}, which Gram does not offer")
        object.__setattr__(self, "method", method)
        object.__setattr__(self, "pattern", method.pattern)

    def __repr__(self) -> str:
        own = [f"{item.name}={getattr(self, item.name)!r}" for item in fields(self) if item.name not in BASE]
        return f"{type(self).__name__}({', '.join([repr(self.method), *own])})"


@dataclass(frozen=True, init=False, repr=False)
class Swaps(Refinement):
    """Swaps kept for dropped weights within each group as long as that lowers the layer error; the values stay.

    Every swap is the best one of its group and row by the exact change of ``||X (W - W')^T||^2``, so the error only
    falls (1-swaps, https://arxiv.org/abs/2512.10922). Rows are done together until they settle, groups one after the
    other. Where the pattern has no groups, weights swap within 32 columns.

    Args:
        method: gives the first mask, say ``Wanda("2:4")``.
        passes: times that all groups are visited, at most; it ends when a pass swaps nothing.

    Raises:
        TypeError: ``method`` is none.
        ValueError: ``passes`` is not positive, or the pattern drops whole blocks.
    """

    passes: int = 20

    def __init__(self, method: Method, *, passes: int = 20) -> None:
        super().__init__(method)
        object.__setattr__(self, "passes", passes)
        if passes < 1:
            raise ValueError(f"passes must be at least 1, got {passes}")
        if isinstance(Pattern.parse(method.pattern).unit, tuple):
            raise ValueError(f"Swaps cannot swap single weights in a pattern of whole blocks, got {method.pattern!r}")

    def prune(self, weight: Tensor, statistic: Gram) -> tuple[Tensor, Tensor]:
        _, mask = self.method.prune(weight, statistic)
        gram, group = statistic.matrix, Pattern.parse(self.pattern).m or WINDOW
        # Transposed, the entries of a group are whole vectors, not runs of 4: 1.5 times faster at 256 x 256.
        dense, kept = (part.flatten(1).t().contiguous() for part in (weight.float(), mask))
        pull = gram @ torch.where(kept, 0, dense)
        spans = _spans(len(dense), weight.shape[-1], group)
        left, active = torch.arange(dense.shape[1], device=weight.device), kept.clone()
        for _ in range(self.passes):
            moved = torch.zeros_like(left, dtype=torch.bool)
            for start, end in spans:
                moved |= _swap_span(dense, active, pull, gram, start, end, group)
            kept[:, left] = active
            if not moved.any():
                break
            left, dense, active, pull = left[moved], dense[:, moved], active[:, moved], pull[:, moved]
        mask = kept.t().reshape(weight.shape)
        return torch.where(mask, weight, 0), mask


def _spans(inputs: int, cols: int, group: int) -> list[tuple[int, int]]:
    """About 128 columns of full groups at a time; groups start anew with every ``cols`` columns."""
    full, size = cols // group * group, max(128 // group, 1) * group
    return [
        (first + start, first + min(start + size, full))
        for first in range(0, inputs, cols)
        for start in range(0, full, size)
    ]


def _swap_span(dense: Tensor, kept: Tensor, pull: Tensor, gram: Tensor, start: int, end: int, group: int) -> Tensor:
    """One visit to the groups of a span: updates ``kept`` and ``pull`` (``gram`` times what is dropped), all of them
    ``[inputs, outputs]``, and returns which outputs swapped anything.
    """
    inner, near = gram[start:end, start:end], pull[start:end].clone()
    steps = torch.zeros_like(near)
    for first in range(0, end - start, group):
        own = slice(first, first + group)
        weight, keep = (part[start + first : start + first + group] for part in (dense, kept))
        steps[own] = step = _best_swap(weight, keep, near[own], inner[own, own])
        keep ^= step != 0
        near.addmm_(inner[:, own], step)
    pull.addmm_(gram[:, start:end], steps)
    return steps.any(0)


def _best_swap(weight: Tensor, keep: Tensor, pull: Tensor, gram: Tensor) -> Tensor:
    """What the best swap of each output adds to what it drops: ``w_i`` at i, ``-w_j`` at j; 0 where none helps."""
    once = 2 * weight * pull
    twice = weight.square() * gram.diagonal()[:, None]
    drop = torch.where(keep & (weight != 0), once + twice, torch.inf)
    restore = torch.where(keep | (weight == 0), torch.inf, twice - once)
    cross = weight[:, None] * weight * (2 * gram)[:, :, None]
    change, best = (drop[:, None] + restore - cross).flatten(0, 1).min(0)
    i, j = best // len(weight), best % len(weight)
    helps = change < -1e-6 * twice.sum(0)  # less is rounding, and could go back and forth
    outputs = torch.arange(weight.shape[1], device=weight.device)
    step = torch.zeros_like(weight)
    step[i, outputs] = torch.where(helps, weight[i, outputs], 0)
    step[j, outputs] -= torch.where(helps, weight[j, outputs], 0)
    return step


@dataclass(frozen=True, init=False, repr=False)
class LeastSquares(Refinement):
    """Keeps the mask of another method and gives the kept weights the values that change the output least.

    Conjugate gradients on all rows together, so the cost is one product with the second moments per iteration, and no
    matrix is inverted per row (https://arxiv.org/abs/2406.07831 does so after its own mask search).

    Args:
        method: gives the mask, say ``Wanda("2:4")`` or ``Swaps(Wanda("2:4"))``.
        iterations: at most; it ends when the gradient is a ten-thousandth of what it was.
        damp: what is added to the diagonal of the second moments, as a share of its mean: keeps weights that the
            calibration inputs do not determine where they are.

    Raises:
        TypeError: ``method`` is none.
        ValueError: ``iterations`` is not positive, or ``damp`` negative.
    """

    iterations: int = 100
    damp: float = 0.01

    def __init__(self, method: Method, *, iterations: int = 100, damp: float = 0.01) -> None:
        super().__init__(method)
        object.__setattr__(self, "iterations", iterations)
        object.__setattr__(self, "damp", damp)
        if iterations < 1 or damp < 0:
            raise ValueError(f"LeastSquares needs iterations >= 1 and damp >= 0, got {iterations} and {damp}")

    def prune(self, weight: Tensor, statistic: Gram) -> tuple[Tensor, Tensor]:
        pruned, mask = self.method.prune(weight, statistic)
        gram = damped(statistic.matrix, self.damp)
        kept, dense, found = mask.flatten(1), weight.flatten(1).float(), pruned.flatten(1).float()
        solved = _solve(found, dense, kept, gram, self.iterations)
        return solved.to(weight.dtype).view(weight.shape), mask


def _solve(found: Tensor, dense: Tensor, kept: Tensor, gram: Tensor, iterations: int) -> Tensor:
    """Least squares on the kept entries of every row, from ``found`` on: preconditioned conjugate gradients."""
    scale = kept / gram.diagonal()
    residual = (dense - found) @ gram * kept
    direction = scaled = residual * scale
    energy = (residual * scaled).sum(1, keepdim=True)
    least = 1e-8 * energy.max()
    for _ in range(iterations):
        product = direction @ gram * kept
        step = _ratio(energy, (direction * product).sum(1, keepdim=True))
        found = found + step * direction
        residual = residual - step * product
        scaled = residual * scale
        before, energy = energy, (residual * scaled).sum(1, keepdim=True)
        if not energy.max() > least:
            break
        direction = scaled + _ratio(energy, before) * direction
    return found


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    """``above / below``, 0 where a row is solved already."""
    return torch.where(below > 0, above / below, 0)
