"""The report of ``prune_``."""

import math
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from .._json import write_json
from .._table import table_lines

SHOWN = 3  # layer names that are shown for one reason


@dataclass(frozen=True)
class PruneLayerReport:
    """One pruned layer.

    Args:
        name: the name of the layer; of experts, that of the parameter.
        shape: the shape of the weight.
        pattern: what the mask keeps, such as ``"2:4"``.
        dropped: number of weights that the mask drops.
        weights: number of weights.
        error: relative output error ``||X (W - W')^T|| / ||X W^T||`` on up to 256 calibration inputs ``X``, drawn
            evenly from all. None without batches, or if none reached the layer; NaN if an input is NaN or infinite.
        seconds: time to prune the layer, without the forward passes of calibration.
        remark: what was special about this layer; empty if nothing was.
    """

    name: str
    shape: tuple[int, ...]
    pattern: str
    dropped: int
    weights: int
    error: float | None
    seconds: float = field(default=0.0, compare=False)
    remark: str = ""

    @property
    def sparsity(self) -> float:
        """The share of the weights that the mask drops."""
        return self.dropped / self.weights


@dataclass(frozen=True)
class Skipped:
    """A layer, or another parameter of at least two dimensions, that was selected but not pruned, and the reason."""

    name: str
    reason: str


@dataclass(frozen=True)
class PruneReport:
    """The result of ``prune_`` for each layer; ``str(report)`` is a table.

    Args:
        method: the ``repr`` of the method.
        layers: the pruned layers, in the order in which they were pruned.
        skipped: everything that was left dense, each with the reason: layers, embeddings, and every other parameter of
            at least two dimensions and one group.
        seconds: wall-clock time of the whole call.
        model_weights: number of all parameters of the model, with biases and embeddings; shared ones count once.
        batchnorm: names of the BatchNorm modules that have new statistics.
    """

    method: str
    layers: tuple[PruneLayerReport, ...]
    skipped: tuple[Skipped, ...]
    seconds: float
    model_weights: int
    batchnorm: tuple[str, ...] = ()

    @property
    def weights(self) -> int:
        """The number of weights in the pruned layers."""
        return sum(layer.weights for layer in self.layers)

    @property
    def sparsity(self) -> float:
        """The share of the pruned layers' weights that the masks drop."""
        return sum(layer.dropped for layer in self.layers) / max(self.weights, 1)

    @property
    def model_sparsity(self) -> float:
        """The share of all parameters of the model that the masks of this call drop."""
        return sum(layer.dropped for layer in self.layers) / max(self.model_weights, 1)

    @property
    def error(self) -> float | None:
        """The mean relative output error of the layers that have one; None if none has."""
        errors = [layer.error for layer in self.layers if layer.error is not None]
        return sum(errors) / len(errors) if errors else None

    def __str__(self) -> str:
        rows = [("layer", "shape", "pattern", "sparsity", "error")]
        for layer in self.layers:
            shape = "x".join(map(str, layer.shape))
            rows.append((layer.name or "(model)", shape, layer.pattern, f"{layer.sparsity:.2%}", _number(layer.error)))
        rows.append(
            (f"{len(self.layers)} layers", f"{self.weights:,}", "", f"{self.sparsity:.2%}", _number(self.error))
        )
        lines = table_lines(rows, "<>>>>")
        lines.insert(-1, "-" * len(lines[0]))
        lines += [f"skipped {text}" for text in summary((each.reason, each.name) for each in self.skipped)]
        lines += summary((layer.remark, layer.name) for layer in self.layers if layer.remark)
        if self.batchnorm:
            lines.append(f"re-estimated the statistics of {_names(list(self.batchnorm))}")
        lines.append(f"of the whole model: {self.model_sparsity:.2%} of {self.model_weights:,} parameters")
        return "\n".join([*lines, f"{self.method}, {self.seconds:.1f} s"])

    def to_json(self) -> dict[str, Any]:
        """Returns the report and its totals for JSON, which has no NaN: an error that is NaN becomes None."""
        totals = {
            "weights": self.weights,
            "sparsity": self.sparsity,
            "model_sparsity": self.model_sparsity,
            "error": _finite(self.error),
        }
        layers = [{**asdict(layer), "error": _finite(layer.error), "sparsity": layer.sparsity} for layer in self.layers]
        return {**asdict(self), "layers": layers, **totals}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the report as JSON, whole or not at all."""
        write_json(path, self.to_json())


def summary(texts: Iterable[tuple[str, str]]) -> list[str]:
    """Returns a line ``"NAMES: TEXT"`` for each text, given pairs of a text and the name of a layer."""
    names: dict[str, list[str]] = {}
    for text, name in texts:
        names.setdefault(text, []).append(name or "(model)")
    return [f"{_names(alike)}: {text}" for text, alike in names.items()]


def _names(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= SHOWN else f"{', '.join(names[:SHOWN])} and {len(names) - SHOWN} more"


def _finite(error: float | None) -> float | None:
    return error if error is None or math.isfinite(error) else None


def _number(error: float | None) -> str:
    return "-" if error is None else f"{error:.4f}"
