"""The 2:4 product against the dense one: the decode kernel, and the vendor's product as torch offers it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from bench.shapes import name
from sparsekit.ops.nm import nm_prune_reference
from sparsekit.ops.sparse24 import pack24_reference

from .goals import linear_goals
from .lab import Lab, relative_error
from .log import Log, one_line

DENSE = "F.linear"
TOLERANCE = 1e-2  # bf16 operands, against the same product in fp32
DECODE = 64  # tokens, up to which linear24 is measured


@dataclass(frozen=True)
class Layer:
    """A 2:4 linear layer in every form that it is multiplied from."""

    dense: Tensor
    bias: Tensor
    values: Tensor
    bitmask: Tensor

    @property
    def rows(self) -> int:
        return self.dense.shape[0]


def layers(lab: Lab, shape: tuple[int, int]) -> Sequence[Layer]:
    """Layers with random weights, as many as exceed the cache."""

    def make() -> Layer:
        weight = nm_prune_reference(lab.randn(*shape) / shape[1] ** 0.5, 2, 4, None)[0]
        return Layer(weight, lab.randn(shape[0]), *pack24_reference(weight, None, False))

    return lab.sets(make, 2 * shape[0] * shape[1])


Forms = Callable[[Lab, Layer], Callable[[Tensor], Tensor]]


def dense(lab: Lab, layer: Any) -> Callable[[Tensor], Tensor]:
    return lambda x: F.linear(x, layer.dense, layer.bias)


def _decode(lab: Lab, layer: Layer) -> Callable[[Tensor], Tensor]:
    op = lab.op("linear24")
    return lambda x: op(x, layer.values, layer.bitmask, layer.bias)


def _semi_structured(lab: Lab, layer: Layer) -> Callable[[Tensor], Tensor]:
    weight = lab.vendor.semi_structured(layer.dense)
    return lambda x: F.linear(x, weight, layer.bias)


def measure(lab: Lab, log: Log) -> None:
    """Check 3 with the vendor's defaults: device and host time of every form at every shape and token count."""
    forms: dict[str, Forms] = {DENSE: dense, "linear24": _decode, "semi-structured": _semi_structured}
    for weight, shape in log.each({name(shape): shape for shape in lab.sizes.linear}):
        with log.guard(weight):
            made = layers(lab, shape)
            built, refused = _build(lab, forms, made)
            for what, tokens in log.each({f"{weight}, {tokens} tokens": tokens for tokens in lab.sizes.tokens}):
                with log.guard(what):
                    fit = {key: calls for key, calls in built.items() if key != "linear24" or tokens <= DECODE}
                    log.write(**one(lab, fit, refused, made[0], shape, tokens))


def _build(lab: Lab, forms: dict[str, Forms], made: Sequence[Layer]) -> tuple[dict[str, Any], dict[str, str]]:
    """What each form computes with, and the reason where it cannot."""
    built, refused = {}, {}
    for key, form in forms.items():
        try:
            built[key] = [form(lab, layer) for layer in made]
        except Exception as error:
            refused[key] = one_line(error)
    return built, refused


def one(
    lab: Lab,
    forms: dict[str, Sequence[Callable[[Tensor], Tensor]]],
    refused: dict[str, str],
    layer: Any,
    shape: tuple[int, int],
    tokens: int,
) -> dict[str, Any]:
    """The row of one shape at one token count; a form that is wrong is named and not timed.

    Args:
        layer: whose ``dense`` and ``bias`` the forms are checked against.
    """
    x, right, wrong = lab.randn(tokens, shape[1]), {}, dict(refused)
    expected = F.linear(x.float(), layer.dense.float(), layer.bias.float())
    for key, calls in forms.items():
        try:
            check_close(calls[0](x), expected)
            right[key] = [partial(call, x) for call in calls]
        except Exception as error:
            wrong[key] = one_line(error)
    raced = lab.clock.race(right)
    return {
        "op": "linear",
        "shape": name(shape),
        "dtype": "bf16",
        "tokens": tokens,
        "goal": linear_goals(name(shape), tokens),
        "flops": 2 * tokens * shape[0] * shape[1],
        "seconds": raced.seconds(),
        "host": raced.host_seconds(),
        "ratios": {key: raced.ratios(key)[DENSE] for key in right if key != DENSE},
        "wrong": wrong,
    }


def check_close(got: Tensor, expected: Tensor) -> float:
    """No figure on a wrong result."""
    if got.shape != expected.shape:
        raise ValueError(f"the result has shape {tuple(got.shape)}, not {tuple(expected.shape)}")
    error = relative_error(got, expected)
    if not error <= TOLERANCE:
        raise ValueError(f"wrong: a relative error of {error:.2g}, {TOLERANCE:g} is allowed")
    return error
