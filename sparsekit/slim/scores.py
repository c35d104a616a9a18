"""Scores of units, and the choice of those that go: one threshold for the whole model, with a floor for each branch."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .._layers import check_model
from .check import check_fits
from .plan import Branch, SlimPlan
from .resize import sides, size, weight_dim
from .units import Units


def unit_scores(model: nn.Module, units: Units, scores: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Returns a score for every unit, per weight, so that units of all sizes can be compared.

    Without ``scores`` it is the root mean square of the unit's weights: their L2 norm divided by the root of their
    number. A plain norm would grow with the number, and heads would always be kept. With the scores of weights, as
    ``taylor_scores`` returns them, it is their mean over the unit: how much the loss would change for each weight that
    is removed.

    Args:
        model: the model.
        units: what ``find_units`` found in it.
        scores: scores of weights by the names of layers, in the weights' shapes, of all layers of the branches.

    Returns:
        For each branch, by the name of its reader, float64 ``[units]`` on the CPU.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: the units are of another model, or scores of a layer are missing or have another shape.
    """
    check_model(model)
    check_fits(model, units.keep(), whole=True)
    found = {}
    for branch in units.branches:
        total = torch.zeros(branch.units, dtype=torch.float64, device="cpu")
        for name, (layer, side, width, segments) in zip(_names(branch), sides(branch, model), strict=True):
            weight = layer.get_parameter("weight").detach()
            values = weight.float().square() if scores is None else _of_layer(scores, name, weight)
            rows = values.movedim(weight_dim(layer, side), 0).sum(1, dtype=torch.float64).cpu()
            total += rows.view(segments, branch.units, width).sum((0, 2))
        mean = total / unit_weights(model, branch)
        found[branch.reader] = mean.sqrt() if scores is None else mean
    return found


def choose_units(
    model: nn.Module,
    units: Units,
    scores: Mapping[str, Tensor],
    sparsity: float,
    *,
    floor: float = 0.25,
    round_to: int = 64,
) -> SlimPlan:
    """Returns the plan that drops the units with the lowest scores, until a share of the weights is gone.

    One threshold holds for all branches. Units are dropped as long as that brings the share nearer to the target, so
    that it is missed by at most half of what is dropped at once: a head, or ``round_to`` neurons. Units with a score of
    0, as masked ones have, go in any case once it is their turn, so that nothing comes back as the share grows.

    Args:
        model: the model.
        units: what ``find_units`` found in it.
        scores: a score for every unit, as ``unit_scores`` returns them.
        sparsity: the share of the weights of all branches that goes, from 0 to below 1.
        floor: the share of its units that every branch keeps at least.
        round_to: the neurons that stay in a branch are a multiple of this, if there are so many; kernels for 4-bit
            weights need 64. Branches of heads are not concerned.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: an argument is out of range, the units are of another model, scores are missing or not finite, or
            floor and rounding do not let so many weights go.
    """
    check_model(model)
    check_fits(model, units.keep(), whole=True)
    if not 0 <= sparsity < 1 or not 0 <= floor <= 1 or round_to < 1:
        raise ValueError(
            "sparsity must be from 0 to below 1, floor from 0 to 1 and round_to at least 1, "
            f"got {sparsity}, {floor} and {round_to}"
        )
    sizes = {branch: unit_weights(model, branch) for branch in units.branches}
    total = sum(branch.units * weights for branch, weights in sizes.items())
    drops = [each for branch in units.branches for each in _drops(branch, _scores(scores, branch), floor, round_to)]
    most = sum(len(each.units) * sizes[each.branch] for each in drops)
    left, dropped = sparsity * total, {branch: set[int]() for branch in units.branches}
    if left > most and not math.isclose(left, most):
        raise ValueError(
            f"sparsity {sparsity:g} cannot be reached: with floor={floor:g} and round_to={round_to} at most "
            f"{most / max(total, 1):.4g} of the weights can go"
        )
    for each in sorted(drops, key=lambda each: each.score):  # stable: ties go in the order of the model
        weights = len(each.units) * sizes[each.branch]
        if left <= weights / 2 and each.score != 0:
            break
        dropped[each.branch] |= {*each.units}
        left -= weights
    return units.keep({b.reader: [unit for unit in range(b.units) if unit not in dropped[b]] for b in units.branches})


def unit_weights(model: nn.Module, branch: Branch) -> int:
    """Returns the number of weights, without biases, that go with one unit of a branch."""
    held = sides(branch, model)
    return sum(
        width * segments * size(layer, "outputs" if side == "inputs" else "inputs")
        for layer, side, width, segments in held
    )


@dataclass(frozen=True)
class _Drop:
    """The units of one branch that are dropped at once, with their mean score."""

    score: float
    branch: Branch
    units: tuple[int, ...]


def _drops(branch: Branch, scores: Tensor, floor: float, round_to: int) -> list[_Drop]:
    """Returns what can be dropped of a branch, the lowest scores first, so that a multiple of ``round_to`` stays."""
    step = round_to if branch.kind == "neuron" else 1
    least = max(step, math.ceil(floor * branch.units / step) * step)
    order = scores.argsort(stable=True).tolist()
    found, start = [], 0
    while branch.units - (end := start + ((branch.units - start) % step or step)) >= least:
        chosen = tuple(order[start:end])
        found.append(_Drop(float(scores[list(chosen)].mean()), branch, chosen))
        start = end
    return found


def _names(branch: Branch) -> list[str]:
    return [branch.reader, *(name for name, _ in branch.writers)]


def _of_layer(scores: Mapping[str, Tensor], name: str, weight: Tensor) -> Tensor:
    if name not in scores or scores[name].shape != weight.shape:
        got = tuple(scores[name].shape) if name in scores else "none"
        raise ValueError(
            f"scores of layer {name!r} must have the shape of its weight, {tuple(weight.shape)}, got {got}"
        )
    return scores[name].detach().float()


def _scores(scores: Mapping[str, Tensor], branch: Branch) -> Tensor:
    found = scores.get(branch.reader)
    if found is None or found.shape != (branch.units,) or not found.isfinite().all():
        raise ValueError(f"there must be {branch.units} finite scores for the units of {branch.reader!r}, got {found}")
    return found.detach().double().cpu()
