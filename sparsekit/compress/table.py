"""The text of a ``CompressReport``: a table with a row for each kind of layer, and a summary."""

from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING

from .._timing import MAX_SPREAD, Timing
from ..masks import LOST_ZEROS, WAY_BACK

if TYPE_CHECKING:
    from .report import CompressLayerReport, CompressReport

GIVEN_BACK = "given back"  # how the reason of a layer begins that stays because of the whole model
MAX_NAMES = 3  # of plain layers in a row


def grouped_rows(layers: Collection["CompressLayerReport"]) -> tuple[list[str], list[list[str]]]:
    """Returns the head and the rows of a table; layers of one shape, reason and measurement share a row.

    A column has the ratios of convolutions, each with its images. Where a layer is lossy, another has the largest error
    of each row. The rows of plain layers end with their names, three at most.
    """
    alike: dict[object, list[CompressLayerReport]] = {}
    for layer in layers:
        alike.setdefault((layer.shape, layer.decision, layer.reason, str(layer.timings)), []).append(layer)
    sizes = {size for layer in layers for size in layer.timings}
    buckets = sorted(size for size in sizes if isinstance(size, int))
    images = any(isinstance(size, str) for size in sizes)
    lossy = any(layer.error is not None for layer in layers)
    head = [
        "layers",
        "now",
        *["error"] * lossy,
        *("1 token" if tokens == 1 else f"{tokens} tokens" for tokens in buckets),
        *["images"] * images,
        "why",
    ]
    rows = []
    for members in alike.values():
        first = members[0]
        ratios = [_ratios(first.timing(tokens)) for tokens in buckets] + [_of_images(first)] * images
        shape = "x".join(map(str, first.shape))
        why = first.why or first.reason
        why = f"{why} ({_names(members)})" if first.decision == "plain" else why
        error = [_largest_error(members)] * lossy
        rows.append([f"{len(members)} of {shape}", _form(first), *error, *ratios, why])
    return head, rows


def summary(report: "CompressReport") -> Iterator[str]:
    """Yields the lines below the table, which sum it up."""
    layers = report.layers
    if any(layer.timings for layer in layers):
        yield "ratios: times the plain layer (times the best dense); of what a layer became, else of what came closest"
    if filled := [layer for layer in layers if LOST_ZEROS in layer.reason]:
        yield f"{len(filled)} with a stored mask whose weight {LOST_ZEROS}: {WAY_BACK}"
    if report.swapped:
        sparse = [layer for layer in layers if layer.sparse]
        dense = [layer for layer in layers if not layer.sparse and layer.decision != "plain"]
        names = " or ".join(sorted({layer.decision for layer in dense})) or "prepacked"
        yield f"{_bytes('sparse (2:4 or tiered)', sparse)}; {_bytes(f'only {names}, dense', dense)}"
        share = report.speedup / report.dense_speedup
        int8 = any("int8" in measured for layer in layers for measured in layer.timings.values())
        forms = "prepacked or in int8" if int8 else "prepacked"
        yield (
            f"layers alone: {report.speedup:.2f}x plain; {forms}, without any sparsity, they would be "
            f"{report.dense_speedup:.2f}x, so sparsity itself brings {share:.2f}x"
        )
        yield from _lossy(report)
    elif any(layer.why.startswith(GIVEN_BACK) for layer in layers):
        yield "every layer stays as it is: what is faster alone does not make a pass of the model faster"
    elif any(layer.timings for layer in layers) and not report.undecided:
        yield "nothing is faster than dense on this machine: every layer stays as it is"
    elif layers and not report.undecided:
        yield "no layer was measured: each row says why"
    if report.passes:
        yield f"whole model: {', '.join(f'{timing.ratio:.2f}x' for timing in report.passes)} plain, on the batches"
    elif report.remark:
        yield f"whole model: {report.remark}"
    for form, timings in report.forms.items():
        yield f"with every layer {form}: {', '.join(map(_settled, timings))} what was chosen for each layer alone"
    if report.undecided:
        yield (
            f"{len(report.undecided)} undecided: the machine is busy (spread up to {report.disturbance:.1f}), "
            "run again when it is quiet"
        )
    yield (
        f"{len(report.swapped)} of {len(layers)} layers swapped, "
        f"{report.bytes_before / 2**20:.1f} MiB -> {report.bytes_after / 2**20:.1f} MiB, "
        f"measured in {report.tune_seconds:.1f} s, converted in {report.conversion_seconds:.1f} s"
    )


def _form(layer: "CompressLayerReport") -> str:
    """Returns what a layer became, with its layout if it has one."""
    names = {name for name in layer.kernels.values() if name.startswith(f"{layer.decision} ")}
    return names.pop() if len(names) == 1 else layer.decision


def _settled(timing: Timing) -> str:
    busy = timing.spread > MAX_SPREAD
    return f"{timing.ratio:.2f}x" + (f" (undecided, the machine is busy: spread {timing.spread:.1f})" if busy else "")


def _lossy(report: "CompressReport") -> Iterator[str]:
    """Yields what lossy layers change."""
    errors = [layer.error for layer in report.layers if layer.error is not None]
    if errors:
        most = max(errors, key=lambda each: each.error)
        yield (
            f"{len(errors)} lossy, of which decompress_ returns the rounded weights: relative error of the {most.of} "
            f"at most {most.error:.2%}"
        )
    if (change := report.change) is not None:
        same = "" if change.agreement is None else f", and the largest logit stays at {change.agreement:.2%}"
        yield f"outputs of the whole model: a relative change of {change.error:.2%} on the batches{same}"


def _largest_error(layers: Sequence["CompressLayerReport"]) -> str:
    errors = [layer.error.error for layer in layers if layer.error is not None]
    return f"{max(errors):.2%}" if errors else "-"


def _names(layers: Sequence["CompressLayerReport"]) -> str:
    first = ", ".join(layer.name for layer in layers[:MAX_NAMES])
    return first if len(layers) <= MAX_NAMES else f"{first} and {len(layers) - MAX_NAMES} more"


def _bytes(what: str, layers: Sequence["CompressLayerReport"]) -> str:
    before, after = (sum(getattr(layer, name) for layer in layers) for name in ("bytes_before", "bytes_after"))
    size = f", {before / 2**20:.1f} MiB -> {after / 2**20:.1f} MiB" if layers else ""
    return f"{what}: {len(layers)} {'layer' if len(layers) == 1 else 'layers'}{size}"


def _of_images(layer: "CompressLayerReport") -> str:
    """Returns the ratios of a convolution for all images that it gets."""
    sizes = [size for size in layer.timings if isinstance(size, str)]
    return ", ".join(f"{_ratios(layer.timing(size))} at {size}" for size in sizes) or "-"


def _ratios(timing: Timing | None) -> str:
    return "-" if timing is None else f"{timing.ratio:.2f}x ({timing.best_dense:.2f}x)"
