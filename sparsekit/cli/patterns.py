"""Finds the pattern that a weight has, where it breaks an expected one, and how many bytes it takes packed."""

from torch import Tensor

from ..masks import Pattern
from ..ops import block_scores
from ..ops.sparse24 import values_per_row
from ..ops.tiered import pack_tiered, smallest_tiers

GROUPS = (2, 4, 8, 16, 32)


def found_pattern(kept: Tensor) -> str:
    """Returns the pattern of a mask, bool ``[outputs, ..., inputs]``.

    It is ``"dense"``, ``"all zero"``, the tightest ``"n:m"``, ``"p%"`` if all rows drop the same share, or
    ``"unstructured"``.
    """
    if bool(kept.all()):
        return "dense"
    if not bool(kept.any()):
        return "all zero"
    rows = kept.reshape(-1, kept.shape[-1])
    density = float(kept.float().mean())
    fits = []
    for size in (size for size in GROUPS if size <= rows.shape[1]):
        most = int(_per_group(rows, size).max())
        # Kernels read 2:4. Another n:m is taken only if about as many weights are kept as it allows: else it is chance.
        if most < size and (density > 0.9 * most / size or (most, size) == (2, 4)):
            fits.append((most / size, size, most))
    if fits:
        _, size, most = min(fits)
        return f"{most}:{size}"
    zeros = (~kept.flatten(1)).sum(1)
    if bool((zeros == zeros[0]).all()):
        return f"{100 * zeros[0].item() / kept[0].numel():.4g}%"
    return "unstructured"


def first_break(kept: Tensor, pattern: Pattern) -> str | None:
    """Returns where a mask, bool ``[outputs, ..., inputs]``, first keeps more than a pattern allows; None if nowhere.

    A tier pattern allows dense blocks, so no mask breaks it.
    """
    if pattern.tiers:
        return None
    if pattern.m:
        rows = kept.reshape(-1, kept.shape[-1])
        if rows.shape[1] < pattern.m:
            return None
        counts = _per_group(rows, pattern.m)
        if not bool((broken := counts > pattern.n).any()):
            return None
        row, group = (int(index) for index in broken.nonzero()[0])
        first, output = group * pattern.m, row * len(kept) // len(rows)
        return f"row {output}, inputs {first} to {first + pattern.m - 1}: {int(counts[row, group])} of {pattern.m} kept"
    return _first_break_of_share(kept.flatten(1), pattern)


def _first_break_of_share(rows: Tensor, pattern: Pattern) -> str | None:
    """Does the same for a pattern that drops a share of every row, of the layer, or of its blocks."""
    if pattern.unit == "row":
        zeros, size, what = (~rows).sum(1), rows.shape[1], "weights"
    elif pattern.unit == "layer":
        zeros, size, what = (~rows).sum().view(1), rows.numel(), "weights"
    else:
        blocks = block_scores(rows.float(), pattern.unit).flatten()
        zeros, size, what = (blocks == 0).sum().view(1), blocks.numel(), "blocks"
    needed = int(size * pattern.ratio + 1e-6)  # as Pattern rounds
    if not bool((few := zeros < needed).any()):
        return None
    index = int(few.nonzero()[0])
    found = f"{int(zeros[index])} of {size} {what} are zero, {needed} are needed"
    return f"row {index}: {found}" if pattern.unit == "row" else found


def _per_group(rows: Tensor, size: int) -> Tensor:
    """Counts the kept entries of every full group; a shorter one at the end is left out."""
    full = rows.shape[1] // size * size
    return rows[:, :full].reshape(len(rows), -1, size).sum(-1)


def packed_bytes(weight: Tensor, kept: Tensor, pattern: Pattern | None) -> int | None:
    """Returns the bytes that a matrix ``[outputs, inputs]`` takes packed; None if the library has no form for it."""
    if weight.dim() != 2 or not weight.is_floating_point() or weight.element_size() > 4:
        return None
    rows, cols = weight.shape
    if pattern is not None and pattern.tiers and isinstance(pattern.unit, tuple):
        (high, wide), k = pattern.unit, pattern.n
        packs = 8 <= high <= 128 and 8 <= wide <= 128 and wide % 8 == 0 and k <= high * wide
        return pack_tiered(weight, kept, k=k, block=(high, wide)).nbytes if packs else None
    if cols >= 4 and int(_per_group(kept, 4).max()) <= 2:
        return rows * (values_per_row(cols) * weight.element_size() + -(-cols // 8))
    return None


def tier_shares(kept: Tensor, pattern: Pattern) -> tuple[Tensor, str]:
    """Returns the tier of every block of a mask, bool ``[outputs, inputs]``, and the shares of the tiers in words."""
    assert isinstance(pattern.unit, tuple)
    tiers = smallest_tiers(kept, pattern.unit, pattern.n)
    dense, middle, few = (float((tiers == tier).float().mean()) for tier in range(3))
    return tiers, f"{dense:.0%} dense, {middle:.0%} 2:4, {few:.0%} top-{pattern.n}"
