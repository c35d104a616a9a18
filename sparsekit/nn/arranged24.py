"""The 2:4 linear layer whose weight is arranged for the CPU product of few tokens, or of many."""

from typing import TypeVar

import torch
from torch import Tensor, nn

from ..ops import Arranged24, Packed24, arrange24, arranged_linear24, backends
from ..ops._define import is_jit_tracing
from ..ops._kernels import call_kernel
from ..ops.arranged24 import LAYOUTS, Layout
from ..ops.sparse24 import check_packed24
from .arranged import Arranged
from .common import autocast_dtype, carry_mask
from .linear24 import Linear24

LINEAR = {
    "input pairs": torch.ops.sparsekit.linear_input_pairs24.default,
    "row pairs": torch.ops.sparsekit.linear_row_pairs24.default,
}
Layer = TypeVar("Layer", bound="ArrangedLinear24")


class ArrangedLinear24(Arranged, Linear24):  # type: ignore[override, misc]
    """A ``Linear24`` for inference on a CPU, whose weight is arranged once in the layout that one product reads.

    It stores the arranged weight and the bias. The state dict is that of ``Linear24``; loading it arranges the weight
    again, and so does ``to(dtype)``. On another device, or without the compiled extension, it stores ``values`` and
    ``bitmask`` and multiplies as ``Linear24`` does. Gradients reach the input and ``bias``. The weight cannot be
    trained: a call in training mode that would need its gradient raises.

    Args:
        packed: the weight, which is not kept.
        bias: the bias Parameter, which becomes the layer's without a copy, or None.
        layout: ``"row pairs"`` for many tokens, ``"input pairs"`` for fewer, as in ``arrange24``.
        transposed: whether ``.weight`` is ``[in_features, out_features]``, as in ``Linear24``.

    Raises:
        TypeError, ValueError: ``packed`` is no packed weight, or there is no such layout.
    """

    def __init__(self, packed: Packed24, bias: nn.Parameter | None = None, *, layout: Layout, transposed: bool = False):
        nn.Module.__init__(self)
        if layout not in LAYOUTS:
            raise ValueError(f"layout must be one of {LAYOUTS}, got {layout!r}")
        check_packed24(packed)
        self.out_features, self.in_features = packed.shape
        self.transposed, self.layout = transposed, layout
        self._take(packed.values, packed.bitmask, bias)

    @classmethod
    def from_linear(  # type: ignore[override]
        cls: type[Layer], linear: nn.Linear, *, layout: Layout, transposed: bool = False
    ) -> Layer:
        """Arranges the weight of a layer that ``Linear24.from_linear`` takes, with the same arguments and errors.

        The bias is the layer's own Parameter, not a copy, and so is a stored mask.
        """
        packed = Linear24.from_linear(linear, transposed=transposed)
        layer = cls(packed.packed, linear.bias, layout=layout, transposed=transposed)
        carry_mask(linear, layer)
        return layer.train(linear.training)

    def _arrange(self, values: Tensor, bitmask: Tensor) -> Tensor | None:
        if values.device.type != "cpu" or backends()["linear_row_pairs24"]["cpu"] == "reference":
            return None
        return arrange24(Packed24(values, bitmask, (self.out_features, self.in_features)), self.layout).data

    def _restore(self, data: Tensor) -> tuple[Tensor, Tensor]:
        shape = self.out_features, self.in_features
        values, bitmask, _ = Arranged24(data, shape, self.like.dtype, self.layout).to_packed()
        return values, bitmask

    def _packed_layer(self) -> Linear24:
        return Linear24(self.in_features, self.out_features, False, device="meta", dtype=self.like.dtype)

    @property
    def arranged(self) -> Arranged24 | None:
        """The arranged weight; None where the packed one is stored."""
        if self.data is None:
            return None
        return Arranged24(self.data, (self.out_features, self.in_features), self.like.dtype, self.layout)

    @property
    def packed(self) -> Packed24:
        """The weight as ``pack24`` returns it, rebuilt from the arranged one."""
        return Packed24(*self._packed_parts(), (self.out_features, self.in_features))

    def _unpack(self, *parts: Tensor) -> Tensor:
        first, second = parts
        if second.dim() != 1:
            return super()._unpack(first, second)
        return Arranged24(second, (self.out_features, self.in_features), first.dtype, self.layout).to_dense()

    def _multiply_directly(self, input: Tensor) -> Tensor | None:
        buffers = self._buffers
        data, like = buffers["data"], buffers["like"]
        if data is None or like is None or input.dtype != like.dtype:
            return None
        return call_kernel(LINEAR[self.layout], input, data, self._parameters["bias"], self.out_features)

    def _multiply(self, input: Tensor) -> Tensor:
        self._check_training()
        arranged, dtype = self.arranged, autocast_dtype(input)
        bias: Tensor | None = self.bias
        if arranged is None or dtype not in (None, arranged.dtype):
            return super()._multiply(input)
        if dtype is not None:
            input, bias = input.to(dtype), None if bias is None else bias.to(dtype)
        if is_jit_tracing():
            return LINEAR[self.layout](input, arranged.data, bias, self.out_features)
        return arranged_linear24(input, arranged, bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, layout={self.layout!r}"
