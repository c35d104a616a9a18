"""What ``compress_`` did, and what it measured."""

import os
from dataclasses import asdict, dataclass, field

from .._files import write_json
from .tune import Timing


@dataclass(frozen=True)
class LayerReport:
    """One linear layer.

    Args:
        name: its name in the model.
        shape: ``(out_features, in_features)``.
        decision: ``"2:4"``, ``"tiered"``, ``"prepacked"``, or ``"plain"`` where the layer stays what it was.
        reason: why.
        calls: how often the sample ran it, by token bucket.
        timings: what was measured, by token bucket and name; what gave a wrong result has None. On a CPU the names are
            those of the decisions. On a GPU ``"linear24"`` is the decode kernel, ``"dense"`` a dense copy, and
            ``"cusparselt_sm90:5:2:1"`` cuSPARSELt by algorithm 5 with split-K 2 of mode 1.
        names: which of the timings the layer runs with, by token bucket.
    """

    name: str
    shape: tuple[int, int]
    decision: str
    reason: str
    calls: dict[int, int] = field(default_factory=dict)
    timings: dict[int, dict[str, Timing | None]] = field(default_factory=dict)
    names: dict[int, str] = field(default_factory=dict)

    def timing(self, tokens: int) -> Timing | None:
        """The timing of the module that was chosen, or, where the layer stays, of the best that was turned down."""
        found = {name: timing for name, timing in self.timings.get(tokens, {}).items() if timing is not None}
        if tokens in self.names:
            return found[self.names[tokens]]
        turned_down = [timing for name, timing in found.items() if name not in ("plain", "dense")]
        return max(turned_down, key=lambda timing: timing.ratio, default=None)


@dataclass(frozen=True)
class CompressReport:
    """What ``compress_`` did to each linear layer; ``str`` gives a table.

    Args:
        layers: one entry per linear layer that was selected, in the order of ``named_modules``.
        bytes_before, bytes_after: parameters and buffers of the whole model.
        tune_seconds: time spent on the sample and on measuring.
        conversion_seconds: time spent on packing and swapping.
    """

    layers: tuple[LayerReport, ...]
    bytes_before: int
    bytes_after: int
    tune_seconds: float
    conversion_seconds: float

    @property
    def swapped(self) -> tuple[str, ...]:
        """The names of the layers that were swapped."""
        return tuple(layer.name for layer in self.layers if layer.decision != "plain")

    def __str__(self) -> str:
        buckets = sorted({tokens for layer in self.layers for tokens in layer.timings})
        rows = [["layer", "shape", "now", *(f"{tokens} tokens" for tokens in buckets), "reason"]]
        for layer in self.layers:
            cells = [_ratios(layer.timing(tokens)) for tokens in buckets]
            rows.append([layer.name, "x".join(map(str, layer.shape)), layer.decision, *cells, layer.reason])
        wide = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, wide, strict=True)).rstrip() for row in rows]
        return "\n".join(
            [
                *lines,
                "ratios: against the plain layer (against the best dense); of what a layer became, or might have",
                f"{len(self.swapped)} of {len(self.layers)} layers swapped, "
                f"{self.bytes_before / 2**20:.1f} MiB -> {self.bytes_after / 2**20:.1f} MiB, "
                f"measured in {self.tune_seconds:.1f} s, converted in {self.conversion_seconds:.1f} s",
            ]
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the report as JSON, whole or not at all."""
        write_json(path, asdict(self))


def _ratios(timing: Timing | None) -> str:
    return "-" if timing is None else f"{timing.ratio:.2f}x ({timing.best_dense:.2f}x)"
