"""The 2:4 and the tiered product against the dense one."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.sparse import to_sparse_semi_structured

from bench.shapes import by_name, name
from bench.timing import medians, ratio
from sparsekit.compress.gpu import ALGORITHMS, SPLITS
from sparsekit.ops import _vendor
from sparsekit.ops.hardware_linear24 import UNKNOWN
from sparsekit.ops.tiered import pack_tiered

from .checks import check_close, op, reference, total_bytes
from .goals import linear_goals
from .lab import Lab, Shape, gpu_lab
from .rows import Row, Rows, one_line, read

DENSE, COMPILED = "F.linear", "F.linear compiled"
DECODE = 64  # tokens, up to which linear24 is measured
SHARES, KEPT = (0.35, 0.45, 0.2), 10  # of dense, 2:4 and top-k blocks after three-tier pruning, and its k
COMPILED_TOKENS, TIERED_TOKENS = (1, 16, 1024), (1, 8, 16, 32, 1024)
QUICK, BEST = 4, 4  # buffers of the first timing of an algorithm, and algorithms that are then timed in turns

Product = Callable[[Tensor], Tensor]
# Of cuSPARSELt: its id, into how many parts it splits the inner dimension, and how it adds them up.
Algorithm = tuple[int, int, int]


@dataclass(frozen=True)
class Layer:
    """A linear layer with a sparse weight, dense and packed; ``sparse`` multiplies by the packed weight."""

    weight: Tensor
    bias: Tensor
    packed_bytes: int
    sparse: Product

    def dense(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


def layers24(lab: Lab, shape: Shape) -> Sequence[Layer]:
    """Makes 2:4 layers with random weights, as many as exceed the cache."""
    kernel = op("linear24")

    def make() -> Layer:
        weight = reference("nm_prune")(lab.randn(*shape) / shape[1] ** 0.5, 2, 4, None)[0]
        bias, packed = lab.randn(shape[0]), reference("pack24")(weight, None, False)
        return Layer(weight, bias, total_bytes(packed), lambda x: kernel(x, *packed, bias))

    return lab.sets(make, 2 * shape[0] * shape[1])


def layers_tiered(lab: Lab, shape: Shape) -> Sequence[Layer]:
    """Makes layers with random weights and tiers, as many as exceed the cache."""
    kernel = op("linear_tiered")

    def make() -> Layer:
        share = torch.rand([-(-side // 16) for side in shape], device=lab.device)
        tiers = (share >= SHARES[0]).to(torch.uint8) + (share >= SHARES[0] + SHARES[1]).to(torch.uint8)
        weight = op("tier_prune")(lab.randn(*shape) / shape[1] ** 0.5, tiers, KEPT, 16, 16, None, None)[0]
        bias, packed = lab.randn(shape[0]), pack_tiered(weight, k=KEPT)
        return Layer(weight, bias, packed.nbytes, lambda x: kernel(x, *packed.tensors, bias, len(weight)))

    return lab.sets(make, 2 * shape[0] * shape[1])


def semi_structured(layer: Layer) -> Product:
    weight = to_sparse_semi_structured(layer.weight)
    return lambda x: F.linear(x, weight, layer.bias)


def compare(lab: Lab, forms: Mapping[str, Sequence[Product]], x: Tensor, right: Tensor, eager: bool = False) -> Row:
    """Returns the row of one product: its forms, one callable per buffer, compared with ``DENSE``.

    A form that differs from ``right``, the product in fp32, is named and not timed. With ``eager``, the ratios are
    of what a caller waits for, the host included.
    """
    timed, wrong = {}, {}
    for key, calls in forms.items():
        try:
            check_close(calls[0](x), right)
            timed[key] = [partial(call, x) for call in calls]
        except Exception as error:
            wrong[key] = one_line(error)
    times = lab.clock.time_in_turns(timed)
    compared = times.eager() if eager else times.device
    row: Row = {"shape": f"{right.shape[1]}x{x.shape[1]}", "tokens": len(x), "goal": {}, "wrong": wrong}
    row |= {"seconds": medians(times.device), "host": medians(times.host)}
    return row | {"ratios": {key: ratio(compared, key, DENSE) for key in timed if key != DENSE}}


def compare_layers(lab: Lab, made: Sequence[Layer], forms: Mapping[str, Sequence[Product]], x: Tensor) -> Row:
    """Returns the row of one product by layers of which ``forms`` are the sparse forms."""
    return compare(lab, {DENSE: [layer.dense for layer in made], **forms}, x, expected(made[0], x))


def expected(layer: Layer, x: Tensor) -> Tensor:
    return F.linear(x.float(), layer.weight.float(), layer.bias.float())


def rows_at_tokens(lab: Lab, rows: Rows, shape: Shape, tokens: Sequence[int], do: Callable[[Tensor], Row]) -> None:
    """Writes, for each token count, the row that ``do`` returns for an input of that many tokens."""
    by_tokens = {f"{name(shape)}, {count} tokens": count for count in tokens}
    rows.for_each(by_tokens, lambda count: do(lab.randn(count, shape[1])))


def tune(lab: Lab, rows: Rows, made: Sequence[Layer], x: Tensor) -> None:
    """Chooses the configuration of the kernel that multiplies by the packed weights."""
    right = expected(made[0], x)
    lab.tune(rows, [partial(layer.sparse, x) for layer in made], lambda y: check_close(y, right))


def linear(lab: Lab, rows: Rows) -> None:
    """Times every form of a linear layer at every shape and token count (check 3), with the vendor's defaults."""

    def at_shape(shape: Shape) -> None:
        made, forms = layers24(lab, shape), {}
        with rows.guard(f"semi-structured {name(shape)}"):
            forms["semi-structured"] = [semi_structured(layer) for layer in made]

        def one(x: Tensor) -> Row:
            decode = {}
            if len(x) <= DECODE:
                tune(lab, rows, made, x)
                decode["linear24"] = [layer.sparse for layer in made]
            row = compare_layers(lab, made, decode | forms, x) | {"goal": linear_goals(name(shape), len(x))}
            if len(x) == 1:
                host = ", ".join(f"{key} {seconds * 1e6:.0f} us" for key, seconds in row["host"].items())
                row["said"] = f"{name(shape)}, the host's time for one token: {host}"
            return row

        rows_at_tokens(lab, rows, shape, lab.sizes.tokens, one)

    rows.for_each(by_name(lab.sizes.linear), at_shape)
    made = layers24(lab, lab.sizes.linear[0])
    options = {"mode": "max-autotune-no-cudagraphs"} if lab.backend == "inductor" else {}

    def compiled(x: Tensor) -> Row:
        tuned: Any = torch.compile(F.linear, backend=lab.backend, dynamic=False, **options)
        calls: list[Product] = [lambda x, layer=layer: tuned(x, layer.weight, layer.bias) for layer in made]
        return compare_layers(lab, made, {COMPILED: calls}, x)

    rows_at_tokens(lab, rows, lab.sizes.linear[0], COMPILED_TOKENS, compiled)


def tiered(lab: Lab, rows: Rows) -> None:
    """Times ``linear_tiered``, which unpacks the weight and calls cuBLAS if there are many tokens."""

    def at_shape(shape: Shape) -> None:
        made = layers_tiered(lab, shape)

        def one(x: Tensor) -> Row:
            tune(lab, rows, made, x)
            row = compare_layers(lab, made, {"linear_tiered": [layer.sparse for layer in made]}, x)
            took, faster, nbytes = *(row[key]["linear_tiered"] for key in ("seconds", "ratios")), made[0].packed_bytes
            said = f"{row['shape']}, {len(x)} tokens: {took * 1e6:.1f} us, {faster:.2f}x of cuBLAS, "
            return row | {"said": said + f"{nbytes / took / 1e9:.0f} GB/s of its {nbytes / 1e6:.1f} MB"}

        rows_at_tokens(lab, rows, shape, TIERED_TOKENS, one)

    rows.for_each(by_name((lab.sizes.linear[0], lab.sizes.linear[-1])), at_shape)


def search(lab: Lab, rows: Rows) -> None:
    """Times every algorithm of cuSPARSELt and splits of the best (check 3), each after a check of its result."""

    def at_shape(shape: Shape) -> None:
        made = layers24(lab, shape)
        packed = [_vendor.compress(layer.weight) for layer in made]
        rows_at_tokens(lab, rows, shape, lab.sizes.tokens, lambda x: best_algorithm(lab, made, packed, x))

    rows.for_each(by_name(lab.sizes.linear), at_shape)


def best_algorithm(lab: Lab, made: Sequence[Layer], packed: Sequence[Tensor], x: Tensor) -> Row:
    """Returns the row of the fastest algorithm for one product."""
    right, seconds, wrong = expected(made[0], x), {}, {}

    def calls(algorithm: Algorithm) -> list[Product]:
        return [
            lambda x, layer=layer, blob=blob: _vendor.hardware_linear24(
                x, blob, layer.bias, len(layer.weight), UNKNOWN, *algorithm
            )
            for layer, blob in zip(made, packed, strict=True)
        ]

    def attempt(algorithms: Iterable[Algorithm]) -> None:
        for algorithm in algorithms:
            try:
                check_close(calls(algorithm)[0](x), right)
                seconds[algorithm] = lab.clock.seconds([partial(call, x) for call in calls(algorithm)[:QUICK]])
            except Exception as error:
                wrong[str(algorithm)] = one_line(error)

    picked = _vendor.suggest(x, packed[0], made[0].bias, len(made[0].weight), UNKNOWN)
    attempt(dict.fromkeys([*((id_, 1, -1) for id_ in range(ALGORITHMS)), *([picked] if picked else [])]))
    if not seconds:
        raise ValueError(f"no algorithm is right: {next(iter(wrong.values()), 'there is none')}")
    attempt((min(seconds, key=seconds.__getitem__)[0], *split) for split in SPLITS)
    best = {str(each): each for each in sorted(seconds, key=seconds.__getitem__)[:BEST]}
    row = compare_layers(lab, made, {key: calls(each) for key, each in best.items()}, x)
    winner = min(row["ratios"], key=row["seconds"].__getitem__)
    for key in ("seconds", "host", "ratios"):
        row[key] = {form: row[key][each] for form, each in ((DENSE, DENSE), ("cuSPARSELt", winner)) if each in row[key]}
    row |= {"choice": f"algorithm {winner}", "algorithm": best[winner], "picked by the library": picked}
    return row | {"tried": len(seconds), "next": {key: seconds[best[key]] for key in best}, "wrong": wrong}


def profile(folder: str, size: int = 4096, tokens: int = 4096) -> None:
    """Multiplies by the fastest algorithm that the search found, twice; ncu profiles the second call (check 4)."""
    lab = gpu_lab()
    found = [row["algorithm"] for row in read(Path(folder, "search.jsonl")) if row.get("tokens") == tokens]
    layer, x = layers24(lab, (size, size))[0], lab.randn(tokens, size)
    packed, algorithm = _vendor.compress(layer.weight), (*found, (0, 1, -1))[0]
    for begin in (torch.cuda.synchronize, torch.cuda.profiler.start):
        begin()
        _vendor.hardware_linear24(x, packed, layer.bias, size, UNKNOWN, *algorithm)
        torch.cuda.synchronize()
    torch.cuda.profiler.stop()
