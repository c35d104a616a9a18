"""The linear layer on the packed 2:4 format."""

import math
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..masks import get_mask
from ..ops import Packed24, linear24, nm_mask, pack24, unpack_bits
from ..ops._define import DTYPES, call_op, check_like, check_weight, is_jit_tracing
from ..ops._kernels import call_kernel
from .common import autocast_dtype, carry_mask, oriented
from .compressed_linear import CompressedLinear, weight_of

UNPACK24 = torch.ops.sparsekit.unpack24.default
LINEAR24 = torch.ops.sparsekit.linear24.default
Layer = TypeVar("Layer", bound="Linear24")


class Linear24(CompressedLinear):
    """A linear layer whose weight is stored and multiplied in the packed 2:4 format.

    It stores three tensors, which are also its state dict: ``values``, a Parameter ``[out_features, 2 * (in_features //
    4) + in_features % 4]`` that gradients reach; ``bitmask``, a uint8 buffer ``[out_features, ceil(in_features / 8)]``;
    and ``bias``. A new layer draws its weight as ``nn.Linear`` does and keeps the two largest magnitudes of every four.
    Under autocast it computes in the dtype in which ``F.linear`` would.

    Args:
        in_features: columns of the weight; any number, a tail of ``in_features % 4`` columns is stored whole.
        out_features: rows of the weight.
        bias: whether a bias is added.
        transposed: whether ``.weight`` is ``[in_features, out_features]``, as in the ``Conv1D`` of transformers.
        device: where the tensors are made.
        dtype: float32, float16 or bfloat16; None is torch's default.

    Raises:
        TypeError: ``dtype`` is another one.
    """

    values: nn.Parameter
    bitmask: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        transposed: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if (dtype or torch.get_default_dtype()) not in DTYPES:
            raise TypeError(f"dtype must be float32, float16 or bfloat16, got {dtype or torch.get_default_dtype()}")
        self.in_features, self.out_features, self.transposed = in_features, out_features, transposed
        bound = 1 / math.sqrt(in_features) if in_features else 0.0
        weight = torch.empty(out_features, in_features, device=device, dtype=dtype).uniform_(-bound, bound)
        values, bitmask, _ = pack24(weight, nm_mask(weight, 2, 4))
        self.values = nn.Parameter(values)
        self.register_buffer("bitmask", bitmask)
        self.register_parameter("bias", None)
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype).uniform_(-bound, bound))

    @classmethod
    @torch.inference_mode(False)  # tensors made in inference mode could be neither trained nor used outside it
    def from_linear(cls: type[Layer], linear: nn.Linear, *, transposed: bool = False) -> Layer:
        """Packs a layer whose weight is 2:4: the entries that its stored mask keeps, or without one, its non-zeros.

        A stored mask may keep fewer than two of a group (1:4, say), but not more. The bias is the layer's own
        Parameter, not a copy, and so is the stored mask.

        Args:
            linear: ``nn.Linear``, or a layer with its ``weight`` and ``bias``.
            transposed: whether ``linear.weight`` is ``[in_features, out_features]``.

        Raises:
            TypeError: the weight is not float32, float16 or bfloat16, or ``linear`` is not a linear layer.
            ValueError: a group of four keeps more than two; the message names the first one.
        """
        (values, bitmask, (rows, cols)), trained = packed24_of(linear, transposed)
        layer = cls(cols, rows, False, transposed=transposed, device="meta", dtype=values.dtype)
        layer.values = nn.Parameter(values, requires_grad=trained)
        layer.bitmask = bitmask
        layer.bias = linear.bias
        carry_mask(linear, layer)
        if not transposed and (bits := layer._buffers.get("weight_mask")) is not None and torch.equal(bits, bitmask):
            layer.weight_mask = bitmask  # equal bits are stored once
        return layer.train(linear.training)

    @property
    def trainable(self) -> bool:
        return self.values.requires_grad

    @property
    def packed(self) -> Packed24:
        """The weight as ``pack24`` returns it, made of the layer's own tensors."""
        return Packed24(self.values, self.bitmask, (self.out_features, self.in_features))

    def _parts(self) -> tuple[Tensor, ...]:
        return self.values, self.bitmask

    def _unpack(self, *parts: Tensor) -> Tensor:
        values, bitmask = parts
        return call_op(UNPACK24, values, bitmask, self.in_features)

    def _multiply_directly(self, input: Tensor) -> Tensor | None:
        parameters = self._parameters  # nn.Module takes 1 us to look up a parameter as an attribute
        return call_kernel(LINEAR24, input, parameters["values"], self._buffers["bitmask"], parameters["bias"])

    def _multiply(self, input: Tensor) -> Tensor:
        values: Tensor = self.values
        bias: Tensor | None = self.bias
        if (dtype := autocast_dtype(input)) is not None:
            input, values, bias = input.to(dtype), values.to(dtype), None if bias is None else bias.to(dtype)
        if is_jit_tracing():
            return LINEAR24(input, values, self.bitmask, bias)
        return linear24(input, Packed24(values, self.bitmask, (self.out_features, self.in_features)), bias)

    def _check_state(self, given: dict[str, Tensor], assigned: bool) -> None:
        if assigned and "values" in given:
            check_weight("values", given["values"])
        bitmask = given.get("bitmask")
        if bitmask is None or bitmask.is_meta or bitmask.shape != self.bitmask.shape:
            return  # torch loads what is on the meta device, and reports a missing bitmask or another shape itself
        check_like("bitmask", bitmask, torch.uint8, bitmask.shape, bitmask)
        check_bitmask24(bitmask, self.in_features)


def packed24_of(linear: nn.Linear, transposed: bool) -> tuple[Packed24, bool]:
    """Returns the packed weight of a 2:4 layer, and whether it is trained; the errors are those of ``from_linear``."""
    (weight, trained), mask = weight_of(linear, transposed), get_mask(linear)
    if mask is None:
        return pack24(weight, check=True), trained
    completed = pack24(oriented(mask, transposed).to(weight.dtype), check=True).bitmask
    return pack24(weight, unpack_bits(completed, weight.shape[1])), trained


def check_bitmask24(bitmask: Tensor, cols: int) -> None:
    """Rejects a bitmask, uint8 ``[rows, ceil(cols / 8)]``, that is not of a 2:4 weight.

    Raises:
        ValueError: a group has another number of bits.
    """
    full = cols // 4 * 4
    kept = unpack_bits(bitmask, cols)
    counts = kept[:, :full].reshape(len(kept), full // 4, 4).sum(-1)
    if not bool((counts == 2).all()) or not bool(kept[:, full:].all()):
        raise ValueError("bitmask must set two bits of every full group of four, and all of the tail")
