"""The forms that a convolution can take on a CPU.

Its images stay in the memory format in which the model has them: in a model that is channels last, channels last is
what is measured. A layer that changed the format alone would convert at every call, and the rest of the model would see
another one than the user chose.
"""

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn

from .._timing import Call, Clock
from ..nn import ArrangedConv2d24, Compressed, Conv2d24, PrepackedConv2d
from ..ops import backends
from .candidates import EXTRA_BITS, Candidate, Prepacked, bytes_24, not_24_reason
from .kinds import Kind
from .sizes import extent

ROW_PAIRS = "2:4 row pairs"


class Convolution24(Candidate):
    """The 2:4 form, along the input channels at every tap: as it is stored or, for inference, arranged in row pairs.

    A layer holds its weight once, in one layout.
    """

    name = "2:4"
    pattern = "2:4"

    def unsupported_reason(self, layer: nn.Conv2d) -> str | None:
        if backends()["conv2d24"]["cpu"] == "reference":
            return "no compiled 2:4 convolution"
        return not_24_reason(layer)

    def nbytes(self, layer: nn.Conv2d) -> int:
        return bytes_24(layer)

    def extra_bytes(self, layer: nn.Conv2d, kernels: Collection[str]) -> int:
        return EXTRA_BITS["row pairs"] * layer.weight.numel() // 8 if ROW_PAIRS in kernels else 0

    def calls(self, kind: Kind, plain: nn.Conv2d, x: Tensor, clock: Clock) -> dict[str, Call | None]:
        found = super().calls(kind, plain, x, clock)
        if kind.trained or plain.in_channels % 4:  # an arranged weight cannot follow an optimizer, or has no rest
            return found
        return {**found, ROW_PAIRS: self.build(plain, {kind.layout_size: ROW_PAIRS})}

    def kernel_sets(self, layer: nn.Conv2d, measured: Collection[str]) -> list[frozenset[str]]:
        return [frozenset({name}) for name in (self.name, ROW_PAIRS) if name == self.name or name in measured]

    def build(self, layer: nn.Conv2d, kernels: Mapping[Any, str]) -> Compressed:
        return (ArrangedConv2d24 if ROW_PAIRS in kernels.values() else Conv2d24).from_conv2d(layer)


class PrepackedConvolution(Prepacked):
    """The dense form that oneDNN has reordered."""

    def build(self, layer: Any, kernels: Mapping[Any, str]) -> Compressed:
        count, height, width, _ = max(kernels, key=extent)
        return PrepackedConv2d.from_conv2d(layer, images=(count, height, width))


CONVOLUTION_CANDIDATES = (Convolution24(), PrepackedConvolution())
