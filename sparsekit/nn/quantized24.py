"""The linear layer on a quantized 2:4 weight."""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..ops import (
    QuantizedWeight24,
    TiledWeight24,
    linear24q,
    linear24q_int8,
    quantize24,
    tile24,
)
from ..ops._define import is_jit_tracing, reference_of
from ..ops._kernels import call_kernel
from ..ops.quant24 import check_quantized24
from ..ops.sparse24 import values_per_row
from .common import carry_mask
from .linear24 import check_bitmask24, packed24_of
from .rearranged import Rearranged

LINEAR24Q = torch.ops.sparsekit.linear24q.default
LINEAR24Q_INT8 = torch.ops.sparsekit.linear24q_int8.default
Inputs = Literal["int8", "float"]


class QuantizedLinear24(Rearranged):
    """A linear layer for inference whose 2:4 weight is stored in 8 or 4 bits: lossy.

    ``.weight`` is the weight that it multiplies by, not the one that it was made of. The state dict has the tensors of
    a ``QuantizedWeight24``, ``values``, ``scales`` and ``bitmask``, and ``bias``; with inputs of 8 bits the layer holds
    the same weight as the tiles that ``linear24q_int8`` reads. Gradients reach the input and ``bias``. Under autocast
    it computes in the dtype in which ``F.linear`` would.

    Args:
        packed: the weight, as ``quantize24`` returns it.
        bias: the bias Parameter, which becomes the layer's without a copy, or None.
        inputs: ``"int8"`` rounds every token of the input to 8 bits, which is the fastest on a CPU; ``"float"`` does
            not, which is the fastest on a GPU: ``linear24q_int8`` has no kernel there. A layer that is moved to another
            device computes the same there, from the same tensors.
        transposed: whether ``.weight`` is ``[in_features, out_features]``, as in ``Linear24``.

    Raises:
        TypeError: ``packed`` is no ``QuantizedWeight24``, or has wrong dtypes.
        ValueError: its shapes do not belong together, or there is no such ``inputs``.
    """

    lossy = True
    tiles: Tensor  # with inputs of 8 bits, else the three below
    values: Tensor
    scales: Tensor
    bitmask: Tensor

    def __init__(
        self,
        packed: QuantizedWeight24,
        bias: nn.Parameter | None = None,
        *,
        inputs: Inputs = "int8",
        transposed: bool = False,
    ):
        super().__init__()
        check_quantized24(packed)
        if inputs not in ("int8", "float"):
            raise ValueError(f"inputs must be 'int8' or 'float', got {inputs!r}")
        values, scales, bitmask, (self.out_features, self.in_features), *_ = packed
        self.quant_type, self.group, self.dtype = packed.quant_type, packed.group, packed.dtype
        self.inputs, self.transposed = inputs, transposed
        self.register_parameter("bias", bias)
        self._hold({"values": values, "scales": scales, "bitmask": bitmask})

    @classmethod
    @torch.inference_mode(False)  # tensors made in inference mode could not be used outside it
    @torch.no_grad()
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        quant_type: str = "int8",
        group: int = 64,
        inputs: Inputs = "int8",
        transposed: bool = False,
    ) -> "QuantizedLinear24":
        """Quantizes a layer whose weight is 2:4, by its stored mask, or without one by its non-zeros.

        The bias is the layer's own Parameter, not a copy, and so is the stored mask.

        Args:
            linear: ``nn.Linear``, or a layer with its ``weight`` and ``bias``.
            quant_type: ``"int8"``, ``"int4"`` or ``"nf4"``, as in ``quantize24``.
            group: how many columns share a scale.
            inputs: ``"int8"`` or ``"float"``, as in the class.
            transposed: whether ``linear.weight`` is ``[in_features, out_features]``.

        Raises:
            TypeError: the weight is not float32, float16 or bfloat16, or ``linear`` is not a linear layer.
            ValueError: a group of four keeps more than two, or a weight is not finite, or ``quantize24`` does not allow
                such a ``quant_type`` or ``group``.
        """
        packed, trained = packed24_of(linear, transposed)
        quantized = quantize24(packed, quant_type, group=group)
        layer = cls(quantized, linear.bias, inputs=inputs, transposed=transposed)
        layer.frozen = trained
        carry_mask(linear, layer)
        return layer.train(linear.training)

    @property
    def packed(self) -> QuantizedWeight24:
        """The weight as ``quantize24`` returns it."""
        return self._packed(*self._parts())

    def _packed(self, *parts: Tensor) -> QuantizedWeight24:
        if len(parts) == 1:
            return self._tiled(*parts).to_quantized()
        return self._quantized(*parts)

    def _quantized(self, values: Tensor, scales: Tensor, bitmask: Tensor) -> QuantizedWeight24:
        return QuantizedWeight24(values, scales, bitmask, **self._kind())

    def _tiled(self, tiles: Tensor) -> TiledWeight24:
        return TiledWeight24(tiles, **self._kind())

    def _kind(self) -> dict[str, Any]:
        shape = self.out_features, self.in_features
        return {"shape": shape, "quant_type": self.quant_type, "group": self.group, "dtype": self.dtype}

    def _parts(self) -> tuple[Tensor, ...]:
        return (self.tiles,) if self.inputs == "int8" else (self.values, self.scales, self.bitmask)

    def _unpack(self, *parts: Tensor) -> Tensor:
        if len(parts) == 1 and is_jit_tracing():
            raise RuntimeError(
                "torch.jit.trace cannot read the weight of a QuantizedLinear24 with inputs of 8 bits: use torch.export "
                "or call sparsekit.decompress_(model) first"
            )
        return self._packed(*parts).to_dense()

    def _multiply_directly(self, input: Tensor) -> Tensor | None:
        bias = self._parameters["bias"]  # nn.Module takes 1 us to look up a parameter as an attribute
        buffers, kind, group = self._buffers, self.quant_type, self.group
        if input.dtype != self.dtype:
            return None
        if self.inputs == "int8":
            return call_kernel(LINEAR24Q_INT8, input, buffers["tiles"], bias, self.out_features, kind, group)
        stored = buffers["values"], buffers["scales"], buffers["bitmask"]
        return call_kernel(LINEAR24Q, input, *stored, bias, kind, group)

    def _multiply(self, input: Tensor) -> Tensor:
        self._check_training()
        input, bias = self._operands(input)
        if self.inputs == "int8":
            return linear24q_int8(input, self._tiled(self.tiles), bias)
        return linear24q(input, self.packed, bias)

    def reference(self, input: Tensor) -> Tensor:
        if self.inputs == "float":
            return super().reference(input)
        reference = reference_of(LINEAR24Q_INT8)
        return reference(input, self.tiles, self.bias, self.out_features, self.quant_type, self.group).double()

    def _stored(self) -> dict[str, Tensor]:
        packed = self.packed
        return {"values": packed.values, "scales": packed.scales, "bitmask": packed.bitmask}

    def _templates(self) -> dict[str, Tensor]:
        rows, cols = self.out_features, self.in_features
        kept, whole = values_per_row(cols), self.quant_type == "int8"
        values = (kept, torch.int8) if whole else (-(-kept // 2), torch.uint8)
        shapes = {"values": values, "scales": (-(-cols // self.group), torch.bfloat16)}
        shapes["bitmask"] = (-(-cols // 8), torch.uint8)
        return {name: torch.empty(rows, size, dtype=dtype, device="meta") for name, (size, dtype) in shapes.items()}

    def _check_stored(self, stored: dict[str, Tensor]) -> None:
        if not any(tensor.is_meta for tensor in stored.values()):
            check_bitmask24(stored["bitmask"], self.in_features)
            check_codes(stored["values"], self.quant_type)

    def _hold(self, stored: dict[str, Tensor]) -> None:
        if self.inputs == "int8":
            packed = self._quantized(stored["values"], stored["scales"], stored["bitmask"])
            stored = {"tiles": tile24(packed).tiles}
        for name, tensor in stored.items():
            self.register_buffer(name, tensor, persistent=False)

    def extra_repr(self) -> str:
        kind = f"weight={self.quant_type}, group={self.group}, inputs={self.inputs}"
        return f"{super().extra_repr()}, {kind}, bytes={sum(tensor.nbytes for tensor in self._parts())}"


def check_codes(values: Tensor, quant_type: str) -> None:
    """Rejects a code that no weight has: -128, or of 4 bits -8.

    Raises:
        ValueError: names it.
    """
    if quant_type == "int8" and bool((values == -128).any()):
        raise ValueError("values must be from -127 to 127, got -128")
    if quant_type == "int4" and bool(((values & 15 == 8) | (values >> 4 == 8)).any()):
        raise ValueError("values must be from -7 to 7, got -8")
