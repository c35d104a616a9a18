"""Refinements of another method's result: swaps that improve its mask, and the best weights for its mask."""

import copy
import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ..masks import Pattern
from .calibration.statistics import Gram
from .layers import PrunableLayer
from .methods import Method
from .second_order import damped

BASE = ("pattern", "method")
WINDOW = 32  # columns within which weights are swapped if the pattern has no groups
SPAN = 64  # columns whose swaps are made before their effect on all other columns is computed, in one product


@dataclass(frozen=True, init=False, repr=False)
class Refinement(Method):
    """The base class of methods that start from the mask of another method."""

    method: Method

    statistic = Gram

    def __init__(self, method: Method) -> None:
        if not isinstance(method, Method):
            raise TypeError(f'method must be a Method such as Wanda("2:4"), got {method!r}')
        if method.statistic is not None and not issubclass(Gram, method.statistic):
            raise TypeError(f"{type(method).__name__} needs {method.statistic.__name__}, which Gram does not offer")
        object.__setattr__(self, "method", method)
        object.__setattr__(self, "pattern", method.pattern)

    def for_layer(self, layer: PrunableLayer) -> Method:
        refined = copy.copy(self)
        object.__setattr__(refined, "method", self.method.for_layer(layer))
        return refined

    def __repr__(self) -> str:
        own = [f"{item.name}={getattr(self, item.name)!r}" for item in fields(self) if item.name not in BASE]
        return f"{type(self).__name__}({', '.join([repr(self.method), *own])})"


@dataclass(frozen=True, init=False, repr=False)
class Swaps(Refinement):
    """A refinement that swaps kept and dropped weights within each group as long as that lowers the layer error.

    A swap is made only if it lowers ``||X (W - W')^T||^2``, whose change is computed exactly (1-swaps,
    https://arxiv.org/abs/2512.10922). The method visits 64 columns at a time: there, all rows at once make their best
    swap, until none helps. If the pattern has no groups, weights are swapped within 32 columns. Kept weights keep their
    values.

    Args:
        method: the method of the first mask, such as ``Wanda("2:4")``.
        passes: how often all columns are visited at most; swapping ends after a pass in which nothing was swapped.

    Raises:
        TypeError: ``method`` is not a Method.
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
        dense, kept = weight.flatten(1).float(), mask.flatten(1).clone()
        residual_gram = torch.where(kept, 0, dense) @ gram
        spans = _spans(dense.shape[1], weight.shape[-1], group)
        left, active = torch.arange(len(dense), device=weight.device), kept.clone()
        for _ in range(self.passes):
            moved = torch.zeros_like(left, dtype=torch.bool)
            for span in spans:
                moved[_swap_span(dense, active, residual_gram, gram, span, group)] = True
            kept[left] = active
            if not moved.any():
                break
            left, dense, active, residual_gram = (part[moved] for part in (left, dense, active, residual_gram))
        mask = kept.view(weight.shape)
        return torch.where(mask, weight, 0), mask


def _spans(inputs: int, cols: int, group: int) -> list[slice]:
    """Splits the columns into spans of full groups, about ``SPAN`` wide; no group crosses a multiple of ``cols``."""
    cols = cols if cols % group else inputs
    full, size = cols // group * group if group > 1 else 0, max(SPAN // group, 1) * group
    return [
        slice(first + start, first + min(start + size, full))
        for first in range(0, inputs, cols)
        for start in range(0, full, size)
    ]


def _swap_span(dense: Tensor, kept: Tensor, residual_gram: Tensor, gram: Tensor, span: slice, group: int) -> Tensor:
    """Swaps within the groups of a span until no swap helps, and returns which outputs changed.

    Updates ``kept`` and ``residual_gram``, the dropped weights times ``gram``; both are ``[outputs, inputs]``.
    """
    weight = dense[:, span].t().contiguous()
    # Copies, because both are written to, and the transpose of a single output is contiguous already.
    keep, span_residual = (
        part[:, span].t().clone(memory_format=torch.contiguous_format) for part in (kept, residual_gram)
    )
    after = _swap_until_settled(weight, keep, span_residual, gram[span, span], group).t()
    changed = kept[:, span] ^ after
    rows = changed.any(1).nonzero().squeeze(1)
    weight, changed, after = (part.index_select(0, rows) for part in (dense[:, span], changed, after))
    kept[rows, span] = after
    residual_gram.index_add_(0, rows, torch.where(after, -weight, weight).mul_(changed) @ gram[span])
    return rows


def _swap_until_settled(weight: Tensor, keep: Tensor, residual: Tensor, gram: Tensor, group: int) -> Tensor:
    """Makes the best swap of every output, again and again until none helps, and returns the mask.

    All matrices are ``[inputs, outputs]``, so that every operation reads contiguous vectors.
    """
    i, j = torch.triu_indices(group, group, 1, device=weight.device)
    starts = torch.arange(0, len(gram), group, device=weight.device)[:, None]
    i, j = (starts + i).flatten(), (starts + j).flatten()  # all pairs that share a group
    delta = torch.where(keep, 2 * weight, -2 * weight)  # changing one entry alone costs delta * residual + self_cost
    self_cost = weight.square() * gram.diagonal()[:, None]
    cross = weight.index_select(0, i).mul_(weight.index_select(0, j)).mul_((-2 * gram[i, j])[:, None])
    cross.add_(self_cost.mean(0), alpha=2e-6)  # smaller gains are rounding, and could swap back and forth forever
    settled, outputs = keep.clone(), torch.arange(weight.shape[1], device=weight.device)
    for _ in range(len(gram)):
        single = torch.addcmul(self_cost, delta, residual)
        change = single.index_select(0, i).add_(single.index_select(0, j)).add_(cross)
        allowed = keep.index_select(0, i).logical_xor_(keep.index_select(0, j))
        best, pair = torch.where(allowed, change, torch.inf).min(0)
        helps = best < 0
        left = helps.nonzero().squeeze(1)
        if 2 * len(left) < len(outputs):
            delta, keep, residual, self_cost, cross = (
                part.index_select(1, left) for part in (delta, keep, residual, self_cost, cross)
            )
            outputs, pair, helps = outputs[left], pair[left], helps[left]
        if not len(left):
            break
        ends = torch.stack([i[pair], j[pair]])
        flipped = torch.where(helps, delta.gather(0, ends), 0)
        residual.addmm_(gram, torch.zeros_like(delta).scatter_(0, ends, flipped), alpha=0.5)
        delta.scatter_add_(0, ends, -2 * flipped)
        sides = keep.gather(0, ends) ^ helps
        keep.scatter_(0, ends, sides)
        settled[ends, outputs] = sides
    return settled


@dataclass(frozen=True, init=False, repr=False)
class LeastSquares(Refinement):
    """A refinement that gives the weights that another method keeps the values that change the output least.

    It runs conjugate gradients on all rows together, so that an iteration costs one product with the Gram matrix and no
    matrix is inverted for each row (https://arxiv.org/abs/2406.07831 does the same after its own mask search).

    Args:
        method: the method of the mask, such as ``Wanda("2:4")`` or ``Swaps(Wanda("2:4"))``.
        iterations: the largest number of iterations.
        damp: how much is added to the diagonal of the Gram matrix, as a share of its mean; with it, weights that the
            calibration inputs do not determine keep their values.
        tolerance: the iterations end when one lowers the squared layer error by less than this share of the error; 3e-4
            leaves the error about a thousandth above the least possible, 0 goes on as far as fp32 allows.

    Raises:
        TypeError: ``method`` is not a Method.
        ValueError: ``iterations`` is not positive, or ``damp`` or ``tolerance`` negative.
    """

    iterations: int = 100
    damp: float = 0.01
    tolerance: float = 3e-4

    def __init__(self, method: Method, *, iterations: int = 100, damp: float = 0.01, tolerance: float = 3e-4) -> None:
        super().__init__(method)
        for name, value in (("iterations", iterations), ("damp", damp), ("tolerance", tolerance)):
            object.__setattr__(self, name, value)
        if iterations < 1 or not 0 <= damp < math.inf or not 0 <= tolerance < math.inf:
            raise ValueError(
                "LeastSquares needs iterations >= 1, damp >= 0 and tolerance >= 0, "
                f"got {iterations}, {damp} and {tolerance}"
            )

    def prune(self, weight: Tensor, statistic: Gram) -> tuple[Tensor, Tensor]:
        pruned, mask = self.method.prune(weight, statistic)
        gram = damped(statistic.matrix, self.damp)
        kept, dense, found = mask.flatten(1), weight.flatten(1).float(), pruned.flatten(1).float()
        solved = self._solve(found, dense, kept, gram)
        return solved.to(weight.dtype).view(weight.shape), mask

    def _solve(self, found: Tensor, dense: Tensor, kept: Tensor, gram: Tensor) -> Tensor:
        """Solves least squares on the kept entries of every row by preconditioned conjugate gradients."""
        lost = dense - found
        residual_gram = lost @ gram
        error, found = (lost * residual_gram).sum(), found.clone()
        least = 1e-10 * error  # smaller changes are rounding in fp32
        scale, residual = kept / gram.diagonal(), residual_gram.mul_(kept)
        direction = scaled = residual * scale
        energy = (residual * scaled).sum(1, keepdim=True)
        for _ in range(self.iterations):
            product = (direction @ gram).mul_(kept)
            step = _ratio(energy, (direction * product).sum(1, keepdim=True))
            found.addcmul_(step, direction)
            residual.addcmul_(step, product, value=-1)
            scaled = residual * scale
            gain = (step * energy).sum()
            error = error - gain
            if not gain > torch.maximum(self.tolerance * error, least):
                break
            before, energy = energy, (residual * scaled).sum(1, keepdim=True)
            direction = torch.addcmul(scaled, _ratio(energy, before), direction)
        return found


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    """Returns ``above / below``, with 0 for rows that are solved already; NaN stays NaN."""
    return torch.where(below <= 0, 0, above / below)
