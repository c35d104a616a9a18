"""The report of a sparse training: one entry for each selected layer, and their table."""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from .._table import table_lines
from .._timing import RATIO
from ..nn.common import autocast_dtype
from .layer import MaskedLinear
from .layouts import RATIOS, StepKind, hardware_layout


@dataclass(frozen=True)
class TrainLayerReport:
    """One selected layer of a sparse training.

    Args:
        name: its name in the model.
        shape: the shape of its weight.
        product: how it multiplies: in a hardware layout such as ``"cusparselt_sm90"``, at the token counts at which
            that is at least 1.05 times as fast; as ``"masked dense"``; or as a ``"plain"`` layer, which trains dense.
        reason: why it has no hardware layout, or what was measured so far: the time of a masked dense training step
            divided by that of a step in the layout.
    """

    name: str
    shape: tuple[int, ...]
    product: str
    reason: str


def report_layer(name: str, layer: nn.Linear, dense_reason: str | None) -> TrainLayerReport:
    """Returns the report of a layer as it is; ``dense_reason`` says why ``finish()`` left it dense, if it did."""
    weight, shape = layer.weight, tuple(layer.weight.shape)
    if not isinstance(layer, MaskedLinear):
        return TrainLayerReport(name, shape, "plain", dense_reason or "its sparse training is over")
    dtype, transposable = autocast_dtype(weight) or weight.dtype, layer.recipe.transposable
    layout, reason = hardware_layout(weight.device, dtype, weight.shape, transposable)
    if layout is None:
        return TrainLayerReport(name, shape, "masked dense", reason)
    ratios = RATIOS.get(StepKind(weight.device, dtype, weight.shape, transposable, layout), {})
    slower = ratios and max(ratios.values()) < RATIO
    measured = ", ".join(f"{ratio:.2f}x at {tokens} tokens" for tokens, ratio in sorted(ratios.items()))
    reason = f"{layout} is {measured}" if ratios else ""
    return TrainLayerReport(name, shape, "masked dense" if slower else layout, reason)


def layer_table(layers: Iterable[TrainLayerReport]) -> str:
    """Returns the layers as a table, with a line of totals."""
    layers = tuple(layers)
    rows = [("layer", "shape", "product", "reason")]
    for layer in layers:
        rows.append((layer.name or "(model)", "x".join(map(str, layer.shape)), layer.product, layer.reason))
    sparse = sum(layer.product != "plain" for layer in layers)
    dense = sum(layer.product == "masked dense" for layer in layers)
    total = f"{sparse} of {len(layers)} layers train sparse, {dense} of them by a masked dense product"
    return "\n".join([*table_lines(rows, "<<<<"), total])
