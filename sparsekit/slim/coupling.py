"""Finds the units of a branch: into how many parts its channels fall that no gradient joins."""

from collections.abc import Iterator, Sequence
from math import gcd

import torch
from torch import Tensor

from .plan import Branch
from .resize import channels

SEGMENTS = (1, 2, 3)  # a layer may write gate and value, or query, key and value


def find_units(reader: str, read: Tensor, writers: dict[str, Tensor]) -> Branch | None:
    """Returns the branch with the most units, so that no channel of a unit depends on those of another.

    Args:
        reader: the name of the layer that reads the units.
        read: its input, computed from the outputs of the writers.
        writers: the outputs of the writers, which need gradients, by name.

    Returns:
        The branch; None if all channels hang together.
    """
    weights = torch.randn(read.shape, generator=torch.Generator("cpu").manual_seed(0), device="cpu")
    weighted = read * weights.to(read)
    for units in _divisors(gcd(read.shape[-1], *(leaf.shape[-1] for leaf in writers.values()))):
        width = read.shape[-1] // units
        segments = _segments(weighted, writers, units, width)
        if segments is not None:
            branch = Branch(reader, units, width, tuple(segments.items()))
            if _is_separate(branch, weighted, writers):
                return branch
    return None


def _divisors(number: int) -> Iterator[int]:
    """Yields the divisors above 1, the largest first."""
    return (each for each in range(number, 1, -1) if number % each == 0)


def _segments(weighted: Tensor, writers: dict[str, Tensor], units: int, width: int) -> dict[str, int] | None:
    """Returns the fewest segments of each writer that explain what the first unit depends on; None if none do."""
    found = {}
    touched = _touched(weighted, writers, channels([0], units, width))
    for name, leaf in writers.items():
        total = leaf.shape[-1]
        for segments in SEGMENTS:
            if total % (segments * units) == 0:
                own = channels([0], units, total // (segments * units), segments)
                if _within(touched[name], own):
                    found[name] = segments
                    break
        else:
            return None
    return found


def _is_separate(branch: Branch, weighted: Tensor, writers: dict[str, Tensor]) -> bool:
    """Returns whether every unit depends on its own channels alone.

    Any two units differ in a digit of their binary numbers, so it is enough to look at the units that have a digit, and
    at those that do not have it.
    """
    for digit in range((branch.units - 1).bit_length()):
        for value in (0, 1):
            units = [unit for unit in range(branch.units) if unit >> digit & 1 == value]
            touched = _touched(weighted, writers, channels(units, branch.units, branch.width))
            for name, segments in branch.writers:
                width = len(touched[name]) // (segments * branch.units)
                if not _within(touched[name], channels(units, branch.units, width, segments)):
                    return False
    return True


def _touched(weighted: Tensor, writers: dict[str, Tensor], read: Tensor) -> dict[str, Tensor]:
    """Returns for each writer which of its channels some of the reader's inputs depend on."""
    total = weighted.index_select(-1, read.to(weighted.device)).sum()
    gradients: Sequence[Tensor | None] = torch.autograd.grad(
        total, list(writers.values()), retain_graph=True, allow_unused=True
    )
    return {
        name: torch.zeros(leaf.shape[-1], dtype=torch.bool, device="cpu")
        if gradient is None
        else gradient.ne(0).flatten(0, -2).any(0).cpu()
        for (name, leaf), gradient in zip(writers.items(), gradients, strict=True)
    }


def _within(touched: Tensor, allowed: Tensor) -> bool:
    return not touched.index_fill(0, allowed, False).any()
