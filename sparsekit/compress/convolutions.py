"""The forms that a convolution can take on a CPU.

Its images stay in the memory format in which the model has them: in a model that is channels last, channels last is
what is measured. A layer that changed the format alone would convert at every call, and the rest of the model would see
another one than the user chose.
"""

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..nn import Compressed, Conv2d24, PrepackedConv2d
from ..ops import backends
from .candidates import Candidate, Prepacked, bytes_24, not_24_reason
from .sizes import extent


class Convolution24(Candidate):
    """The 2:4 form, along the input channels at every tap."""

    name = "2:4"
    pattern = "2:4"

    def unsupported_reason(self, layer: nn.Conv2d) -> str | None:
        if backends()["conv2d24"]["cpu"] == "reference":
            return "no compiled 2:4 convolution"
        return not_24_reason(layer)

    def nbytes(self, layer: nn.Conv2d) -> int:
        return bytes_24(layer)

    def build(self, layer: nn.Conv2d, kernels: Mapping[Any, str]) -> Compressed:
        return Conv2d24.from_conv2d(layer)


class PrepackedConvolution(Prepacked):
    """The dense form that oneDNN has reordered."""

    def build(self, layer: Any, kernels: Mapping[Any, str]) -> Compressed:
        count, height, width, _ = max(kernels, key=extent)
        return PrepackedConv2d.from_conv2d(layer, images=(count, height, width))


CONVOLUTION_CANDIDATES = (Convolution24(), PrepackedConvolution())
