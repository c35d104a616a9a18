"""The forms that change what a layer computes, which a lower precision allows: weights of 8 and of 4 bits."""

from collections.abc import Collection, Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from .._layers import is_transposed
from .._timing import Call, Clock
from ..nn import Compressed, Int8Linear, QuantizedLinear24
from ..ops import backends, pack24, quantize24
from ..ops.int8_linear import engine
from ..ops.sparse24 import values_per_row
from .candidates import CPU_CANDIDATES, Candidate, inference_only_reason, not_24_reason
from .kinds import Kind
from .tiers import kept_matrix

Precision = Literal["int8", "int4"]
GROUP = 64  # columns that share a scale
FOUR_BITS = ("int4", "nf4")
SAMPLED = 64  # rows by which the kinds of 4 bits are compared


class Int8(Candidate):
    """The dense form of 8-bit weights, whose inputs are rounded as well."""

    name = "int8"

    def unsupported_reason(self, layer: nn.Linear) -> str | None:
        if layer.weight.device.type != "cpu" or engine() is None:
            return f"PyTorch has no int8 product for {layer.weight.device.type} here"
        return inference_only_reason(layer) or not_finite_reason(layer)

    def nbytes(self, layer: nn.Linear) -> int:
        return layer.weight.numel() + 4 * layer.weight.shape[1 if is_transposed(layer) else 0]

    def build(self, layer: nn.Linear, kernels: Mapping[Any, str]) -> Compressed:
        return Int8Linear.from_linear(layer, transposed=is_transposed(layer))


class Quantized24(Candidate):
    """The 2:4 form with values of 8 or 4 bits, and inputs that are rounded to 8 bits or, as another kernel, are not.

    Args:
        quant_type: how the values are stored, as in ``quantize24``.
    """

    pattern = "2:4"

    def __init__(self, quant_type: str):
        self.quant_type = quant_type
        self.name = f"2:4 {quant_type}"
        self.kernels = {self.name: "int8", f"{self.name}, float inputs": "float"}

    def unsupported_reason(self, layer: nn.Linear) -> str | None:
        if layer.weight.device.type != "cpu" or not self._compiled():
            return f"no compiled kernel of quantized 2:4 for {layer.weight.device.type}"
        reason = inference_only_reason(layer) or not_finite_reason(layer) or not_24_reason(layer)
        if reason is None and self.quant_type in FOUR_BITS:
            errors = {kind: weight_error(layer, kind) for kind in FOUR_BITS}
            best = min(FOUR_BITS, key=lambda kind: errors[kind])
            if best != self.quant_type:
                return f"an error of the weight of {errors[self.quant_type]:.1%}, {best} has {errors[best]:.1%}"
        return reason

    def nbytes(self, layer: nn.Linear) -> int:
        rows, cols = kept_matrix(layer).shape
        kept = values_per_row(cols)
        values = kept if self.quant_type == "int8" else -(-kept // 2)
        return rows * (values + 2 * -(-cols // GROUP) + -(-cols // 8))

    def calls(self, kind: Kind, plain: nn.Linear, x: Tensor, clock: Clock) -> dict[str, Call | None]:
        return {name: self.build(plain, {kind.layout_size: name}) for name in self._compiled()}

    def kernel_sets(self, layer: nn.Linear, measured: Collection[str]) -> list[frozenset[str]]:
        return [frozenset({name}) for name in self.kernels if name in measured]

    def build(self, layer: nn.Linear, kernels: Mapping[Any, str]) -> Compressed:
        inputs: Any = self.kernels[next(iter(kernels.values()))]
        transposed = is_transposed(layer)
        return QuantizedLinear24.from_linear(
            layer, quant_type=self.quant_type, group=GROUP, inputs=inputs, transposed=transposed
        )

    def _compiled(self) -> list[str]:
        """Returns the kernels that are compiled."""
        ops = {"int8": "linear24q_int8", "float": "linear24q"}
        answers = backends()
        return [name for name, inputs in self.kernels.items() if answers[ops[inputs]]["cpu"] != "reference"]


def weight_error(layer: nn.Linear, quant_type: str) -> float:
    """Returns the relative error of a layer's 2:4 weight once it is quantized, on some of its rows."""
    weight = layer.weight.detach().t() if is_transposed(layer) else layer.weight.detach()
    rows = torch.linspace(0, len(weight) - 1, min(SAMPLED, len(weight)), dtype=torch.float64, device="cpu").long()
    part = torch.where(kept_matrix(layer)[rows], weight[rows], 0)
    change = quantize24(pack24(part), quant_type, group=GROUP).to_dense() - part
    return float(change.float().norm() / part.float().norm().clamp(min=1e-30))


def not_finite_reason(layer: nn.Linear) -> str | None:
    """Returns why a layer cannot be quantized: its weight has an Inf or a NaN; None where it has none."""
    return None if bool(layer.weight.isfinite().all()) else "its weight has an Inf or a NaN"


EIGHT: tuple[Candidate, ...] = (Quantized24("int8"), Int8())
LOSSY_CANDIDATES = {"int8": EIGHT, "int4": (*EIGHT, *map(Quantized24, FOUR_BITS))}
DENSE_KERNELS = ("plain", *(each.name for each in (*CPU_CANDIDATES, *EIGHT) if each.dense))


def check_precision(precision: object) -> None:
    """Raises ValueError unless ``precision`` is None or one that there is."""
    if precision is not None and precision not in get_args(Precision):
        raise ValueError(f"precision must be None or one of {get_args(Precision)}, got {precision!r}")
