"""The 2:4 and the tiered product against the dense one."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.sparse import to_sparse_semi_structured

from bench.shapes import by_name, name
from sparsekit.compress.gpu import ALGORITHMS, SPLITS
from sparsekit.ops import _vendor
from sparsekit.ops.hardware_linear24 import UNKNOWN
from sparsekit.ops.tiered import pack_tiered

from .checks import check_close, op, reference
from .goals import linear_goals
from .lab import Lab, Shape
from .rows import Row, Rows, one_line

DENSE, COMPILED = "F.linear", "F.linear compiled"
DECODE = 64  # tokens, up to which linear24 is measured
SHARES, KEPT = (0.35, 0.45, 0.2), 10  # blocks that are dense, 2:4 and top-k in the end of three-tier pruning; its k
COMPILED_TOKENS, TIERED_TOKENS = (1, 16, 1024), (1, 8, 16, 32, 1024)
QUICK, BEST = 4, 4  # buffers of the first timing of an algorithm, and algorithms that are then timed in turns

Product = Callable[[Tensor], Tensor]
Algorithm = tuple[
    int, int, int
]  # cuSPARSELt's id, into how many parts it splits the inner dimension, and the mode of that


@dataclass(frozen=True)
class Layer:
    """A linear layer, dense and packed: the tensors that ``linear24`` or ``linear_tiered`` takes."""

    dense: Tensor
    bias: Tensor
    packed: tuple[Tensor, ...]

    def expected(self, x: Tensor) -> Tensor:
        return F.linear(x.float(), self.dense.float(), self.bias.float())

    def product(self, x: Tensor) -> Tensor:
        return F.linear(x, self.dense, self.bias)


def layers24(lab: Lab, shape: Shape) -> Sequence[Layer]:
    """Makes 2:4 layers with random weights, as many as exceed the cache."""

    def make() -> Layer:
        weight = reference("nm_prune")(lab.randn(*shape) / shape[1] ** 0.5, 2, 4, None)[0]
        return Layer(weight, lab.randn(shape[0]), reference("pack24")(weight, None, False))

    return lab.sets(make, 2 * shape[0] * shape[1])


def layers_tiered(lab: Lab, shape: Shape) -> Sequence[Layer]:
    """Makes layers with random weights and tiers, as many as exceed the cache."""

    def make() -> Layer:
        blocks = [-(-side // 16) for side in shape]
        order = torch.randperm(blocks[0] * blocks[1], device=lab.device) / (blocks[0] * blocks[1])
        tiers = (order >= SHARES[0]).to(torch.uint8) + (order >= SHARES[0] + SHARES[1]).to(torch.uint8)
        weight = op("tier_prune")(lab.randn(*shape) / shape[1] ** 0.5, tiers.view(blocks), KEPT, 16, 16, None, None)
        return Layer(weight[0], lab.randn(shape[0]), tuple(pack_tiered(weight[0], k=KEPT)))

    return lab.sets(make, 2 * shape[0] * shape[1])


def linear24(layer: Layer) -> Product:
    kernel = op("linear24")
    return lambda x: kernel(x, *layer.packed, layer.bias)


def linear_tiered(layer: Layer) -> Product:
    kernel = op("linear_tiered")
    return lambda x: kernel(x, *layer.packed, layer.bias, len(layer.dense))


def semi_structured(layer: Layer) -> Product:
    weight = to_sparse_semi_structured(layer.dense)
    return lambda x: F.linear(x, weight, layer.bias)


def compare(lab: Lab, forms: Mapping[str, Sequence[Product]], x: Tensor, expected: Tensor, eager: bool = False) -> Row:
    """Returns the row of one product: its forms, one callable per buffer, compared with ``DENSE``.

    A form that differs from ``expected``, the product in fp32, is named and not timed. With ``eager``, the ratios are
    of what a caller waits for, the host included.
    """
    right, wrong = {}, {}
    for key, calls in forms.items():
        try:
            check_close(calls[0](x), expected)
            right[key] = [partial(call, x) for call in calls]
        except Exception as error:
            wrong[key] = one_line(error)
            lab.healthy()
    times = lab.clock.time_interleaved(right)
    compared = times.eager() if eager else times
    return {
        "shape": f"{expected.shape[1]}x{x.shape[1]}",
        "tokens": len(x),
        "goal": {},
        "seconds": times.seconds(),
        "host": times.host_seconds(),
        "ratios": {key: compared.ratio(key, DENSE) for key in right if key != DENSE},
        "wrong": wrong,
    }


def at_tokens(lab: Lab, rows: Rows, shape: Shape, tokens: Sequence[int], do: Callable[[Tensor], Row]) -> None:
    """Writes the row of each token count, of which ``do`` gets an input."""
    by_tokens = {f"{name(shape)}, {count} tokens": count for count in tokens}
    rows.for_each(by_tokens, lambda count: do(lab.randn(count, shape[1])))


def linear(lab: Lab, rows: Rows) -> None:
    """Check 3 with the vendor's defaults: device and host time of every form at every shape and token count."""

    def at_shape(shape: Shape) -> None:
        made = layers24(lab, shape)
        forms = {DENSE: [layer.product for layer in made]}
        for key, form in {"linear24": linear24, "semi-structured": semi_structured}.items():
            with rows.guard(f"{key} {name(shape)}"):
                forms[key] = [form(layer) for layer in made]

        def one(x: Tensor) -> Row:
            if len(x) <= DECODE and "linear24" in forms:
                expected = made[0].expected(x)
                lab.tune(rows, [partial(call, x) for call in forms["linear24"]], lambda y: check_close(y, expected))
            fit = {key: calls for key, calls in forms.items() if key != "linear24" or len(x) <= DECODE}
            row = compare(lab, fit, x, made[0].expected(x)) | {"goal": linear_goals(name(shape), len(x))}
            if len(x) == 1:
                host = ", ".join(f"{key} {seconds * 1e6:.0f} us" for key, seconds in row["host"].items())
                row["said"] = f"{name(shape)}, the host's time for one token: {host}"
            return row

        at_tokens(lab, rows, shape, lab.sizes.tokens, one)

    rows.for_each(by_name(lab.sizes.linear), at_shape)
    made = layers24(lab, lab.sizes.linear[0])
    options = {"mode": "max-autotune-no-cudagraphs"} if lab.backend == "inductor" else {}

    def one_compiled(x: Tensor) -> Row:
        tuned: Any = torch.compile(F.linear, backend=lab.backend, dynamic=False, **options)
        calls: list[Product] = [lambda x, layer=layer: tuned(x, layer.dense, layer.bias) for layer in made]
        return compare(lab, {DENSE: [layer.product for layer in made], COMPILED: calls}, x, made[0].expected(x))

    at_tokens(lab, rows, lab.sizes.linear[0], COMPILED_TOKENS, one_compiled)


def tiered(lab: Lab, rows: Rows) -> None:
    """Times ``linear_tiered``; with many tokens, it unpacks the weight and cuBLAS multiplies."""

    def at_shape(shape: Shape) -> None:
        made = layers_tiered(lab, shape)
        forms = {DENSE: [layer.product for layer in made], "linear_tiered": [linear_tiered(layer) for layer in made]}
        nbytes = sum(tensor.nbytes for tensor in made[0].packed)

        def one(x: Tensor) -> Row:
            expected = made[0].expected(x)
            lab.tune(rows, [partial(call, x) for call in forms["linear_tiered"]], lambda y: check_close(y, expected))
            row = compare(lab, forms, x, expected)
            took, ratio = row["seconds"]["linear_tiered"], row["ratios"]["linear_tiered"]
            said = f"{row['shape']}, {len(x)} tokens: {took * 1e6:.1f} us, {ratio:.2f}x of cuBLAS, "
            return row | {"said": said + f"{nbytes / took / 1e9:.0f} GB/s of its {nbytes / 1e6:.1f} MB"}

        at_tokens(lab, rows, shape, TIERED_TOKENS, one)

    rows.for_each(by_name((lab.sizes.linear[0], lab.sizes.linear[-1])), at_shape)


def search(lab: Lab, rows: Rows) -> None:
    """Check 3 with the vendor's best: every algorithm, then splits of the best, each checked before it is timed."""

    def at_shape(shape: Shape) -> None:
        made = layers24(lab, shape)
        packed = [_vendor.compress(layer.dense) for layer in made]
        at_tokens(lab, rows, shape, lab.sizes.tokens, lambda x: best_algorithm(lab, made, packed, x))

    rows.for_each(by_name(lab.sizes.linear), at_shape)


def best_algorithm(lab: Lab, made: Sequence[Layer], packed: Sequence[Tensor], x: Tensor) -> Row:
    """Returns the row of the fastest algorithm for one product."""
    expected, seconds, wrong = made[0].expected(x), {}, {}

    def calls(algorithm: Algorithm) -> list[Product]:
        return [
            lambda x, layer=layer, blob=blob: _vendor.hardware_linear24(
                x, blob, layer.bias, len(layer.dense), UNKNOWN, *algorithm
            )
            for layer, blob in zip(made, packed, strict=True)
        ]

    def attempt(algorithms: Iterable[Algorithm]) -> None:
        for algorithm in algorithms:
            try:
                check_close(calls(algorithm)[0](x), expected)
                seconds[algorithm] = lab.clock.seconds([partial(call, x) for call in calls(algorithm)[:QUICK]])
            except Exception as error:
                wrong[str(algorithm)] = one_line(error)
                lab.healthy()

    picked = _vendor.suggest(x, packed[0], made[0].bias, len(made[0].dense), UNKNOWN)
    attempt(dict.fromkeys([*((id_, 1, -1) for id_ in range(ALGORITHMS)), *([picked] if picked else [])]))
    if not seconds:
        raise ValueError(f"no algorithm is right: {next(iter(wrong.values()), 'there is none')}")
    attempt((min(seconds, key=seconds.__getitem__)[0], *split) for split in SPLITS)
    best = {str(each): each for each in sorted(seconds, key=seconds.__getitem__)[:BEST]}
    forms = {DENSE: [layer.product for layer in made], **{key: calls(each) for key, each in best.items()}}
    row = compare(lab, forms, x, expected)
    winner = min(row["ratios"], key=row["seconds"].__getitem__)
    for key in ("seconds", "host", "ratios"):
        row[key] = {form: row[key][each] for form, each in ((DENSE, DENSE), ("cuSPARSELt", winner)) if each in row[key]}
    row |= {"choice": f"algorithm {winner}", "algorithm": best[winner], "picked by the library": picked}
    return row | {"tried": len(seconds), "next": {key: seconds[best[key]] for key in best}, "wrong": wrong}
