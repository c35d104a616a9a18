"""The report of ``compress_``: what each layer became, why, and what was measured."""

import os
from dataclasses import asdict, dataclass, field

from torch import nn

from .._json import write_json
from .._table import table_lines
from .._timing import Timing
from .candidates import DENSE_COPY
from .change import LayerError, OutputChange
from .choose import Choice
from .lossy import DENSE_KERNELS
from .memory import weight_bytes
from .sites import LayerSite
from .sizes import reported
from .table import grouped_rows, summary


@dataclass(frozen=True)
class CompressLayerReport:
    """What ``compress_`` did to one layer, and why.

    Args:
        name: its name in the model.
        shape: ``(out_features, in_features)``; of convolutions and experts that of the weight.
        decision: ``"2:4"``, ``"tiered"``, ``"prepacked"``, with a ``precision`` also ``"2:4 int8"``, ``"2:4 int4"``,
            ``"2:4 nf4"`` or ``"int8"``, or ``"plain"`` where the layer stays what it was.
        reason: why, with every form that was turned down.
        calls: how often the batches ran it, by token count rounded up to a power of two (512 at most on a CPU); of a
            convolution by number, height and width of the images, such as ``"4x32x32"`` or ``"4x32x32 channels last"``.
        timings: what was measured, by token count or images, and kernel; None for a wrong result. On a CPU a kernel has
            the name of the decision, with its layout if it has one (``"2:4 input pairs"``, ``"2:4 row pairs"``), and
            ``"dense"`` is a dense copy beside a sparse weight. On a GPU ``"linear24"`` is the
            decode kernel (``"sparse"`` in a plan), ``"dense"`` a dense copy, and ``"cusparselt_sm90:5:2:1"`` cuSPARSELt
            by algorithm 5 with split-K 2 of mode 1.
        kernels: the kernel that the layer takes, by token count or images.
        why: the reason in a few words, with the runner-up alone, as tables show it.
        undecided: whether it stays plain only because the machine was too busy to tell what is faster.
        bytes_before, bytes_after: of its weight, without a stored mask.
        error: how much a lossy form changes; None for another form.
    """

    name: str
    shape: tuple[int, ...]
    decision: str
    reason: str
    calls: dict[int | str, int] = field(default_factory=dict)
    timings: dict[int | str, dict[str, Timing | None]] = field(default_factory=dict)
    kernels: dict[int | str, str] = field(default_factory=dict)
    why: str = ""
    undecided: bool = False
    bytes_before: int = 0
    bytes_after: int = 0
    error: LayerError | None = None

    @property
    def sparse(self) -> bool:
        """Whether it computes without the zeros of its weight, at some size of its input at least."""
        return self.decision not in DENSE_KERNELS

    def timing(self, size: int | str) -> Timing | None:
        """Returns the timing of what was chosen for a key of ``timings``.

        Where the layer stays, it is that of its best sparse kernel.
        """
        found = {name: timing for name, timing in self.timings.get(size, {}).items() if timing is not None}
        if size in self.kernels:
            return found[self.kernels[size]]
        sparse = [timing for name, timing in found.items() if name not in (DENSE_COPY, *DENSE_KERNELS)]
        dense = [timing for name, timing in found.items() if name in DENSE_KERNELS[1:]]
        return max(sparse or dense, key=lambda timing: timing.ratio, default=None)

    def seconds(self, *kernels: str) -> float:
        """Returns the time of all calls in the batches: of the layer as it is now, or with the fastest of some kernels.

        Where none of them was measured, or all are slower than the plain layer, the plain layer's time counts.
        """
        total = 0.0
        for size, measured in self.timings.items():
            plain = measured.get("plain")
            others = [measured.get(name) for name in kernels or [self.kernels.get(size, "plain")]]
            taken = [timing.seconds for timing in (plain, *others) if timing is not None]
            if taken:
                total += self.calls[size] * (min(taken) if kernels else taken[-1])
        return total


def layer_report(
    site: LayerSite, choice: Choice | None, module: nn.Module | None, error: LayerError | None
) -> CompressLayerReport:
    """Returns the report of a layer, given the module that took its place, if one did."""
    calls = {reported(size): count for size, count in sorted(site.calls.items())}
    weight = weight_bytes(site.layer)
    if choice is None:
        reason = site.reason or ""
        return CompressLayerReport(
            site.name, site.shape, "plain", reason, calls, why=reason, bytes_before=weight, bytes_after=weight
        )
    return CompressLayerReport(
        site.name,
        site.shape,
        choice.decision,
        choice.reason,
        calls,
        {reported(size): timings for size, timings in choice.timings.items()},
        {reported(size): kernel for size, kernel in choice.kernels.items()},
        choice.why,
        choice.undecided,
        bytes_before=weight,
        bytes_after=weight if module is None else weight_bytes(module),
        error=error,
    )


@dataclass(frozen=True, repr=False)
class CompressReport:
    """What ``compress_`` did to each layer; ``print`` shows a table, layers of one kind in one row.

    Args:
        layers: one entry per linear layer or convolution that was selected, in the order of ``named_modules``.
        bytes_before, bytes_after: of the parameters and buffers of the whole model, and of what layers hold besides.
        tune_seconds: time spent on running the batches and on measuring.
        conversion_seconds: time spent on packing and swapping.
        passes: the whole model's own forward, compressed against plain, on up to four of the batches.
        remark: why the whole model was not timed, where it was not.
        forms: the whole model with all layers in one form, against what was chosen for each alone, on these batches;
            for the few forms that might have been faster. Of one that was taken, it says why.
        change: how much lossy layers change the outputs on up to four of the batches; None without such layers, or
            where no pass could be run.
    """

    layers: tuple[CompressLayerReport, ...]
    bytes_before: int
    bytes_after: int
    tune_seconds: float
    conversion_seconds: float
    passes: tuple[Timing, ...] = ()
    remark: str = ""
    forms: dict[str, tuple[Timing, ...]] = field(default_factory=dict)
    change: OutputChange | None = None

    @property
    def swapped(self) -> tuple[str, ...]:
        """The names of the layers that were swapped."""
        return tuple(layer.name for layer in self.layers if layer.decision != "plain")

    @property
    def undecided(self) -> tuple[str, ...]:
        """The names of the layers that stay only because the machine was too busy to measure on."""
        return tuple(layer.name for layer in self.layers if layer.undecided)

    @property
    def speedup(self) -> float:
        """How many times faster the measured layers are than plain ones, over all calls in the batches; 1 if none."""
        return self._over_plain()

    @property
    def dense_speedup(self) -> float:
        """How many times faster they would be without any sparsity: in a dense form where that is faster than plain."""
        return self._over_plain(*DENSE_KERNELS)

    def _over_plain(self, *kernels: str) -> float:
        plain = sum(layer.seconds("plain") for layer in self.layers)
        other = sum(layer.seconds(*kernels) for layer in self.layers)
        return plain / other if other else 1.0

    @property
    def disturbance(self) -> float:
        """How much the machine was disturbed: the largest spread of what was measured."""
        timings = [
            timing for layer in self.layers for measured in layer.timings.values() for timing in measured.values()
        ]
        return max((timing.spread for timing in timings if timing is not None), default=0.0)

    def __str__(self) -> str:
        head, rows = grouped_rows(self.layers)
        return "\n".join([*table_lines([head, *rows], "<" * len(head)), *summary(self)])

    def __repr__(self) -> str:
        return f"<CompressReport: {len(self.swapped)} of {len(self.layers)} layers swapped; print it for the table>"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the report as JSON, whole or not at all."""
        write_json(path, asdict(self))
