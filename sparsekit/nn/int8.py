"""The dense linear layer on an 8-bit weight."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.int8_linear import (
    LARGEST_INPUT,
    PackedInt8,
    int8_linear,
    multiply_packed,
    quantize_rows,
    round_tokens_reference,
)
from .common import carry_mask
from .compressed_linear import weight_of
from .rearranged import Rearranged


class Int8Linear(Rearranged):
    """A dense linear layer for inference on a CPU with an 8-bit weight, which rounds its inputs as well: lossy.

    It multiplies by PyTorch's own int8 products, oneDNN's on a CPU with VNNI, else fbgemm's. The weight is rounded to 8
    bits with a scale for each output, every token of the input with a scale of its own, to 8 bits with VNNI and to 7
    bits without it, whose sums of products would overflow; the products are summed exactly. ``.weight``
    is the weight that it multiplies by, not the one that it was made of. The state dict has ``values``, int8
    ``[out_features, in_features]``, ``scales``, float32 ``[out_features]``, and ``bias``. Gradients reach the input and
    ``bias``. On other CPUs than x86 the same weight is multiplied as float, which is slow.

    Args:
        packed: the weight.
        bias: the bias Parameter, which becomes the layer's without a copy, or None.
        dtype: that of ``.weight``: float32, float16 or bfloat16.
        transposed: whether ``.weight`` is ``[in_features, out_features]``, as in ``Linear24``.
    """

    sparse = False
    lossy = True
    packed: PackedInt8

    def __init__(
        self,
        packed: PackedInt8,
        bias: nn.Parameter | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        transposed: bool = False,
    ):
        super().__init__()
        self.out_features, self.in_features = packed.shape
        self.packed, self.dtype, self.transposed = packed, dtype, transposed
        self.register_parameter("bias", bias)

    @classmethod
    @torch.inference_mode(False)  # tensors made in inference mode could not be used outside it
    @torch.no_grad()
    def from_linear(cls, linear: nn.Linear, *, transposed: bool = False) -> "Int8Linear":
        """Rounds the weight of a layer. The bias is the layer's own Parameter, not a copy, and so is a stored mask.

        Raises:
            TypeError: ``linear`` is not a linear layer.
            ValueError: the weight has an Inf or a NaN.
        """
        weight, trained = weight_of(linear, transposed)
        if not bool(weight.isfinite().all()):
            raise ValueError("weight must be finite to be quantized, got an Inf or a NaN")
        layer = cls(PackedInt8(*quantize_rows(weight)), linear.bias, dtype=weight.dtype, transposed=transposed)
        layer.frozen = trained
        carry_mask(linear, layer)
        return layer.train(linear.training)

    def _parts(self) -> tuple[Tensor, ...]:
        return (self.packed.scales,)

    def _unpack(self, *parts: Tensor) -> Tensor:
        return self.packed.to_dense().to(self.dtype)

    def resident_tensors(self) -> list[Tensor]:
        """Returns tensors of the size of the weight: PyTorch does not show its own."""
        return list(self._templates().values())

    def _multiply_directly(self, input: Tensor) -> Tensor | None:
        packed, bias = self.packed, self._parameters["bias"]
        if packed.packed is None or not input.is_cpu or input.dtype != self.dtype:
            return None
        if bias is not None and (bias.dtype != input.dtype or bias.shape != packed.scales.shape):
            return None
        with torch._C._AutoDispatchBelowAutograd():
            return multiply_packed(input, packed, bias)

    def _multiply(self, input: Tensor) -> Tensor:
        self._check_training()
        input, bias = self._operands(input)
        return int8_linear(input, self.packed, bias)

    def reference(self, input: Tensor) -> Tensor:
        if self.packed.engine is None:
            return super().reference(input)
        limit = LARGEST_INPUT[self.packed.engine]
        codes, step = round_tokens_reference(input, limit)
        y = F.linear(codes.double() - (limit + 1), self.packed.to_dense().double()) * step.double()
        return y if self.bias is None else y + self.bias.double()

    def _templates(self) -> dict[str, Tensor]:
        values = torch.empty(self.out_features, self.in_features, dtype=torch.int8, device="meta")
        return {"values": values, "scales": torch.empty(self.out_features, dtype=torch.float32, device="meta")}

    def _stored(self) -> dict[str, Tensor]:
        return {"values": self.packed.values, "scales": self.packed.scales}

    def _check_stored(self, stored: dict[str, Tensor]) -> None:
        if not stored["values"].is_meta and bool((stored["values"] == -128).any()):
            raise ValueError("values must be from -127 to 127, got -128")

    def _hold(self, stored: dict[str, Tensor]) -> None:
        self.packed = PackedInt8(**stored)

    @torch.inference_mode(False)
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Int8Linear":
        device = fn(torch.empty(0, dtype=self.dtype, device=self.packed.scales.device)).device
        super()._apply(fn, recurse)
        if device != self.packed.scales.device:
            self._hold({name: tensor.to(device) for name, tensor in self._stored().items()})
        return self

    # What PyTorch has packed can be neither copied nor pickled.
    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "packed": self._stored()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._hold(self.__dict__["packed"])

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, weight=int8, inputs={self.packed.engine or 'float'}"
