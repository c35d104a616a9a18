"""The forms that change what a layer computes, which a lower precision allows: weights of 8 bits."""

from collections.abc import Mapping
from typing import Literal, get_args

from torch import nn

from .._layers import is_transposed
from ..nn import Compressed, Int8Linear
from ..ops.int8_linear import is_supported
from .candidates import CPU_CANDIDATES, Candidate, inference_only_reason

Precision = Literal["int8"]


class Int8(Candidate):
    """The dense form of 8-bit weights, whose inputs are rounded as well."""

    name = "int8"

    def unsupported_reason(self, layer: nn.Linear) -> str | None:
        if layer.weight.device.type != "cpu" or not is_supported():
            return f"PyTorch has no int8 product for {layer.weight.device.type} here"
        return inference_only_reason(layer) or not_finite_reason(layer)

    def nbytes(self, layer: nn.Linear) -> int:
        return layer.weight.numel() + 4 * layer.weight.shape[1 if is_transposed(layer) else 0]

    def build(self, layer: nn.Linear, kernels: Mapping[int, str]) -> Compressed:
        return Int8Linear.from_linear(layer, transposed=is_transposed(layer))


def not_finite_reason(layer: nn.Linear) -> str | None:
    """Returns why a layer cannot be quantized: its weight has an Inf or a NaN; None where it has none."""
    return None if bool(layer.weight.isfinite().all()) else "its weight has an Inf or a NaN"


LOSSY_CANDIDATES: dict[str, tuple[Candidate, ...]] = {"int8": (Int8(),)}
ALL = (*CPU_CANDIDATES, *dict.fromkeys(candidate for each in LOSSY_CANDIDATES.values() for candidate in each))
DENSE_KERNELS = ("plain", *(candidate.name for candidate in ALL if candidate.dense))


def check_precision(precision: object) -> None:
    """Raises ValueError unless ``precision`` is None or one that there is."""
    if precision is not None and precision not in get_args(Precision):
        raise ValueError(f"precision must be None or one of {get_args(Precision)}, got {precision!r}")
