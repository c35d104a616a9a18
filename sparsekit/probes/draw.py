"""A picture of recorded gradients: by layer over the steps, and by layer against the timestep."""

import math
import os
from collections.abc import Iterable, Mapping
from typing import Any

from .._version import DISTRIBUTION

KINDS = ("grad_output", "grad_input", "grad")
BY_TIMESTEP = "_by_timestep"
LEGEND = 12  # layers that a legend names; more are told apart by color alone, from the first to the last


def draw_gradients(records: Iterable[Mapping[str, Any]], path: str | os.PathLike[str]) -> None:
    """Draws recorded gradients into a file, with a panel for each kind of value and a line for each layer.

    Norms and mean magnitudes are drawn over the steps, and norms by timestep against it, as the mean of all records.
    Lines go from dark to light in the order of the layers.

    Args:
        records: dicts with a ``step``, as ``GradProbe.records`` or the lines of a run's ``metrics.jsonl`` are. Other
            values in them are left out: what is drawn is under ``grad_output/NAME``, ``grad_input/NAME``, ``grad/NAME``
            or, by timestep, ``grad_output_by_timestep/NAME``.
        path: the file to write; its suffix says in which format.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: there is nothing to draw in the records.
    """
    panels = _panels(records)
    if not panels:
        raise ValueError("the records hold no norms of gradients that could be drawn")
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"drawing needs matplotlib: pip install '{DISTRIBUTION}[systems]'") from error
    figure = Figure(figsize=(9, 3.2 * len(panels)), layout="constrained")
    for axes, (kind, layers) in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels.items(), strict=True):
        for index, (layer, (xs, ys)) in enumerate(layers.items()):
            color = colormaps["viridis"](0.95 * index / max(len(layers) - 1, 1))
            axes.plot(xs, ys, color=color, label=layer or "the model", marker="." if len(xs) < 30 else None)
        axes.set_yscale("log", nonpositive="mask")
        axes.set_title(kind.removesuffix(BY_TIMESTEP).replace("_", " of the "), loc="left", fontsize=10)
        axes.set_xlabel("timestep, as a share of all" if kind.endswith(BY_TIMESTEP) else "step")
        if len(layers) <= LEGEND:
            axes.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=120)


def _panels(records: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, tuple[list[float], list[float]]]]:
    """Returns the points of each line, by kind and layer."""
    panels: dict[str, dict[str, tuple[list[float], list[float]]]] = {}
    binned: dict[str, dict[str, list[list[float | None]]]] = {}
    for record in records:
        for key, value in record.items():
            kind, _, layer = key.partition("/")
            if kind.removesuffix(BY_TIMESTEP) not in KINDS:
                continue
            if kind.endswith(BY_TIMESTEP):
                binned.setdefault(kind, {}).setdefault(layer, []).append(value)
            elif isinstance(value, float) and math.isfinite(value):
                xs, ys = panels.setdefault(kind, {}).setdefault(layer, ([], []))
                xs.append(record["step"])
                ys.append(value)
    for kind, layers in binned.items():
        panels[kind] = {layer: _means(rows) for layer, rows in layers.items()}
    return panels


def _means(rows: list[list[float | None]]) -> tuple[list[float], list[float]]:
    """Returns the middle of each bin that has samples, as a share of all timesteps, and the mean of its values."""
    xs, ys = [], []
    for index, values in enumerate(zip(*rows, strict=True)):
        known = [value for value in values if value is not None]
        if known:
            xs.append((index + 0.5) / len(rows[0]))
            ys.append(sum(known) / len(known))
    return xs, ys
