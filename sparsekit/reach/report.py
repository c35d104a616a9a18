"""What ``reach_`` made of each layer, and what it predicted and measured."""

from dataclasses import dataclass

from .._table import table_lines


@dataclass(frozen=True)
class ReachLayer:
    """What a layer became.

    Args:
        name: its name in the model.
        form: what it is now, as in a ``CompressReport``; ``"plain"`` where it stays as it was.
        error: the relative error of its outputs on the calibration inputs: the norm of the change over the norm.
        plain_ms: the milliseconds of its calls in a pass on the sample, as it was.
        ms: the same in its form, as they were measured alone.
    """

    name: str
    form: str
    error: float
    plain_ms: float
    ms: float


@dataclass(frozen=True)
class ReachReport:
    """What ``reach_`` did.

    Args:
        layers: all layers that could be changed.
        asked: how many times as fast a pass was to be.
        predicted: how many times as fast it would be by the times of the layers.
        measured: how many times as fast it is, by the median of paired passes in turns.
        error: the root of the sum of the squares of all layers' errors.
        error_24: the same if all layers that can be 2:4 were; None without ``"2:4"``.
        plans: how many assignments were measured.
    """

    layers: tuple[ReachLayer, ...]
    asked: float
    predicted: float
    measured: float
    error: float
    error_24: float | None
    plans: int

    def __str__(self) -> str:
        """Returns a table of the layers, and the figures of the whole model."""
        rows = [("layer", "form", "error", "plain ms", "ms")]
        rows += [
            (each.name, each.form, f"{each.error:.4f}", f"{each.plain_ms:.3f}", f"{each.ms:.3f}")
            for each in self.layers
        ]
        everywhere = "" if self.error_24 is None else f", {self.error_24:.4f} with 2:4 everywhere"
        return "\n".join(
            [
                *table_lines(rows, "<<>>>"),
                f"a pass is {self.measured:.2f}x as fast (asked {self.asked:.2f}x, predicted {self.predicted:.2f}x)",
                f"total error {self.error:.4f}{everywhere}; {self.plans} assignments measured",
            ]
        )
