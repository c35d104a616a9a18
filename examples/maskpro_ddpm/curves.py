"""The curves of a training: losses of drawn masks beside those of the initial one, and how much better they are."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

WINDOW = 50  # steps that a drawn mean is over


def running_mean(values: np.ndarray) -> np.ndarray:
    """Returns the mean of each value and those before it, up to ``WINDOW`` in all."""
    sums = np.concatenate([[0.0], values.cumsum()])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - WINDOW, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def draw_curves(records: list[dict[str, Any]], path: Path) -> None:
    """Draws what a run of train_diffusion.py has recorded."""
    steps = [record["step"] for record in records]
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    losses, better = figure.subplots(1, 2)
    for name, color in (("initial_loss", "#8a8a8a"), ("loss", "#2f5d9b")):
        losses.plot(steps, running_mean(_column(records, name)), color=color, label=name.replace("_", " "))
    losses.set(xlabel="step", ylabel="loss on the batch", yscale="log")
    losses.legend(frameon=False)
    values = _column(records, "improvement")
    better.plot(steps, values, color="#c9d3e3", linewidth=0.6)
    better.plot(steps, running_mean(values), color="#2f5d9b")
    better.axhline(0, color="#8a8a8a", linewidth=0.8)
    better.set(xlabel="step", ylabel="loss below the initial mask's")
    figure.savefig(path, dpi=100)


def _column(records: list[dict[str, Any]], name: str) -> np.ndarray:
    return np.array([record[name] for record in records], dtype=np.float64)
