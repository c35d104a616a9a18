"""The dense linear layer on a 4-bit weight."""

from typing import Any

import torch
from torch import Tensor, nn

from ..ops.nf4 import BLOCK, Nf4Weight, check_nf4, linear_nf4, quantize_nf4
from .common import carry_mask
from .compressed_linear import weight_of
from .rearranged import Rearranged


class Nf4Linear(Rearranged):
    """A dense linear layer for inference that takes an eighth of the memory of float32, and more time: lossy.

    It stores the 4-bit codes that bitsandbytes stores, and rebuilds its weight at every call, on any device.
    ``.weight`` is the weight that it multiplies by, not the one that it was made of; zeros stay zeros. The state dict
    has ``codes``, uint8, ``absmax``, float32, and ``bias``. Gradients reach the input and ``bias``. Under autocast it
    computes in the dtype in which ``F.linear`` would.

    It is slower than ``nn.Linear``: with 768 x 768 weights of float32 on an Intel Xeon, family 6 model 207, two cores,
    a call took 0.76, 1.34 and 17.3 ms for 1, 128 and 4096 tokens, and 0.07, 0.60 and 16.0 ms dense (medians of 21).

    Args:
        packed: the weight, as ``quantize_nf4`` returns it.
        bias: the bias Parameter, which becomes the layer's without a copy, or None.
        transposed: whether ``.weight`` is ``[in_features, out_features]``, as in ``Linear24``.

    Raises:
        TypeError: ``packed`` is no ``Nf4Weight``, or has wrong dtypes.
        ValueError: its shapes do not belong together.
    """

    sparse = False
    lossy = True
    codes: Tensor
    absmax: Tensor

    def __init__(self, packed: Nf4Weight, bias: nn.Parameter | None = None, *, transposed: bool = False):
        super().__init__()
        check_nf4(packed)
        self.out_features, self.in_features = packed.shape
        self.block, self.dtype, self.transposed = packed.block, packed.dtype, transposed
        self.register_parameter("bias", bias)
        self._hold({"codes": packed.codes, "absmax": packed.absmax})

    @classmethod
    @torch.inference_mode(False)  # tensors made in inference mode could not be used outside it
    @torch.no_grad()
    def from_linear(cls, linear: nn.Linear, *, block: int = BLOCK, transposed: bool = False) -> "Nf4Linear":
        """Quantizes the weight of a layer. The bias is the layer's own Parameter, not a copy, and so is a stored mask.

        Args:
            linear: ``nn.Linear``, or a layer with its ``weight`` and ``bias``.
            block: how many entries of the weight share a scale, a multiple of 8.
            transposed: whether ``linear.weight`` is ``[in_features, out_features]``.

        Raises:
            TypeError: the weight is not float32, float16 or bfloat16, or ``linear`` is not a linear layer.
            ValueError: the weight has an Inf or a NaN, or ``block`` is no positive multiple of 8.
        """
        weight, trained = weight_of(linear, transposed)
        layer = cls(quantize_nf4(weight, block=block), linear.bias, transposed=transposed)
        layer.frozen = trained
        carry_mask(linear, layer)
        return layer.train(linear.training)

    @property
    def packed(self) -> Nf4Weight:
        """The weight as ``quantize_nf4`` returns it, made of the layer's own tensors."""
        return self._packed(self.codes, self.absmax)

    def _packed(self, codes: Tensor, absmax: Tensor) -> Nf4Weight:
        return Nf4Weight(codes, absmax, (self.out_features, self.in_features), self.block, self.dtype)

    def _parts(self) -> tuple[Tensor, ...]:
        return self.codes, self.absmax

    def _unpack(self, *parts: Tensor) -> Tensor:
        codes, absmax = parts
        return self._packed(codes, absmax).to_dense()

    def _multiply(self, input: Tensor) -> Tensor:
        self._check_training()
        input, bias = self._operands(input)
        return linear_nf4(input, self.packed, bias)

    def _stored(self) -> dict[str, Tensor]:
        return {"codes": self.codes, "absmax": self.absmax}

    def _templates(self) -> dict[str, Tensor]:
        entries = self.out_features * self.in_features
        sizes: dict[str, Any] = {"codes": (-(-entries // 2), torch.uint8)}
        sizes["absmax"] = (-(-entries // self.block), torch.float32)
        return {name: torch.empty(size, dtype=dtype, device="meta") for name, (size, dtype) in sizes.items()}

    def _hold(self, stored: dict[str, Tensor]) -> None:
        for name, tensor in stored.items():
            self.register_buffer(name, tensor, persistent=False)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, weight=nf4, block={self.block}, bytes={self.packed.nbytes}"
