"""What ``sparse_training_`` did."""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class LayerReport:
    """One layer that was selected.

    Args:
        name: its name in the model.
        shape: the shape of its weight.
        product: what it multiplies with: a hardware layout such as ``"cusparselt_sm90"`` at the token counts where that
            is at least 1.05 times as fast, else ``"masked dense"``; or ``"plain"`` where it is a plain layer.
        reason: why not in a hardware layout, or what was measured of it so far: the time of a masked dense training
            step over that of the layout's.
    """

    name: str
    shape: tuple[int, ...]
    product: str
    reason: str


def table(layers: Iterable[LayerReport]) -> str:
    """The layers as a table, with a line of totals."""
    layers = tuple(layers)
    rows = [("layer", "shape", "product", "reason")]
    for layer in layers:
        rows.append((layer.name or "(model)", "x".join(map(str, layer.shape)), layer.product, layer.reason))
    wide = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, wide, strict=True)).rstrip() for row in rows]
    sparse = sum(layer.product != "plain" for layer in layers)
    dense = sum(layer.product == "masked dense" for layer in layers)
    return "\n".join(
        [*lines, f"{sparse} of {len(layers)} layers train sparse, {dense} of them by a masked dense product"]
    )
